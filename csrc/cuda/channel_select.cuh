// channel_select, the kernels: the rows' common scores, the cut of a count or a share, what lies above a cut, the list.
//
// Energies that a cut must hold are integers, squares of the scores' 24 digits in the unit of the largest one's last
// but 47th: they are added up in any order, and no sum rounds.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "common/select_rule.h"

namespace scrimp::cuda::channel_select {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kTile = 256;              // channels of a warp's turn
constexpr int kStep = kWarps * kTile;   // of a block's
constexpr int kMostScores = 24 * 1024;  // of a row whose cut is searched: they lie in shared memory
constexpr int kCommonThreads = 64;      // of a block that joins the scores of all rows
constexpr int kWords = 128;             // of masks that are listed together
constexpr unsigned kAll = 0xFFFFFFFF;
constexpr uint32_t kInfinity = 0x7F800000;

// Kept are scores above `score`, those equal to it up to channel `last`, and NaN.
struct alignas(8) Cut {
  float score;
  int32_t last;
};

struct Arguments {
  const void* x;                        // [M, K], rows x_m apart
  const float *level, *scale, *center;  // [1], [K], [K]; the latter two may be null
  const bool* whole;                    // [M], or null
  float* judged;                        // [K]: the scores of a common choice, else null
  Cut* cuts;                            // [M], or [1] of a common choice; null where a row finds its own
  void* kept;                           // [M, K]
  uint32_t* masks;                      // [M, words]: a bit a channel
  int32_t *index, *count;               // [K], [1]
  float* energy;                        // [M, 2]
  int64_t x_m, M, K, words;
  SelectRule rule;
};

// Numbers 128 g + 4 lane + i of a tile are x[4 g + i] of a lane.
struct Tile {
  float moved[8], score[8];
};

// x of a tile from channel `first` on, as it lies in memory: 16 bytes a lane, then dealt. All lanes call it.
template <class T, bool kWide>
__device__ __forceinline__ void load(const T* x, int64_t first, int64_t K, float (&to)[8]) {
  const int lane = threadIdx.x % 32;
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = first + i / 4 * 128 + 4 * lane + i % 4;
      to[i] = k < K ? static_cast<float>(x[k]) : 0.0f;
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int64_t k = first + 128 * g + 4 * lane;
      const float4 some = k < K ? *reinterpret_cast<const float4*>(x + k) : float4{};
      to[4 * g] = some.x, to[4 * g + 1] = some.y, to[4 * g + 2] = some.z, to[4 * g + 3] = some.w;
    }
  } else {
    const int64_t k = first + 8 * lane;
    const uint4 some = k < K ? *reinterpret_cast<const uint4*>(x + k) : uint4{};
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int from = 16 * g + lane / 2;
      const uint32_t words[] = {__shfl_sync(kAll, some.x, from), __shfl_sync(kAll, some.y, from),
                                __shfl_sync(kAll, some.z, from), __shfl_sync(kAll, some.w, from)};
      const uint32_t own[] = {lane % 2 ? words[2] : words[0], lane % 2 ? words[3] : words[1]};
#pragma unroll
      for (int i = 0; i < 4; ++i) to[4 * g + i] = static_cast<float>(reinterpret_cast<const T*>(own)[i]);
    }
  }
}

// Rows that are moved by their center, and what their channels weigh: 0 behind the last.
template <class T, bool kWide>
__device__ __forceinline__ Tile scored(const Arguments& p, int64_t m, int64_t first) {
  Tile tile;
  float numbers[8];
  load<T, kWide>(static_cast<const T*>(p.x) + m * p.x_m, first, p.K, tile.moved);
  if (p.center) {
    load<float, kWide>(p.center, first, p.K, numbers);
#pragma unroll
    for (int i = 0; i < 8; ++i) tile.moved[i] -= numbers[i];
  }
  if (p.scale) load<float, kWide>(p.scale, first, p.K, numbers);
#pragma unroll
  for (int i = 0; i < 8; ++i) tile.score[i] = fabsf(p.scale ? tile.moved[i] * numbers[i] : tile.moved[i]);
  return tile;
}

// What a cut is compared with.
template <class T, bool kWide>
__device__ __forceinline__ void measured(const Arguments& p, int64_t m, int64_t first, float (&to)[8]) {
  if (p.judged) return load<float, kWide>(p.judged, first, p.K, to);
  const Tile tile = scored<T, kWide>(p, m, first);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = tile.score[i];
}

// The sum of a number of each thread, in one order. Of two sums in turn the parts lie apart.
template <class Number>
__device__ __forceinline__ Number block_sum(Number mine, int turn) {
  __shared__ Number parts[2][kWarps];
#pragma unroll
  for (int lane = 16; lane; lane /= 2) mine += __shfl_xor_sync(kAll, mine, lane);
  if (threadIdx.x % 32 == 0) parts[turn][threadIdx.x / 32] = mine;
  __syncthreads();
  Number sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[turn][warp];
  return sum;
}

// judged: the root of the mean over the rows of the squared scores. A tile a warp.
template <class T, bool kWide>
__global__ void __launch_bounds__(kCommonThreads) channel_select_common_kernel(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kCommonThreads + threadIdx.x) / 32 * kTile;
  float sums[8] = {};
  for (int64_t m = 0; m < p.M; ++m) {
    const Tile tile = scored<T, kWide>(p, m, first);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = fmaf(tile.score[i], tile.score[i], sums[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t k = first + i / 4 * 128 + 4 * lane + i % 4;
    if (k < p.K) p.judged[k] = __fsqrt_rn(__fdiv_rn(sums[i], static_cast<float>(p.M)));
  }
}

// The scores of a row as bits, which are in the order of the scores, NaN highest; padded by zeros to whole quads.
struct Scores {
  const uint4* quads;
  int count;
  int top;  // of top_p, the exponent of the largest score; negative: every score weighs 1
  int turn = 0;

  __device__ __forceinline__ uint64_t weight(uint32_t bits) const {
    if (top < 0) return 1;
    const int exponent = max(static_cast<int>(bits >> 23), 1), shift = 2 * (top - exponent);
    const uint64_t digits = (bits & 0x7FFFFF) | (bits >> 23 ? 0x800000 : 0);
    return shift < 64 ? digits * digits >> shift : 0;
  }

  // What the scores weigh of which `chosen(bits, channel)`.
  template <class Chosen>
  __device__ __forceinline__ uint64_t held(Chosen chosen) {
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint4 quad = quads[i];
      const uint32_t bits[] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (chosen(bits[j], 4 * i + j)) sum += weight(bits[j]);
    }
    return block_sum(sum, turn ^= 1);
  }

  // The cut at which the largest scores weigh `target`, at most `reached`, which is what all K weigh: its bits one by
  // one, then, of equal scores, the last channel that is needed.
  __device__ __forceinline__ Cut reach(uint64_t target, uint64_t reached, int K) {
    uint32_t cut = 0;
#pragma unroll 1
    for (uint32_t digit = 1u << 30; digit; digit >>= 1) {
      const uint64_t sum = held([&](uint32_t bits, int) { return bits >= (cut | digit); });
      if (sum >= target) cut |= digit, reached = sum;
    }
    if (cut > kInfinity) return {INFINITY, -1};  // those that are NaN, which are kept anyway, are enough
    const uint64_t above = held([&](uint32_t bits, int) { return bits > cut; }), each = weight(cut);
    if ((target - above + each - 1) / each * each >= reached - above) return {__uint_as_float(cut), K - 1};
    int before = 0;  // channels whose equals are not enough
#pragma unroll 1
    for (int step = 1 << (31 - __clz(K)); step; step /= 2) {
      const uint64_t sum = held([&](uint32_t bits, int k) { return bits == cut && k < before + step; });
      if (above + sum < target) before += step;
    }
    return {__uint_as_float(cut), before};
  }
};

// cuts of the rules top_k and top_p: a row a block, with K at most kMostScores.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) channel_select_cut_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) uint32_t bits[];
  const int64_t m = blockIdx.x;
  const int lane = threadIdx.x % 32, K = static_cast<int>(p.K);
  const float level = *p.level;
  uint32_t largest = 0;
  for (int first = threadIdx.x / 32 * kTile; first < K; first += kStep) {
    float score[8];
    measured<T, kWide>(p, m, first, score);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int k = first + 128 * g + 4 * lane;
      uint4 quad = {__float_as_uint(score[4 * g]), __float_as_uint(score[4 * g + 1]), __float_as_uint(score[4 * g + 2]),
                    __float_as_uint(score[4 * g + 3])};
      if (k < K) *reinterpret_cast<uint4*>(bits + k) = quad;
      largest = max(max(largest, max(quad.x, quad.y)), max(quad.z, quad.w));
    }
  }
  __shared__ uint32_t most[kWarps];
  largest = __reduce_max_sync(kAll, largest);
  if (lane == 0) most[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) largest = max(largest, most[warp]);

  const bool share = p.rule == SelectRule::top_p;
  const int top = share ? max(static_cast<int>(largest >> 23), 1) : -1;
  Scores scores = {reinterpret_cast<const uint4*>(bits), (K + 3) / 4, top};
  Cut cut = {INFINITY, -1};
  if (share && level >= 1)
    cut.score = 0.0f;
  else if (share ? largest > kInfinity : level >= static_cast<float>(K))
    cut.score = -1.0f;
  else if (level > 0 && !(share && largest == 0)) {
    uint64_t all = K, target = 1;
    if (share) all = scores.held([](uint32_t, int) { return true; });
    if (!share) target = static_cast<uint64_t>(ceilf(level));
    if (share && largest < kInfinity) target = max(__double2ull_ru(static_cast<double>(level) * all), 1ull);
    cut = scores.reach(target, all, K);
  }
  if (threadIdx.x == 0) p.cuts[m] = cut;
}

template <class T, bool kWide>
__device__ __forceinline__ void store(T* to, int64_t k, int64_t K, const float (&from)[4]) {
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i < K) to[k + i] = T(from[i]);
  } else if (k < K) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float4*>(to + k) = {from[0], from[1], from[2], from[3]};
    else  // one word: nvcc may store halves one by one
      *reinterpret_cast<uint64_t*>(to + k) =
          static_cast<uint64_t>(ptx::pack<T>(from[2], from[3])) << 32 | ptx::pack<T>(from[0], from[1]);
  }
}

// kept, masks and energy of a row a block.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) channel_select_kernel(const __grid_constant__ Arguments p) {
  const int64_t m = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Cut cut = p.cuts ? p.cuts[p.judged ? 0 : m] : Cut{*p.level, -1};
  if (p.rule == SelectRule::relative) {
    float sum = 0.0f;
    for (int64_t first = warp * kTile; first < p.K; first += kStep) {
      float score[8];
      measured<T, kWide>(p, m, first, score);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += score[i];
    }
    cut.score *= __fdiv_rn(block_sum(sum, 0), static_cast<float>(p.K));
    if (cut.score > 3.4028234663852886e38f) cut.score = 3.4028234663852886e38f;  // infinite scores are kept
  }
  if (p.whole && p.whole[m]) cut = {-1.0f, -1};

  float dropped = 0.0f, every = 0.0f;
  T* kept = static_cast<T*>(p.kept) + m * p.K;
  for (int64_t first = warp * kTile; first < p.K; first += kStep) {
    const Tile tile = scored<T, kWide>(p, m, first);
    float judged[8];
    if (p.judged) load<float, kWide>(p.judged, first, p.K, judged);
    uint32_t masks[2] = {};
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int64_t k = first + 128 * g + 4 * lane;
      float numbers[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = tile.score[4 * g + i], compared = p.judged ? judged[4 * g + i] : score;
        const bool keep = k + i < p.K && (!(compared <= cut.score) || (compared == cut.score && k + i <= cut.last));
        numbers[i] = keep ? tile.moved[4 * g + i] : 0.0f;
        masks[g] |= static_cast<uint32_t>(keep) << (4 * (lane % 8) + i);
        every = fmaf(score, score, every);
        dropped = keep ? dropped : fmaf(score, score, dropped);
      }
      store<T, kWide>(kept, k, p.K, numbers);
#pragma unroll
      for (int other = 4; other; other /= 2) masks[g] |= __shfl_xor_sync(kAll, masks[g], other);
    }
    const int64_t word = first / 32 + lane % 8 + lane / 8;  // of the first half, or four further
    if (lane % 4 == 0 && word < p.words) p.masks[m * p.words + word] = lane % 8 ? masks[1] : masks[0];
  }
  dropped = block_sum(dropped, 1), every = block_sum(every, 0);
  if (threadIdx.x == 0) p.energy[2 * m] = dropped, p.energy[2 * m + 1] = every;
}

// index and count of the channels that any row keeps: one block.
inline __global__ void __launch_bounds__(kThreads) channel_select_list_kernel(const __grid_constant__ Arguments p) {
  __shared__ int32_t list[32 * kWords];
  __shared__ uint32_t words[kWords];
  __shared__ int before[kWords], totals[kWords / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t listed = 0;
  for (int64_t first = 0; first < p.words; first += kWords) {
    if (threadIdx.x < kWords) {
      const int64_t at = first + threadIdx.x;
      uint32_t word = 0;
      if (at < p.words) {
#pragma unroll 4
        for (int64_t m = 0; m < p.M; ++m) word |= p.masks[m * p.words + at];
      }
      int sum = __popc(word);
#pragma unroll
      for (int other = 1; other < 32; other *= 2) {
        const int lower = __shfl_up_sync(kAll, sum, other);
        if (lane >= other) sum += lower;
      }
      words[threadIdx.x] = word;
      before[threadIdx.x] = sum - __popc(word);
      if (lane == 31) totals[warp] = sum;
    }
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int part = 0; part < kWords / 32; ++part) {
#pragma unroll
      for (int half = 0; half < 32; half += kWarps) {
        const int at = 32 * part + half + warp;
        const uint32_t word = words[at], lower = word & ((1u << lane) - 1);
        if (word >> lane & 1) list[all + before[at] + __popc(lower)] = static_cast<int32_t>((first + at) * 32 + lane);
      }
      all += totals[part];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += kThreads) p.index[listed + i] = list[i];
    listed += all;
  }
  for (int64_t i = listed + threadIdx.x; i < p.K; i += kThreads) p.index[i] = -1;
  if (threadIdx.x == 0) *p.count = static_cast<int32_t>(listed);
}

}  // namespace scrimp::cuda::channel_select
