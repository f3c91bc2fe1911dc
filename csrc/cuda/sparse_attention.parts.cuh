// sparse_attention, what its kernels share: arguments, sizes, one step of keys.
#pragma once

#include "common/ptx.cuh"
#include "cuda/sparse_attention.walk.cuh"

namespace scrimp::cuda::sparse_attention {

// A row is one query of one head. Where all heads share a plan, the query heads of a key/value head lie side by side in
// the rows of a tile (row r is query r / group of head r % group); elsewhere a block works on one head.
constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kMostSplits = 32, kLeastSteps = 8;  // of a split; one lane a split
constexpr float kLowest = -3e38f;                 // maxima are finite from the start, so hidden scores (-inf) weigh 0

// Elements from index to index; the last dimension is contiguous.
struct Strides {
  int64_t b, h, n;
};

// Ranges [2] or columns of the tiles, and each tile's slice (first, count) of them.
struct List {
  const int32_t *values, *slices;
  int64_t values_b, values_h, slices_b, slices_h;
  int64_t capacity;
};

struct Arguments {
  const void *q, *k, *v;  // [B, H, n_q, D], [B, H / shared_by, n_k, D] both
  List ranges, columns;
  const int32_t* row_start;  // [1 or B, n_q], or null
  void* out;                 // [B, n_q, H, D], contiguous
  float* lse;                // [B, H, n_q], contiguous
  float* partial;            // [splits, B, n_q, H, D] and
  float* partial_lse;        // [splits, B, H, n_q] (logarithm to base 2), where there are several splits
  int32_t* steps;            // [blocks], of 32 keys each, and
  int32_t* order;            // [blocks], those with many steps first; null where blocks start as they are numbered
  Strides q_strides, k_strides, v_strides;
  int64_t row_start_b, n_rows;  // n_rows = B H n_q
  int32_t H, group, shared_by, n_q, n_k, q_block, q_offset, splits;
  float scale;       // times log2(e), above zero
  int32_t negative;  // whether it was below
};

// Rows of one tile, from `first` on; all of them belong to one sample and to `group` heads of one key/value head.
struct Rows {
  int b, head, tile, first, count;  // the first head; the tile's rows

  __device__ __forceinline__ int token(const Arguments& p, int row) const {
    return tile * p.q_block + min(first + row, count - 1) / p.group;  // rows past the tile's last repeat it
  }
};

// What a warp works on, in shared memory: registers are scarce.
struct Place {
  Rows rows;
  Tile tile;
};

// kTiles tiles of 16 rows a warp; a step of kKeys keys makes 16 KiB of K and V.
template <int D, int kTiles>
struct Sizes {
  static constexpr int kRows = 16 * kTiles * kWarps, kKeys = 4096 / D, kChunks = D / 8;
  static constexpr int kStageNumbers = 2 * kKeys * D;
  // One tile's rows wait in the last stage for their way into registers.
  static constexpr int kQuery = kTiles == 1 ? (kStages - 1) * kStageNumbers : kStages * kStageNumbers;
  static constexpr int kNumbers = kStages * kStageNumbers + (kTiles == 1 ? 0 : kRows * D);
  // Behind the numbers: each warp's place, each stage's keys.
  static constexpr int kPlace = 2 * kNumbers, kStep = kPlace + kWarps * sizeof(Place);
  static constexpr int kBytes = kStep + 4 * kStages * kKeys;
};

// Rows of D numbers in 16 bits, 16 bytes a chunk; eight rows have the same chunk in eight different banks.
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * D + (chunk ^ (row & 7)) * 8;
}

// What has been added up of rows lane / 4 and lane / 4 + 8 of a tile; totals of this lane's keys.
struct State {
  float top[2] = {kLowest, kLowest}, total[2] = {0, 0};
};

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

// q k^T of a warp's rows and a step's keys. The rows are in registers for one tile, else in shared memory.
template <class T, int D, int kTiles>
__device__ __forceinline__ void score_keys(const uint32_t (&held)[D / 16][4], const T* q, const T* k,
                                           float (&score)[kTiles][Sizes<D, kTiles>::kKeys / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t rows[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if constexpr (kTiles == 1)
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[tile][i] = held[step][i];
      else
        ptx::load_matrices(rows[tile], q + swizzled<D>(tile * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int pair = 0; pair < Sizes<D, kTiles>::kKeys / 16; ++pair) {
      uint32_t keys[4];
      ptx::load_matrices(keys, k + swizzled<D>(pair * 16 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        ptx::multiply<T>(score[tile][2 * pair], rows[tile], keys[0], keys[1]);
        ptx::multiply<T>(score[tile][2 * pair + 1], rows[tile], keys[2], keys[3]);
      }
    }
  }
}

// Of a tile's scores: their weights as operands of products, the state with them, and what the sums so far are to be
// multiplied with.
template <class T, int kKeys>
__device__ __forceinline__ void weigh(float (&score)[kKeys / 8][4], State& state, float scale,
                                      uint32_t (&weights)[kKeys / 16][4], float (&past)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float high = fmaxf(score[0][2 * h], score[0][2 * h + 1]);
#pragma unroll
    for (int n = 1; n < kKeys / 8; ++n) high = fmaxf(high, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
    high = fmaxf(state.top[h], max_of_quad(high) * scale);
    past[h] = ptx::exp2_approximate(state.top[h] - high);
    state.top[h] = high;
    float total = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) score[n][i] = ptx::exp2_approximate(fmaf(score[n][i], scale, -high));
      total += score[n][2 * h] + score[n][2 * h + 1];
      weights[n / 2][n % 2 * 2 + h] = ptx::pack<T>(score[n][2 * h], score[n][2 * h + 1]);
    }
    state.total[h] = fmaf(state.total[h], past[h], total);
  }
}

// sums += weights v, of a step's values.
template <class T, int D, int kTiles>
__device__ __forceinline__ void add_values(const uint32_t (&weights)[kTiles][Sizes<D, kTiles>::kKeys / 16][4],
                                           const T* v, float (&sums)[kTiles][D / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < Sizes<D, kTiles>::kKeys / 16; ++step)
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t values[4];
      ptx::load_matrices<true>(values, v + swizzled<D>(step * 16 + lane % 16, 2 * pair + lane / 16));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        ptx::multiply<T>(sums[tile][2 * pair], weights[tile][step], values[0], values[1]);
        ptx::multiply<T>(sums[tile][2 * pair + 1], weights[tile][step], values[2], values[3]);
      }
    }
}

}  // namespace scrimp::cuda::sparse_attention
