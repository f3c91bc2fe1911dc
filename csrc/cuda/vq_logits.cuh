// vq_logits, the kernel: every token takes the scores of its codes, which a block first copies to shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace scrimp::cuda::vq_logits {

struct Arguments {
  const void* scores;    // [M, K], contiguous
  const int32_t* codes;  // [levels, V], contiguous
  const void* bias;      // [V], or null
  void* logits;          // [M, V], contiguous
  int64_t M, K, V, levels;
  int64_t rows = 0;     // of a block
  uint32_t blocks = 0;  // of tokens
};

constexpr int kThreads = 256;
constexpr int kRows = 4;                // of a block at most: codes are read once for all of them
constexpr int64_t kShared = 16 * 1024;  // bytes of scores

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

// `count` numbers in shared memory.
template <class T>
__device__ const T* copied(const T* from, int count) {
  __shared__ alignas(16) T to[kShared / sizeof(T)];
  constexpr int kWidth = 16 / sizeof(T);
  const int vectors = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / kWidth : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  for (int i = vectors * kWidth + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  __syncthreads();
  return to;
}

// Launched with blocks x ceil(M / rows) blocks of kThreads; K is not 0. With kWidth 4 V and pointers fit vectors of 16
// bytes of codes, and the scores of `rows` rows the shared memory. The logits of a token with a code that is no row of
// the codebook are NaN.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) vq_logits_kernel(const __grid_constant__ Arguments p) {
  const int64_t v = (static_cast<int64_t>(blockIdx.x % p.blocks) * kThreads + threadIdx.x) * kWidth;
  const int64_t first = blockIdx.x / p.blocks * p.rows;
  const int rows = static_cast<int>(min(p.rows, p.M - first));
  const T* scores = static_cast<const T*>(p.scores) + first * p.K;
  if constexpr (kWidth > 1) scores = copied(scores, rows * static_cast<int>(p.K));
  if (v >= p.V) return;
  float total[kRows][kWidth] = {};
  for (int64_t level = 0; level < p.levels; ++level) {
    const auto codes = *reinterpret_cast<const Vector<int32_t, kWidth>*>(p.codes + level * p.V + v);
    bool known[kWidth];
    int32_t at[kWidth];  // loads without a condition go on together
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      known[i] = codes.x[i] >= 0 && codes.x[i] < p.K;
      at[i] = known[i] ? codes.x[i] : 0;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float score = static_cast<float>(scores[r * p.K + at[i]]);
        total[r][i] += known[i] ? score : NAN;
      }
    }
  }
  if (p.bias) {
    const auto bias = *reinterpret_cast<const Vector<T, kWidth>*>(static_cast<const T*>(p.bias) + v);
#pragma unroll
    for (int i = 0; i < kRows * kWidth; ++i) total[i / kWidth][i % kWidth] += static_cast<float>(bias.x[i % kWidth]);
  }
  auto* logits = static_cast<Vector<T, kWidth>*>(p.logits) + (first * p.V + v) / kWidth;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Vector<T, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rounded.x[i] = T(total[r][i]);
    if (r < rows) logits[r * (p.V / kWidth)] = rounded;
  }
}

}  // namespace scrimp::cuda::vq_logits
