// vq_logits, vq_sample: the tokens' scores from those of their codes, which a block first copies to shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace scrimp::cuda {

struct VqTokens {
  const int32_t* codes;  // [levels, V], contiguous
  const void* bias;      // [V], or null
  int64_t K, V, levels;
};

constexpr int64_t kVqShared = 16 * 1024;  // bytes of scores

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

// `count` numbers in shared memory.
template <class T, int kThreads>
__device__ const T* copied(const T* from, int count) {
  __shared__ alignas(16) T to[kVqShared / sizeof(T)];
  constexpr int kWidth = 16 / sizeof(T);
  const int vectors = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / kWidth : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  for (int i = vectors * kWidth + threadIdx.x; i < count; i += kThreads) to[i] = from[i];
  __syncthreads();
  return to;
}

// Adds to `total` the sums of kWidth tokens from v on in `rows` rows of scores. Those of a token with a code that is no
// row of the codebook are NaN. K is not 0.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ void add_scores(float (&total)[kRows][kWidth], const VqTokens& p, const T* scores, int rows,
                                           int64_t v) {
#pragma unroll 1
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
}

}  // namespace scrimp::cuda
