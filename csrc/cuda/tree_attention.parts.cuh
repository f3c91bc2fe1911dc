// tree_attention, what its kernels share: arguments, one block of keys, the merge of a split's units.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace scrimp::cuda::tree_attention {

// Keys are added up by position: a cached key's is its slot, and the i-th new row that row t sees has position
// prefix + i. Positions are cut into splits, those into units, one a warp, and those into blocks, all of fixed sizes:
// a row's sums are the same wherever its prefix ends and whatever the other rows see.
constexpr int kBlock = 16, kUnit = 128, kWarps = 4, kSplit = kWarps * kUnit, kThreads = 32 * kWarps;
constexpr int kTile = 16, kTiles = 2, kRows = kTiles * kTile;  // rows of a product; tiles and rows of a thread block
constexpr int kTailBlocks = 5;                                 // a part of a block of cached keys and 64 new ones
constexpr unsigned kAll = 0xFFFFFFFF;
constexpr float kLowest = -3e38f;  // maxima are finite from the start, so hidden scores (-inf) weigh 0

// Elements from index to index; the last dimension is contiguous.
struct Strides {
  int64_t b, h, n;
};

struct Arguments {
  const void *q, *k, *v;     // [B, H, T, D], [B, G, C, D] both
  const int32_t* prefix;     // [B]
  const int64_t* ancestors;  // [1 or B, T], or null for the chain
  float2* stats;             // [B, G, T * group, splits + kWarps]: maximum and total of a split or unit
  float* sums;               // [B, G, T * group, splits + kWarps, D]
  void* out;                 // [B, T, H, D], contiguous
  float* lse;                // [B, H, T], contiguous
  Strides q_strides, k_strides, v_strides;
  int64_t ancestors_b, C, splits;  // whole splits of C keys; behind them the units of the one where the prefix ends
  int32_t T, G, group, rows;       // group = H / G, rows = T * group
  float scale;                     // times log2(e)
};

__device__ __forceinline__ int64_t cached_tokens(const Arguments& p, int64_t b) {
  return min(max(static_cast<int64_t>(p.prefix[b]), int64_t{0}), p.C - p.T);
}

// Rows of D numbers in 16 bits, 16 bytes a chunk; eight rows have the same chunk in eight different banks.
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * D + (chunk ^ (row & 7)) * 8;
}
// Rows of D sums; a column and its neighbours within eight lie together.
template <int D>
__device__ __forceinline__ int swizzled_sum(int row, int column) {
  return row * D + (column ^ (row & 7) * 8);
}

// What has been added up of rows lane / 4 and lane / 4 + 8 of a tile.
struct State {
  float top[2] = {kLowest, kLowest}, total[2] = {0, 0};
};

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(kAll, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(kAll, x, 2));
}

// Of scores [2 halves of the keys][4]: their weights as an operand of a product, the state with them, and what the
// sums so far are to be multiplied with. Keys from `seen` on are hidden.
template <class T>
__device__ __forceinline__ void weigh(float (&score)[2][4], State& state, float scale, int seen, uint32_t (&weights)[4],
                                      float (&past)[2]) {
  const int key = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float high = state.top[h];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = score[i / 2][2 * h + i % 2];
      const float scaled = __fmul_rn(x, scale);
      x = key + i / 2 * 8 + i % 2 < seen ? scaled : -INFINITY;
      high = fmaxf(high, x);
    }
    high = max_of_quad(high);
    past[h] = ptx::exp2_approximate(__fsub_rn(state.top[h], high));
    state.top[h] = high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = score[i / 2][2 * h + i % 2];
      x = ptx::exp2_approximate(__fsub_rn(x, high));
    }
    const float sum =
        __fadd_rn(__fadd_rn(score[0][2 * h], score[0][2 * h + 1]), __fadd_rn(score[1][2 * h], score[1][2 * h + 1]));
    state.total[h] = __fmaf_rn(state.total[h], past[h], sum_of_quad(sum));
    weights[h] = ptx::pack<T>(score[0][2 * h], score[0][2 * h + 1]);
    weights[2 + h] = ptx::pack<T>(score[1][2 * h], score[1][2 * h + 1]);
  }
}

// Adds a block of keys and values to tiles of rows; of the sums [16, D] of a tile kPairs pairs of 8 columns from
// `first_pair` on. q, k, v [rows, D] are swizzled.
template <class T, int D, int kHeld, int kPairs>
__device__ __forceinline__ void add_block(const T* q, const T* k, const T* v, int tiles, int first_pair, int seen,
                                          float scale, State (&state)[kHeld], float (&sums)[kHeld][2 * kPairs][4]) {
  const int lane = threadIdx.x % 32;
  float score[kHeld][2][4] = {};
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t keys[4];
    ptx::load_matrices(keys, k + swizzled<D>(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
    for (int tile = 0; tile < kHeld; ++tile)
      if (tile < tiles) {
        uint32_t rows[4];
        ptx::load_matrices(rows, q + swizzled<D>(tile * kTile + lane % 16, 2 * step + lane / 16));
        ptx::multiply<T>(score[tile][0], rows, keys[0], keys[1]);
        ptx::multiply<T>(score[tile][1], rows, keys[2], keys[3]);
      }
  }
  uint32_t weights[kHeld][4];
#pragma unroll
  for (int tile = 0; tile < kHeld; ++tile)
    if (tile < tiles) {
      float past[2];
      weigh<T>(score[tile], state[tile], scale, seen, weights[tile], past);
      if (__any_sync(kAll, past[0] != 1 || past[1] != 1))
#pragma unroll
        for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][n][i] = __fmul_rn(sums[tile][n][i], past[i / 2]);
    }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    uint32_t values[4];
    ptx::load_matrices<true>(values, v + swizzled<D>(lane % 16, 2 * (first_pair + pair) + lane / 16));
#pragma unroll
    for (int tile = 0; tile < kHeld; ++tile)
      if (tile < tiles) {
        ptx::multiply<T>(sums[tile][2 * pair], weights[tile], values[0], values[1]);
        ptx::multiply<T>(sums[tile][2 * pair + 1], weights[tile], values[2], values[3]);
      }
  }
}

// Writes a tile's sums to rows of swizzled sums, and the state of each row.
template <int D, int kPairs>
__device__ __forceinline__ void keep(const State& state, const float (&sums)[2 * kPairs][4], int first_pair, float* to,
                                     float2* stats) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
#pragma unroll
    for (int n = 0; n < 2 * kPairs; ++n)
      ptx::store_two(to + swizzled_sum<D>(row, (2 * first_pair + n) * 8 + lane % 4 * 2), sums[n][2 * h],
                     sums[n][2 * h + 1]);
    if (lane % 4 == 0) stats[row] = {state.top[h], state.total[h]};
  }
}

// The units of a split: their common maximum, the total, and each one's weight.
struct Merged {
  float2 stat;
  float weight[kWarps];
};
__device__ __forceinline__ Merged merge_units(const float2 (&units)[kWarps]) {
  Merged found;
  float top = units[0].x, total = 0;
#pragma unroll
  for (int u = 1; u < kWarps; ++u) top = fmaxf(top, units[u].x);
#pragma unroll
  for (int u = 0; u < kWarps; ++u) {
    found.weight[u] = ptx::exp2_approximate(__fsub_rn(units[u].x, top));
    total = __fmaf_rn(units[u].y, found.weight[u], total);
  }
  found.stat = {top, total};
  return found;
}

__device__ __forceinline__ float4 add_weighed(float weight, float4 x, float4 sum) {
  return {__fmaf_rn(weight, x.x, sum.x), __fmaf_rn(weight, x.y, sum.y), __fmaf_rn(weight, x.z, sum.z),
          __fmaf_rn(weight, x.w, sum.w)};
}
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

}  // namespace scrimp::cuda::tree_attention
