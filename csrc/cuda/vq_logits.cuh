// vq_logits, the kernel: every token takes the scores of its codes, which a block first copies to shared memory.
#pragma once

#include <cstdint>

#include "common/vq_tokens.cuh"

namespace scrimp::cuda::vq_logits {

struct Arguments {
  VqTokens tokens;
  const void* scores;  // [M, K], contiguous
  void* logits;        // [M, V], contiguous
  int64_t M;
  int64_t rows = 0;     // of a block
  uint32_t blocks = 0;  // of tokens
};

constexpr int kThreads = 256;
constexpr int kRows = 4;  // of a block at most: codes are read once for all of them

// Launched with blocks x ceil(M / rows) blocks of kThreads; K is not 0. With kWidth 4 V and pointers fit vectors of 16
// bytes of codes, and the scores of `rows` rows the shared memory.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) vq_logits_kernel(const __grid_constant__ Arguments p) {
  const int64_t K = p.tokens.K, V = p.tokens.V;
  const int64_t v = (static_cast<int64_t>(blockIdx.x % p.blocks) * kThreads + threadIdx.x) * kWidth;
  const int64_t first = blockIdx.x / p.blocks * p.rows;
  const int rows = static_cast<int>(min(p.rows, p.M - first));
  const T* scores = static_cast<const T*>(p.scores) + first * K;
  if constexpr (kWidth > 1) scores = copied<T, kThreads>(scores, rows * static_cast<int>(K));
  if (v >= V) return;
  float total[kRows][kWidth] = {};
  add_scores(total, p.tokens, scores, rows, v);
  auto* logits = static_cast<Vector<T, kWidth>*>(p.logits) + (first * V + v) / kWidth;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Vector<T, kWidth> rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rounded.x[i] = T(total[r][i]);
    if (r < rows) logits[r * (V / kWidth)] = rounded;
  }
}

}  // namespace scrimp::cuda::vq_logits
