// merge_attention, the kernel: out = w_a out_a + w_b out_b with w = exp(lse_side - lse), a tile of rows per block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace scrimp::cuda::merge_attention {

// Elements from index to index; the last dimension is contiguous.
struct Strides {
  int64_t b, h, n;
};

struct Arguments {
  const void *out_a, *out_b;   // [B, H, N, D]
  const float *lse_a, *lse_b;  // [B, H, N]
  void* out;                   // [B, N, H, D], contiguous
  float* lse;                  // [B, H, N], contiguous
  Strides out_a_strides, out_b_strides, lse_a_strides, lse_b_strides;
  int64_t N;
  uint32_t H, tiles = 0, vectors = 0;  // tiles a head; vectors of kWidth elements a row
};

constexpr int kThreads = 256;  // at most; blockDim is (vectors, rows)
constexpr int kRows = 2;       // of a thread, all loaded before any is merged

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

// Launched with H x B x tiles blocks; a tile is blockDim.y * kRows rows. Pointers and strides fit Vector<T, kWidth>.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) merge_attention_kernel(const __grid_constant__ Arguments p) {
  using Vec = Vector<T, kWidth>;
  __shared__ float2 weights[kThreads * kRows];
  const uint32_t tile = blockIdx.x % p.tiles, head = blockIdx.x / p.tiles;
  const int64_t b = head / p.H, h = head % p.H;
  const int64_t first = static_cast<int64_t>(tile) * blockDim.y * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(blockDim.y * kRows), p.N - first));

  const float* lse_a = p.lse_a + b * p.lse_a_strides.b + h * p.lse_a_strides.h + first * p.lse_a_strides.n;
  const float* lse_b = p.lse_b + b * p.lse_b_strides.b + h * p.lse_b_strides.h + first * p.lse_b_strides.n;
  float* lse = p.lse + (b * p.H + h) * p.N + first;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < rows; i += blockDim.x * blockDim.y) {
    const float a = lse_a[i * p.lse_a_strides.n], c = lse_b[i * p.lse_b_strides.n];
    // Sums of exponentials relative to the larger one; a row without keys on both sides keeps 0 and -inf.
    const float high = fmaxf(a, c), base = high == -INFINITY ? 0.0f : high;
    const float sum_a = expf(a - base), sum_b = expf(c - base), total = sum_a + sum_b;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    weights[i] = {sum_a * inverse, sum_b * inverse};
    lse[i] = base + logf(total);
  }
  __syncthreads();

  const T* out_a = static_cast<const T*>(p.out_a) + b * p.out_a_strides.b + h * p.out_a_strides.h;
  const T* out_b = static_cast<const T*>(p.out_b) + b * p.out_b_strides.b + h * p.out_b_strides.h;
  const int64_t D = static_cast<int64_t>(p.vectors) * kWidth;
  T* out = static_cast<T*>(p.out) + (b * p.N * p.H + h) * D;
  for (uint32_t v = threadIdx.x; v < p.vectors; v += blockDim.x) {
    const int64_t d = static_cast<int64_t>(v) * kWidth;
    Vec x[kRows], y[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = threadIdx.y + r * blockDim.y;
      if (i < rows) {
        x[r] = *reinterpret_cast<const Vec*>(out_a + (first + i) * p.out_a_strides.n + d);
        y[r] = *reinterpret_cast<const Vec*>(out_b + (first + i) * p.out_b_strides.n + d);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = threadIdx.y + r * blockDim.y;
      if (i < rows) {
        const float2 weight = weights[i];
        Vec merged;
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          merged.x[k] = T(weight.x * static_cast<float>(x[r].x[k]) + weight.y * static_cast<float>(y[r].x[k]));
        *reinterpret_cast<Vec*>(out + (first + i) * p.H * D + d) = merged;
      }
    }
  }
}

}  // namespace scrimp::cuda::merge_attention
