// tree_accept, the kernels: every chunk of every row of a tree chooses at once, then a warp a sequence walks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/draw.cuh"

namespace scrimp::cuda::tree_accept {

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

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

// Launched with B x T x chunks blocks. Rows of no tree choose nothing.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) tree_accept_choose_kernel(const __grid_constant__ Choice p) {
  __shared__ struct {
    bool in_tree;
    float temperature;
    uint64_t key;
  } row;
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

  if (row.temperature > 0) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) score[i] = __fdiv_rn(score[i], row.temperature);
  }
  const Best best = best_of_block<kThreads>(score, row.temperature > 0, row.key, token_of);
  if (threadIdx.x == 0) p.best[blockIdx.x] = best;
}

// Launched with a warp a sequence.
__global__ void __launch_bounds__(32) tree_accept_walk_kernel(const __grid_constant__ Walk p) {
  const int64_t b = blockIdx.x, lane = threadIdx.x;
  const int32_t* parents = p.parents + b * p.T;
  const int64_t* tokens = p.tokens + b * p.T;
  int64_t depth = 0;
  for (int64_t node = 0; node < p.T; ++depth) {
    const int64_t token = token_of_row(p.best + (b * p.T + node) * p.chunks, p.chunks);
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
