// The best of a row's scores, with noise or without, and the token that has it: of a block's tokens, then of all
// blocks.
#pragma once

#include <cstdint>

#include "common/gumbel.h"

namespace scrimp::cuda {

// The best score of a chunk and the least token that has it; NaN where a score is NaN.
struct alignas(16) Best {
  double value;
  int64_t token;
};

constexpr unsigned kAll = 0xFFFFFFFF;

// The noise in single precision, to within kRough: the errors of __logf and log1pf sum to less than 2^-16.
constexpr float kRough = 0x1p-12f;
__device__ __forceinline__ float rough_gumbel(uint64_t bits) {
  constexpr uint64_t kLast = (uint64_t{1} << 52) - 1;
  const float below = (static_cast<float>(bits) + 0.5f) * 0x1p-52f;  // u, and 1 - u where u is nearer to 1
  const float above = (static_cast<float>(kLast - bits) + 0.5f) * 0x1p-52f;
  return -__logf(bits <= kLast / 2 ? -__logf(below) : -log1pf(-above));
}

__device__ __forceinline__ bool better(const Best& a, const Best& b) {
  return (a.value > b.value) | ((a.value == b.value) & (a.token < b.token));
}

__device__ __forceinline__ Best best_of_warp(Best mine) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    const Best other = {__shfl_xor_sync(kAll, mine.value, distance), __shfl_xor_sync(kAll, mine.token, distance)};
    if (better(other, mine)) mine = other;
  }
  return mine;
}

// Of a block's scores, with noise if `noisy`; known to the threads of the first warp. A thread's tokens ascend.
template <int kThreads, int kScores, class TokenOf>
__device__ __forceinline__ Best best_of_block(const float (&score)[kScores], bool noisy, uint64_t key,
                                              TokenOf token_of) {
  __shared__ float bounds[kThreads / 32];
  __shared__ Best bests[kThreads / 32];
  Best best = {-INFINITY, 0};
  bool wild = false;
  if (noisy) {
    // Noise in double precision is dear: only scores that may be the best after rough noise get it.
    float noise[kScores], bound = -INFINITY;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      noise[i] = rough_gumbel(noise_bits(key, token_of(i)));
      bound = fmaxf(bound, __fadd_rd(score[i], noise[i] - kRough));
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) bound = fmaxf(bound, __shfl_xor_sync(kAll, bound, distance));
    if (threadIdx.x % 32 == 0) bounds[threadIdx.x / 32] = bound;
    __syncthreads();
    for (const float other : bounds) bound = fmaxf(bound, other);
    uint32_t left = 0;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      wild |= score[i] != score[i];
      const float high = __fadd_ru(score[i], noise[i] + kRough);
      left |= static_cast<uint32_t>(high >= bound && high > -INFINITY) << i;
    }
    for (; left; left &= left - 1) {
      const int chosen = __ffs(left) - 1;
      float own = 0;
#pragma unroll
      for (int i = 0; i < kScores; ++i) own = i == chosen ? score[i] : own;
      const double value = own + gumbel(noise_bits(key, token_of(chosen)));
      if (value > best.value) best = {value, token_of(chosen)};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      wild |= score[i] != score[i];
      if (score[i] > best.value) best = {score[i], token_of(i)};
    }
  }

  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  wild = __syncthreads_or(wild);
  best = best_of_warp(threadIdx.x < kThreads / 32 ? bests[threadIdx.x] : Best{-INFINITY, 0});
  if (wild) best.value = NAN;
  return best;
}

// The token of a row by the best of its chunks, for a warp; -1 where a score is NaN or nothing is above -inf.
__device__ __forceinline__ int64_t token_of_row(const Best* of_chunks, int64_t chunks) {
  Best best = {-INFINITY, 0};
  bool wild = false;
#pragma unroll 1
  for (int64_t c = threadIdx.x % 32; c < chunks; c += 32) {
    const Best other = of_chunks[c];
    wild |= other.value != other.value;
    if (better(other, best)) best = other;
  }
  best = best_of_warp(best);
  return __any_sync(kAll, wild) || best.value == -INFINITY ? -1 : best.token;
}

}  // namespace scrimp::cuda
