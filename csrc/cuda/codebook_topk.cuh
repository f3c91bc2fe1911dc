// codebook_topk, the kernels: a warp scores 16 rows with all codes of a range and keeps their best k in registers.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace scrimp::cuda::codebook_topk {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kTile = 16, kRows = kTile * kWarps;  // rows of a warp, of a block
constexpr int kCodes = 64, kDepth = 64, kChunks = kDepth / 8;  // codes of a tile, their numbers of a step
constexpr int kStages = 3, kStageNumbers = (kRows + kCodes) * kDepth, kShared = kStages * kStageNumbers * 2;
constexpr int kMostKeys = 512, kKeys = kMostKeys / 32;  // of a row from all ranges, of a lane
constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int64_t kEmpty = -0x7F80000100000000;  // the key of -inf, which no code has: 64 places count up from it
constexpr int64_t kBroken = INT64_MAX;           // in every place of a row with a score that is NaN

struct Arguments {
  const void *x, *codebook;  // [M, G D], [G, C, D]; rows and codes begin at multiples of 16 bytes
  const float* bias;         // [G, C], or null
  float* added;              // [G, C]: to the scores of each code, or null
  int64_t* keys;             // [M, G, parts, k]
  void* out;                 // [M, G D], contiguous
  int32_t* index;            // [M, G, k]
  float* scores;             // [M, G, k]
  int64_t x_m, codebook_g, codebook_c, M, blocks;
  int32_t G, C, D, k, parts, walk;  // ranges of codes, tiles of each
  bool mean;
};

// In the order of (score, lower code); both zeros are one.
__device__ __forceinline__ int64_t key_of(float score, int code) {
  const int32_t bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return (static_cast<int64_t>(bits ^ (bits >> 31 & 0x7FFFFFFF)) << 32) + (0x7FFFFFFF - code);
}

__device__ __forceinline__ float score_of(int64_t key) {
  const int32_t bits = static_cast<int32_t>(key >> 32);
  return __int_as_float(bits ^ (bits >> 31 & 0x7FFFFFFF));
}

// Of eight rows of 128 bytes each 16-byte chunk lies in other banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kDepth + (chunk ^ (row & 7)) * 8; }

// added: the bias less half of a code's square. A code a warp.
template <class T>
__global__ void __launch_bounds__(kThreads) codebook_topk_norm_kernel(const __grid_constant__ Arguments p) {
  const int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (code >= static_cast<int64_t>(p.G) * p.C) return;
  const T* own = static_cast<const T*>(p.codebook) + code / p.C * p.codebook_g + code % p.C * p.codebook_c;
  float squares = 0.0f;
  for (int d = threadIdx.x % 32 * 8; d < p.D; d += 256) {
    const uint4 some = *reinterpret_cast<const uint4*>(own + d);
    const T* numbers = reinterpret_cast<const T*>(&some);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(static_cast<float>(numbers[i]), static_cast<float>(numbers[i]), squares);
  }
#pragma unroll
  for (int lane = 16; lane; lane /= 2) squares += __shfl_xor_sync(kAll, squares, lane);
  if (threadIdx.x % 32 == 0) p.added[code] = fmaf(-0.5f, squares, p.bias ? p.bias[code] : 0.0f);
}

// The best code of a tile in rows lane / 4 + 8 h: each lane of four holds 16 of its scores.
__device__ __forceinline__ void best_of_tile(const float (&sums)[kCodes / 8][4], int h, float& best, int& at) {
  const int q = threadIdx.x % 4;
  best = -INFINITY;
  at = kCodes;
#pragma unroll
  for (int i = 0; i < kCodes / 4; ++i) {
    const float score = sums[i / 2][2 * h + i % 2];
    if (score > best) best = score, at = i / 2 * 8 + 2 * q + i % 2;
  }
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) {
    const float other = __shfl_xor_sync(kAll, best, lane);
    const int other_at = __shfl_xor_sync(kAll, at, lane);
    if (other > best || (other == best && other_at < at)) best = other, at = other_at;
  }
}

template <int kKept>
__device__ __forceinline__ int64_t worst_of(const int64_t (&found)[kKept / 4]) {
  int64_t worst = found[0];
#pragma unroll
  for (int j = 1; j < kKept / 4; ++j) worst = min(worst, found[j]);
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) worst = min(worst, __shfl_xor_sync(kAll, worst, lane));
  return worst;
}

// keys of a block of rows, a codebook and a range of its codes, in no order; launched with blocks x G x parts blocks.
template <class T, int kKept>
__global__ void __launch_bounds__(kThreads) codebook_topk_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4;
  const int64_t block = blockIdx.x % p.blocks, g = blockIdx.x / p.blocks % p.G;
  const int part = static_cast<int>(blockIdx.x / p.blocks / p.G);
  const int64_t first_row = block * kRows;
  const int first = part * p.walk * kCodes, last = min(p.C, first + p.walk * kCodes);
  const int depth = (p.D + kDepth - 1) / kDepth, steps = (last - first + kCodes - 1) / kCodes * depth;
  const T* x = static_cast<const T*>(p.x) + first_row * p.x_m + g * p.D;
  const T* codebook = static_cast<const T*>(p.codebook) + g * p.codebook_g;
  const auto stage = [&](int step) { return reinterpret_cast<T*>(memory) + step % kStages * kStageNumbers; };
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int code = first + step / depth * kCodes;
#pragma unroll
      for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
        const int row = i / kChunks, chunk = i % kChunks, d = step % depth * kDepth + chunk * 8;
        const bool has_row = d < p.D && first_row + row < p.M, has_code = d < p.D && code + row < last;
        T* to = stage(step) + swizzled(row, chunk);
        ptx::copy_async(to, has_row ? x + row * p.x_m + d : x, has_row);
        ptx::copy_async(to + kRows * kDepth, has_code ? codebook + (code + row) * p.codebook_c + d : codebook,
                        has_code);
      }
    }
    ptx::commit_copies();
  };
  static_assert(kRows == kCodes);

  int64_t found[2][kKept / 4], worst[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool exists = first_row + warp * kTile + lane / 4 + 8 * h < p.M;
#pragma unroll
    for (int j = 0; j < kKept / 4; ++j) found[h][j] = exists && 4 * j + q < p.k ? kEmpty + 4 * j + q : kBroken;
    worst[h] = worst_of<kKept>(found[h]);
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  float sums[kCodes / 8][4];
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step % depth == 0) {
#pragma unroll
      for (int i = 0; i < kCodes / 2; ++i) sums[i / 4][i % 4] = 0.0f;
    }
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // all warps are done with the stage that is filled now
    fetch(step + kStages - 1);
    const T *rows = stage(step), *codes = rows + kRows * kDepth;
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
      uint32_t a[4];
      ptx::load_matrices(a, rows + swizzled(warp * kTile + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int n = 0; n < kCodes / 16; ++n) {
        uint32_t b[4];
        ptx::load_matrices(b, codes + swizzled(16 * n + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
        ptx::multiply<T>(sums[2 * n], a, b[0], b[1]);
        ptx::multiply<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
    if (step % depth < depth - 1) continue;

    const int tile = first + step / depth * kCodes;
    bool broken[2] = {};
#pragma unroll
    for (int i = 0; i < kCodes / 4; ++i) {
      const int code = tile + i / 2 * 8 + 2 * q + i % 2;
      const float added = p.added && code < last ? p.added[g * p.C + code] : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& score = sums[i / 2][2 * h + i % 2];
        score += added;
        broken[h] |= code < last && score != score;
        if (code >= last || score != score) score = -INFINITY;
      }
    }
    float best[2];
    int at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (__ballot_sync(kAll, broken[h]) >> (lane & 28) & 15) {
        worst[h] = kBroken;
#pragma unroll
        for (int j = 0; j < kKept / 4; ++j) found[h][j] = kBroken;
      }
      best_of_tile(sums, h, best[h], at[h]);
    }
    while (__any_sync(kAll, best[0] > score_of(worst[0]) || best[1] > score_of(worst[1]))) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool better = best[h] > score_of(worst[h]);
        const int64_t key = key_of(best[h], tile + at[h]);
#pragma unroll
        for (int j = 0; j < kKept / 4; ++j) found[h][j] = better && found[h][j] == worst[h] ? key : found[h][j];
        worst[h] = worst_of<kKept>(found[h]);
#pragma unroll
        for (int i = 0; i < kCodes / 4; ++i)
          if (i / 2 * 8 + 2 * q + i % 2 == at[h]) sums[i / 2][2 * h + i % 2] = -INFINITY;
        best_of_tile(sums, h, best[h], at[h]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_row + warp * kTile + lane / 4 + 8 * h;
    int64_t* to = p.keys + ((row * p.G + g) * p.parts + part) * p.k;
#pragma unroll
    for (int j = 0; j < kKept / 4; ++j)
      if (row < p.M && 4 * j + q < p.k) to[4 * j + q] = found[h][j];
  }
}

// One row of one codebook a warp: the best of its keys in order, and their codes' mean or sum.
template <class T>
__global__ void __launch_bounds__(kThreads) codebook_topk_gather_kernel(const __grid_constant__ Arguments p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.M * p.G) return;
  const int lane = threadIdx.x % 32, count = p.parts * p.k;
  int64_t some[kKeys], chosen[2] = {kEmpty, kEmpty};
#pragma unroll
  for (int i = 0; i < kKeys; ++i) some[i] = 32 * i + lane < count ? p.keys[row * count + 32 * i + lane] : kEmpty;
  bool broken = false;
  for (int rank = 0; rank < p.k; ++rank) {
    int64_t best = some[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) best = max(best, some[i]);
#pragma unroll
    for (int other = 16; other; other /= 2) best = max(best, __shfl_xor_sync(kAll, best, other));
    broken |= best == kBroken;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (rank == 32 * i + lane) chosen[i] = best;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) some[i] = some[i] == best ? kEmpty : some[i];
  }
  int codes[2], there = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float score = broken ? NAN : score_of(chosen[i]);
    codes[i] = score > -INFINITY ? 0x7FFFFFFF - static_cast<int>(chosen[i] & 0x7FFFFFFF) : -1;
    there += __popc(__ballot_sync(kAll, codes[i] >= 0));
    if (32 * i + lane < p.k) {
      p.index[row * p.k + 32 * i + lane] = codes[i];
      p.scores[row * p.k + 32 * i + lane] = score;
    }
  }
  const float share = static_cast<float>(p.mean ? max(there, 1) : 1);
  const T* codebook = static_cast<const T*>(p.codebook) + row % p.G * p.codebook_g;
  for (int first = 0; first < p.D; first += 256) {
    const int d = first + 8 * lane;
    float sums[8] = {};
    for (int rank = 0; rank < there; ++rank) {
      const int code = __shfl_sync(kAll, rank < 32 ? codes[0] : codes[1], rank % 32);
      if (d < p.D) {
        const uint4 own = *reinterpret_cast<const uint4*>(codebook + code * p.codebook_c + d);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] += static_cast<float>(reinterpret_cast<const T*>(&own)[i]);
      }
    }
    uint4 whole;
#pragma unroll
    for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(&whole)[i] = T(broken ? NAN : __fdiv_rn(sums[i], share));
    if (d < p.D) *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row * p.D + d) = whole;
  }
}

}  // namespace scrimp::cuda::codebook_topk
