// tree_accept, the kernels: every chunk of every row of a tree chooses at once, then a warp a sequence walks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/gumbel.h"

namespace scrimp::cuda::tree_accept {

// The best score of a chunk and the least token that has it; NaN where a score is NaN.
struct alignas(16) Best {
  double value;
  int64_t token;
};

struct Choice {
  const void* logits;        // [B, T, V]; the last dimension is contiguous
  const int32_t* parents;    // [B, T], contiguous
  const float* temperature;  // [B]; not positive is 0
  const int64_t *seed, *position;
  Best* best;  // [B, T, chunks]
  int64_t logits_b, logits_t, T, V;
  uint32_t chunks;
};

struct Walk {
  const Best* best;        // [B, T, chunks]
  const int32_t* parents;  // [B, T], contiguous as all of these
  const int64_t* tokens;
  int32_t* path;
  int64_t* chosen;
  int64_t T, chunks;
};

constexpr int kThreads = 256, kScores = 16, kSpan = kThreads * kScores;  // scores of a thread and of a chunk
constexpr unsigned kAll = 0xFFFFFFFF;

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

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

// Launched with B x T x chunks blocks. Rows of no tree choose nothing.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) tree_accept_choose_kernel(const __grid_constant__ Choice p) {
  __shared__ struct {
    bool in_tree;
    float temperature;
    uint64_t key;
  } row;
  __shared__ float bounds[kThreads / 32];
  __shared__ Best bests[kThreads / 32];
  const int64_t node = blockIdx.x / p.chunks, b = node / p.T, t = node % p.T;
  if (threadIdx.x == 0) {
    int64_t above = t, depth = 0;
    while (above > 0) {
      const int64_t parent = p.parents[b * p.T + above];
      above = parent < above ? parent : -1;
      ++depth;
    }
    row.in_tree = above == 0;
    if (row.in_tree) {
      row.temperature = p.temperature[b];
      row.key = noise_key(p.seed[b], static_cast<uint64_t>(p.position[b]) + depth);
    }
  }
  __syncthreads();
  if (!row.in_tree) return;

  const T* logits = static_cast<const T*>(p.logits) + b * p.logits_b + t * p.logits_t;
  const int64_t first = static_cast<int64_t>(blockIdx.x % p.chunks) * kSpan + threadIdx.x * kWidth;
  const auto token_of = [&](int i) { return first + i / kWidth * (kThreads * kWidth) + i % kWidth; };
  float score[kScores];
#pragma unroll
  for (int i = 0; i < kScores; i += kWidth) {
    const int64_t v = token_of(i);
    if (v + kWidth <= p.V) {
      const auto loaded = *reinterpret_cast<const Vector<T, kWidth>*>(logits + v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) score[i + j] = static_cast<float>(loaded.x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) score[i + j] = v + j < p.V ? static_cast<float>(logits[v + j]) : -INFINITY;
    }
  }

  Best best = {-INFINITY, 0};
  bool wild = false;
  if (row.temperature > 0) {
    // Noise in double precision is dear: only scores that may be the best after rough noise get it.
    float noise[kScores], bound = -INFINITY;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      score[i] = __fdiv_rn(score[i], row.temperature);
      noise[i] = rough_gumbel(noise_bits(row.key, token_of(i)));
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
      left |= static_cast<uint32_t>(__fadd_ru(score[i], noise[i] + kRough) >= bound) << i;
    }
    for (; left; left &= left - 1) {
      const int chosen = __ffs(left) - 1;
      float own = 0;
#pragma unroll
      for (int i = 0; i < kScores; ++i) own = i == chosen ? score[i] : own;
      const double value = own + gumbel(noise_bits(row.key, token_of(chosen)));
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
  if (threadIdx.x >= 32) return;
  best = best_of_warp(threadIdx.x < kThreads / 32 ? bests[threadIdx.x] : Best{-INFINITY, 0});
  if (wild) best.value = NAN;
  if (threadIdx.x == 0) p.best[blockIdx.x] = best;
}

// Launched with a warp a sequence.
__global__ void __launch_bounds__(32) tree_accept_walk_kernel(const __grid_constant__ Walk p) {
  const int64_t b = blockIdx.x, lane = threadIdx.x;
  const int32_t* parents = p.parents + b * p.T;
  const int64_t* tokens = p.tokens + b * p.T;
  int64_t depth = 0;
  for (int64_t node = 0; node < p.T; ++depth) {
    Best best = {-INFINITY, 0};
    bool wild = false;
#pragma unroll 1
    for (int64_t c = lane; c < p.chunks; c += 32) {
      const Best other = p.best[(b * p.T + node) * p.chunks + c];
      wild |= other.value != other.value;
      if (better(other, best)) best = other;
    }
    best = best_of_warp(best);
    const int64_t token = __any_sync(kAll, wild) || best.value == -INFINITY ? -1 : best.token;
    if (lane == 0) {
      p.path[b * p.T + depth] = static_cast<int32_t>(node);
      p.chosen[b * p.T + depth] = token;
    }
    int64_t child = p.T;
    for (int64_t begin = node + 1; begin < p.T && child == p.T; begin += 32) {
      const int64_t t = begin + lane;
      const uint32_t found = __ballot_sync(kAll, t < p.T && parents[t] == node && tokens[t] == token);
      if (found) child = begin + __ffs(found) - 1;
    }
    node = child;
  }
#pragma unroll 1
  for (int64_t t = depth + lane; t < p.T; t += 32) {
    p.path[b * p.T + t] = -1;
    p.chosen[b * p.T + t] = -1;
  }
}

}  // namespace scrimp::cuda::tree_accept
