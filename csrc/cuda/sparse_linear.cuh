// sparse_linear, the kernels: a warp adds up its listed channels for the outputs of a tile, eight or four a lane.
//
// A channel has its warp, and its place in the order of additions, whatever else is listed; an unlisted one is skipped,
// which a product with 0 would not tell apart. So a row's bits depend on its own inputs alone. Chunks of channels are
// added up by a second kernel, where there are several.
#pragma once

#include "cuda/sparse_linear.parts.cuh"

namespace scrimp::cuda::sparse_linear {

struct Arguments {
  const void *x, *weight;  // [M, K] in any strides, [K, N]; channels of a weight begin at multiples of 16 bytes
  List list;
  Ends ends;
  float* sums;  // [chunks, M, N] where there are several chunks, else null
  int64_t x_m, x_k, weight_k, M, K, chunks;
  uint32_t row_tiles = 0, tiles = 0;  // of kRows rows, of the outputs of a warp
};

constexpr int kAhead = 8;  // channels whose weights are asked for together

template <class T>
constexpr int kWidth = 16 / sizeof(T);  // outputs of a lane
template <class T>
constexpr int kOutputs = 32 * kWidth<T>;

// Blocks of a multiprocessor at least: registers are no reason to spill.
template <int kRows>
constexpr int kResident = kRows == 1   ? 3
                          : kRows == 4 ? 2
                                       : 1;

// Launched with row_tiles x tiles x chunks blocks of kThreads.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kResident<kRows>)
    sparse_linear_kernel(const __grid_constant__ Arguments p) {
  constexpr int kQuad = kRows < 4 ? kRows : 4, kQuads = kRows / kQuad;
  __shared__ Vector<float, kQuad> inputs[kQuads][kChunk];
  __shared__ bool listed[kChunk];
  __shared__ float sums[2][kWarps][kWidth<T>][32 + 32 / kWidth<T>];  // lanes meet in no bank, either way
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % p.row_tiles) * kRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / p.row_tiles % p.tiles) * kOutputs<T>;
  const int64_t chunk = blockIdx.x / p.row_tiles / p.tiles, begin = chunk * kChunk, end = min(begin + kChunk, p.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

#pragma unroll
  for (int step = 0; step < kChunk; step += kThreads) {
    const int i = step + threadIdx.x;
    if (begin + i >= end) break;
    const T* x = static_cast<const T*>(p.x) + first_m * p.x_m + (begin + i) * p.x_k;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      Vector<float, kQuad> some;
#pragma unroll
      for (int r = 0; r < kQuad; ++r) {
        const int64_t m = quad * kQuad + r;
        some.x[r] = first_m + m < p.M ? static_cast<float>(x[m * p.x_m]) : 0.0f;
      }
      inputs[quad][i] = some;
    }
  }
  find(p.list, begin, end, listed);
  __syncthreads();

  float total[kRows][kWidth<T>] = {};
  const int64_t n = first_n + lane * kWidth<T>;
  uint64_t left = own_channels(listed);
  if (n < p.ends.N) {
    const T* weight = static_cast<const T*>(p.weight) + begin * p.weight_k + n;
    while (left) {
      int at[kAhead];
      uint4 some[kAhead];  // zeros where none is left
      bool is[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        is[i] = left != 0;
        at[i] = is[i] ? place(__ffsll(left) - 1) : 0;
        left &= left - 1;
        some[i] = is[i] ? *reinterpret_cast<const uint4*>(weight + at[i] * p.weight_k) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const T* own = reinterpret_cast<const T*>(&some[i]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float x = is[i] ? inputs[r / kQuad][at[i]].x[r % kQuad] : 0.0f;
#pragma unroll
          for (int j = 0; j < kWidth<T>; ++j) total[r][j] = fmaf(x, static_cast<float>(own[j]), total[r][j]);
        }
      }
    }
  }

  // The warps' sums in their order, a row at a time.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t m = first_m + r, own = first_n + threadIdx.x;
    if (m >= p.M) break;
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) sums[r % 2][warp][j][lane] = total[r][j];
    __syncthreads();
    if (threadIdx.x >= kOutputs<T> || own >= p.ends.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[r % 2][w][threadIdx.x % kWidth<T>][threadIdx.x / kWidth<T>];
    if (p.sums)
      p.sums[(chunk * p.M + m) * p.ends.N + own] = sum;
    else
      finish<T>(p.ends, m, own, sum);
  }
}

// Launched with a thread for each number of the result.
template <class T>
__global__ void __launch_bounds__(kThreads) sparse_linear_sums_kernel(const __grid_constant__ Arguments p) {
  add_chunks<T>(p.sums, p.chunks, p.M, p.ends);
}

}  // namespace scrimp::cuda::sparse_linear
