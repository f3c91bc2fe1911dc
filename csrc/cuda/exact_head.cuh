// exact_head, the kernels: a screen of few bits on tensor cores, then the dense head's own products for what it leaves.
//   state    a hidden state as pairs of int8 numbers, and the bound that makes centres intervals
//   screen   centres of all rows of the head, and the best of each tile; select: a cut that 2 k tiles reach
//   list     the rows that some state needs, in no order, with a bit for each state that does
//   rerank   their logits by the arithmetic of `linear`, 64 rows a block; top: the k largest of each state
//
// The last three run twice: with the cut, for a threshold that k logits reach; then with that and the intervals.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace scrimp::cuda::exact_head {

constexpr int kGroup = 64, kTile = 16, kStates = 64;  // coordinates, rows of the head, most states of a launch
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int64_t kNothing = INT64_MIN;

// Of a state and a group: what its integers stand for, and what the codes' offset adds to a sum of products.
struct Step {
  float size;
  int32_t offset;
};

struct Arguments {
  const void* x;                       // [M, K], rows at multiples of 16 bytes
  const float* coordinates;            // [M, D], or null where they are x
  const void* weight;                  // [V, K], rows at multiples of 16 bytes
  const uint8_t* codes;                // [T, tile_bytes]
  const float *scales, *error, *norm;  // [16 T], [G], [G]
  uint8_t* pieces;                     // [2, padded, G, 64]: upper, lower bytes
  Step* steps;                         // [G, padded]
  float *bound, *cut, *threshold;      // [M]
  float *centre, *best;                // [M, 16 T], [M, T]
  int32_t *counts, *listed;            // [2, 1 + M]: rows listed, those that each state needs; [V]
  uint64_t* needs;                     // [V]: of each listed row a bit for each state
  void* logits;                        // [M, pitch], by place in the list
  void* values;                        // [M, k]
  int64_t* ids;                        // [M, k]
  int32_t* scored;                     // [M]
  int64_t x_m, weight_n, tile_bytes, pitch;
  double slack;
  float relative, least;  // what rounding a sum to a logit takes from it at most
  int32_t M, padded, K, D, G, wide, V, T, k;
};

template <class T>
__device__ __forceinline__ T sum_of_warp(T mine) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) mine += __shfl_xor_sync(kAll, mine, distance);
  return mine;
}

// One state a block, a group a warp, zeros behind the last state. Byte 16 q + 4 j + b of a group's pieces is what
// tensor cores ask of lane q: byte b of the codes' word q + 4 j.
template <class T>
__global__ void __launch_bounds__(kThreads) exact_head_state_kernel(const __grid_constant__ Arguments p) {
  __shared__ double parts[3][kWarps];  // squares, terms, sums
  const int m = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x) + m * p.x_m;
  const bool exists = m < p.M;
  double squares = 0, terms = 0, sums = 0;
  bool sound = true;
  for (int i = threadIdx.x; exists && i < p.K; i += kThreads)
    squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  squares = sum_of_warp(squares);
#pragma unroll 1
  for (int g = warp; g < p.G; g += kWarps) {
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * lane + i, place = at / 16 * 4 + at % 16 / 4 * 16 + at % 4;
      const int swapped = (place & 1) << 1 | (place >> 1 & 1);
      const int narrow = (place >> 2 & 7) * 8 + (place & 1) * 4 + (place >> 5) * 2 + (place >> 1 & 1);
      const int d = g * kGroup + (g < p.wide ? (place & ~3) | swapped : narrow);
      h[i] = !exists || d >= p.D ? 0.0f
             : p.coordinates     ? p.coordinates[static_cast<int64_t>(m) * p.D + d]
                                 : static_cast<float>(x[d]);
      if (!(fabsf(h[i]) < 1e30f)) sound = false, h[i] = 0.0f;
    }
    float step = fmaxf(fabsf(h[0]), fabsf(h[1]));
#pragma unroll
    for (int distance = 16; distance; distance /= 2) step = fmaxf(step, __shfl_xor_sync(kAll, step, distance));
    step = __fdiv_rn(step, 32639.0f);
    double size = 0, left = 0;
    int32_t sum = 0;
    uchar2 upper, lower;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scaled = step > 0 ? __fdiv_rn(h[i], step) : 0.0f;
      const int integer = static_cast<int>(fminf(fmaxf(floorf(scaled + 0.5f), -32639.0f), 32639.0f));
      const int high = (integer + 128) >> 8;
      (i ? upper.y : upper.x) = static_cast<uint8_t>(high);
      (i ? lower.y : lower.x) = static_cast<uint8_t>(integer - high * 256);
      const double rest = static_cast<double>(h[i]) - static_cast<double>(step) * integer;
      size += static_cast<double>(h[i]) * h[i];
      left += rest * rest;
      sum += integer;
    }
    uint8_t* to = p.pieces + (static_cast<int64_t>(m) * p.G + g) * kGroup + 2 * lane;
    *reinterpret_cast<uchar2*>(to) = upper;
    *reinterpret_cast<uchar2*>(to + static_cast<int64_t>(p.padded) * p.G * kGroup) = lower;
    size = sqrt(sum_of_warp(size)), left = sqrt(sum_of_warp(left)), sum = sum_of_warp(sum);
    if (lane == 0) p.steps[g * p.padded + m] = {step, sum * (g < p.wide ? 128 : 8)};
    terms += size * p.error[g] + left * p.norm[g];
    sums += (size + left) * p.norm[g];
  }
  if (!__all_sync(kAll, sound)) terms = INFINITY;
  if (lane == 0) parts[0][warp] = squares, parts[1][warp] = terms, parts[2][warp] = sums;
  __syncthreads();
  if (threadIdx.x != 0 || !exists) return;
  for (int i = 1; i < kWarps; ++i) squares += parts[0][i], terms += parts[1][i], sums += parts[2][i];
  const double rounding = (2 * p.G + 8) * 0x1p-24;  // of the screen's own fp32 sums
  const float found = static_cast<float>((terms + rounding * sums + sqrt(squares) * p.slack) * (1 + 0x1p-20));
  p.bound[m] = found < INFINITY ? found : INFINITY;
}

// Eight states a column of tensor cores' tiles, 32 rows of the head a warp: two tiles, of which a lane holds four rows.
template <int kColumns>
struct Screened {
  float total[kColumns][2][4] = {};

  // One group: `codes` are words q, q + 4, .. of the lane's four rows.
  template <bool kWide>
  __device__ __forceinline__ void add(const Arguments& p, const uint8_t* codes, int g) {
    const int lane = threadIdx.x % 32, q = lane % 4;
    uint4 word[kWide ? 4 : 2];
#pragma unroll
    for (int j = 0; j < (kWide ? 4 : 2); ++j)
      word[j] = codes ? __ldg(reinterpret_cast<const uint4*>(codes + (q + 4 * j) * 64)) : uint4{};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint8_t* piece = p.pieces + (static_cast<int64_t>(8 * n + lane / 4) * p.G + g) * kGroup + 16 * q;
      const bool known = 8 * n + lane / 4 < p.M;
      const uint4 upper = known ? *reinterpret_cast<const uint4*>(piece) : uint4{};
      const uint4 lower =
          known ? *reinterpret_cast<const uint4*>(piece + static_cast<int64_t>(p.padded) * p.G * kGroup) : uint4{};
      const int4 steps =
          8 * n + 2 * q < p.M ? *reinterpret_cast<const int4*>(p.steps + g * p.padded + 8 * n + 2 * q) : int4{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int32_t high[4] = {}, low[4] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint4 &a = word[kWide ? 2 * k : 0], &b = word[kWide ? 2 * k + 1 : 1];
          uint32_t rows[4] = {half ? a.z : a.x, half ? a.w : a.y, half ? b.z : b.x, half ? b.w : b.y};
          if constexpr (!kWide) {
#pragma unroll
            for (int i = 0; i < 4; ++i) rows[i] = rows[i] >> 4 * k & 0x0F0F0F0F;
          }
          ptx::multiply_bytes(high, rows, k ? upper.z : upper.x, k ? upper.w : upper.y);
          ptx::multiply_bytes(low, rows, k ? lower.z : lower.x, k ? lower.w : lower.y);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float size = __int_as_float(i % 2 ? steps.z : steps.x);
          const int32_t sum = high[i] * 256 + low[i] - (i % 2 ? steps.w : steps.y);
          total[n][half][i] = fmaf(size, static_cast<float>(sum), total[n][half][i]);
        }
      }
    }
  }
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads) exact_head_screen_kernel(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x % 32, q = lane % 4, quad = lane / 4 % 4;
  const int tile = (blockIdx.x * kWarps + threadIdx.x / 32) * 2 + lane / 16, row = tile * kTile + 4 * quad;
  const uint8_t* codes = tile < p.T ? p.codes + tile * p.tile_bytes + 16 * quad : nullptr;
  Screened<kColumns> sums;
#pragma unroll 1
  for (int g = 0; g < p.wide; ++g) {
    sums.template add<true>(p, codes, g);
    if (codes) codes += 1024;
  }
#pragma unroll 1
  for (int g = p.wide; g < p.G; ++g) {
    sums.template add<false>(p, codes, g);
    if (codes) codes += 512;
  }
  const float4 scale = codes ? *reinterpret_cast<const float4*>(p.scales + row) : float4{};
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = 8 * n + 2 * q + i;
      auto& sum = sums.total[n];
      const float4 centre = {sum[0][i] * scale.x, sum[0][2 + i] * scale.y, sum[1][i] * scale.z,
                             sum[1][2 + i] * scale.w};
      const int left = p.V - row;
      float best = fmaxf(left > 0 ? centre.x : -INFINITY, left > 1 ? centre.y : -INFINITY);
      best = fmaxf(best, fmaxf(left > 2 ? centre.z : -INFINITY, left > 3 ? centre.w : -INFINITY));
      best = fmaxf(best, __shfl_xor_sync(kAll, best, 4));
      best = fmaxf(best, __shfl_xor_sync(kAll, best, 8));
      if (m >= p.M || !codes) continue;
      *reinterpret_cast<float4*>(p.centre + m * (int64_t{kTile} * p.T) + row) = centre;
      if (quad == 0) p.best[static_cast<int64_t>(m) * p.T + tile] = best;
    }
  }
}

// In the order of the numbers, NaN above all; both zeros are one.
__device__ __forceinline__ int32_t order_of(float value) {
  const int32_t bits = __float_as_int(value == 0.0f ? 0.0f : value);
  return value != value ? 0x7FFFFFFF : bits ^ (bits >> 31 & 0x7FFFFFFF);
}

__device__ __forceinline__ float number_of(int32_t order) { return __int_as_float(order ^ (order >> 31 & 0x7FFFFFFF)); }

// A number that at least 2 k of the tiles reach, the largest of 16 bits; -inf if they are fewer. A state a block.
__global__ void __launch_bounds__(kThreads) exact_head_select_kernel(const __grid_constant__ Arguments p) {
  __shared__ int32_t counts[2][kWarps];
  const int m = blockIdx.x;
  const float* best = p.best + static_cast<int64_t>(m) * p.T;
  int32_t found = -32768;
#pragma unroll 1
  for (int bit = 0; bit < 16; ++bit) {
    const int32_t trial = found + (32768 >> bit);
    int32_t count = 0;
    for (int t = threadIdx.x; t < p.T; t += kThreads) count += order_of(best[t]) >> 16 >= trial;
    count = __reduce_add_sync(kAll, count);
    if (threadIdx.x % 32 == 0) counts[bit % 2][threadIdx.x / 32] = count;
    __syncthreads();
    count = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) count += counts[bit % 2][i];
    if (count >= 2 * p.k) found = trial;
  }
  const float reached = 2 * p.k > p.T ? -INFINITY : number_of(found * 65536);
  if (threadIdx.x == 0) p.cut[m] = p.bound[m] < INFINITY ? (reached != reached ? -INFINITY : reached) : INFINITY;
}

// Four rows of the head a thread: those whose centres reach the cut; the last time, whose intervals reach the
// threshold.
__global__ void __launch_bounds__(kThreads) exact_head_list_kernel(const __grid_constant__ Arguments p, bool last) {
  const int lane = threadIdx.x % 32;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4, rows = int64_t{kTile} * p.T;
  int32_t* const counts = p.counts + (last ? 1 + p.M : 0);
  const bool inside = row < rows;
  const float4 scale = inside && last ? *reinterpret_cast<const float4*>(p.scales + row) : float4{};
  uint64_t need[4] = {};
#pragma unroll 1
  for (int m = 0; m < p.M; ++m) {
    const float4 centre = inside ? *reinterpret_cast<const float4*>(p.centre + m * rows + row) : float4{};
    const float bound = last ? p.bound[m] : 0.0f, cut = last ? p.threshold[m] : p.cut[m];
    const float ends[4] = {
        __fadd_ru(centre.x, __fmul_ru(scale.x, bound)), __fadd_ru(centre.y, __fmul_ru(scale.y, bound)),
        __fadd_ru(centre.z, __fmul_ru(scale.z, bound)), __fadd_ru(centre.w, __fmul_ru(scale.w, bound))};
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool needed = row + i < p.V && !(ends[i] < cut);
      need[i] |= static_cast<uint64_t>(needed) << m;
      count += needed;
    }
    count = __reduce_add_sync(kAll, count);
    if (lane == 0 && count) atomicAdd(counts + 1 + m, static_cast<int>(count));
  }
  int own = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) own += need[i] != 0;
  int upto = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAll, upto, distance);
    upto += lane >= distance ? other : 0;
  }
  int first = 0;
  if (lane == 31 && upto) first = atomicAdd(counts, upto);
  first = __shfl_sync(kAll, first, 31) + upto - own;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!need[i]) continue;
    p.listed[first] = static_cast<int32_t>(row + i);
    p.needs[first] = need[i];
    ++first;
  }
}

constexpr int kListed = 64, kDepth = 64, kVectors = kDepth / 8, kStages = 3;  // of a block of the re-rank
constexpr int kRerankThreads = 128, kChunk = 1024;                            // inputs summed alone, as `linear` does
template <int kColumns>
constexpr int kStageNumbers = (kListed + 8 * kColumns) * kDepth;

// Of eight rows of 128 bytes each vector of 16 bytes lies in other banks.
__device__ __forceinline__ int swizzled(int row, int vector) { return row * kDepth + (vector ^ (row & 7)) * 8; }

// Launched with ceil(V / kListed) blocks; those behind the list's end have nothing to do.
template <class T, int kColumns>
__global__ void __launch_bounds__(kRerankThreads)
    exact_head_rerank_kernel(const __grid_constant__ Arguments p, bool last) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
  const int count = p.counts[last ? 1 + p.M : 0], first = blockIdx.x * kListed;
  if (first >= count) return;
  const int steps = (p.K + kDepth - 1) / kDepth, vector = threadIdx.x % kVectors;
  const T *x = static_cast<const T*>(p.x), *weight = static_cast<const T*>(p.weight);
  constexpr int kApart = kRerankThreads / kVectors, kCopied = kListed / kApart;
  int32_t row[kCopied];
#pragma unroll
  for (int i = 0; i < kCopied; ++i) {
    const int place = first + threadIdx.x / kVectors + i * kApart;
    row[i] = place < count ? p.listed[place] : -1;
  }
  const auto stage = [&](int step) { return reinterpret_cast<T*>(memory) + step % kStages * kStageNumbers<kColumns>; };
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int d = step * kDepth + vector * 8;
#pragma unroll
      for (int i = 0; i < kCopied; ++i) {
        const bool inside = d < p.K && row[i] >= 0;
        ptx::copy_async(stage(step) + swizzled(threadIdx.x / kVectors + i * kApart, vector),
                        inside ? weight + row[i] * p.weight_n + d : weight, inside);
      }
#pragma unroll
      for (int m = threadIdx.x / kVectors; m < 8 * kColumns; m += kApart) {
        const bool inside = d < p.K && m < p.M;
        ptx::copy_async(stage(step) + kListed * kDepth + swizzled(m, vector), inside ? x + m * p.x_m + d : x, inside);
      }
    }
    ptx::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  float sums[kColumns][4] = {}, chunk[kColumns][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // all warps are done with the stage that is filled now
    fetch(step + kStages - 1);
    const T *rows = stage(step), *states = rows + kListed * kDepth;
#pragma unroll
    for (int d = 0; d < kDepth / 16; d += 2) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ptx::load_matrices(a[i], rows + swizzled(warp * 16 + lane % 16, 2 * (d + i) + lane / 16));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        uint32_t b[4];
        ptx::load_matrices(b, states + swizzled(8 * n + lane % 8, 2 * d + lane / 8));
        ptx::multiply<T>(chunk[n], a[0], b[0], b[1]);
        ptx::multiply<T>(chunk[n], a[1], b[2], b[3]);
      }
    }
    if (step % (kChunk / kDepth) < kChunk / kDepth - 1) continue;
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) sums[i / 4][i % 4] += chunk[i / 4][i % 4], chunk[i / 4][i % 4] = 0.0f;
  }
  ptx::wait_copies<0>();
  auto* const logits = static_cast<T*>(p.logits);
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) {
    const int m = i / 4 * 8 + 2 * q + i % 2, place = first + warp * 16 + lane / 4 + i % 4 / 2 * 8;
    if (m < p.M && place < count) logits[m * p.pitch + place] = T(sums[i / 4][i % 4] + chunk[i / 4][i % 4]);
  }
}

// The k largest of the listed rows that a state needs, of equals the lower row; the first time a threshold that they
// reach. A state a block.
template <class T>
__global__ void __launch_bounds__(kThreads) exact_head_top_kernel(const __grid_constant__ Arguments p, bool last) {
  __shared__ int64_t bests[2][kWarps];
  const int m = blockIdx.x;
  const int32_t *counts = p.counts + (last ? 1 + p.M : 0), count = *counts;
  const T* logits = static_cast<const T*>(p.logits) + m * p.pitch;
  int64_t before = INT64_MAX;
#pragma unroll 1
  for (int rank = 0; rank < p.k; ++rank) {
    int64_t own = kNothing;
    int at = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (!(p.needs[i] >> m & 1)) continue;
      const int64_t key = static_cast<int64_t>(order_of(static_cast<float>(logits[i]))) * (int64_t{1} << 32) +
                          (0x7FFFFFFF - p.listed[i]);
      if (key < before && key > own) own = key, at = i;
    }
    int64_t best = own;
#pragma unroll
    for (int distance = 16; distance; distance /= 2) best = max(best, __shfl_xor_sync(kAll, best, distance));
    if (threadIdx.x % 32 == 0) bests[rank % 2][threadIdx.x / 32] = best;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarps; ++i) best = max(best, bests[rank % 2][i]);
    before = best;
    if (last && own == best && best != kNothing) {
      static_cast<T*>(p.values)[static_cast<int64_t>(m) * p.k + rank] = logits[at];
      p.ids[static_cast<int64_t>(m) * p.k + rank] = p.listed[at];
    }
  }
  if (threadIdx.x != 0) return;
  if (last) {
    p.scored[m] = counts[1 + m];
  } else {
    const float value = number_of(static_cast<int32_t>(before >> 32));
    const float reached = value - fabsf(value) * p.relative - p.least;  // below the sum that was rounded to this logit
    p.threshold[m] = before != kNothing && fabsf(value) < INFINITY ? reached : -INFINITY;
  }
}

}  // namespace scrimp::cuda::exact_head
