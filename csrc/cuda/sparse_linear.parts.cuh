// Products with listed channels, what their kernels share: the channels of a chunk, and the chunks' sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace scrimp::cuda::sparse_linear {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kChunk = 512;         // channels of a thread block
constexpr int kTogether = 3;        // entries of the list that a thread asks for together
constexpr int kProbes = 64;         // entries of the list that are looked at first
constexpr int kHalf = 32 * kWarps;  // channels of a chunk between the two blocks of 32 that a warp takes
constexpr unsigned kAll = 0xFFFFFFFF;

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T x[kWidth];
};

// The first `count` of `capacity` entries are channels that ascend.
struct List {
  const int32_t *index, *count;
  int64_t stride, capacity;
};

// What becomes of sums: out [M, N] = their total + bias + residual.
struct Ends {
  const void *bias, *residual;  // [N], [M, N]; or null
  void* out;
  int64_t residual_m, N;
};

// listed: which of the kChunk channels from `begin` to `end` are in the list. All threads call it; a barrier must
// follow. The probes tell between which of them the first such entry lies.
__device__ __forceinline__ void find(const List& list, int64_t begin, int64_t end, bool (&listed)[kChunk]) {
  const int64_t apart = (list.capacity + kProbes - 1) / kProbes, probe = threadIdx.x * apart;
  const bool probes = threadIdx.x < kProbes && probe < list.capacity;
  const int32_t probed = probes ? list.index[probe * list.stride] : 0;
  const int64_t total = min(static_cast<int64_t>(*list.count), list.capacity);
#pragma unroll
  for (int i = 0; i < kChunk; i += kThreads) listed[i + threadIdx.x] = false;
  const int below = __syncthreads_count(probes && probe < total && probed < begin);
  const int64_t first = max(below - 1, 0) * apart, last = min(first + apart + kChunk, total);
#pragma unroll 1
  for (int64_t i = first + threadIdx.x; i < last; i += kTogether * kThreads) {
    int32_t channels[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t entry = i + j * kThreads;
      channels[j] = entry < last ? list.index[entry * list.stride] : -1;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (channels[j] >= begin && channels[j] < end) listed[channels[j] - begin] = true;
  }
}

// The listed channels of the warp as bits: bit b is number place(b) of the chunk. Two blocks of 32, half a chunk apart,
// keep warps alike where listed channels lie together.
__device__ __forceinline__ uint64_t own_channels(const bool (&listed)[kChunk]) {
  const uint32_t low = __ballot_sync(kAll, listed[threadIdx.x]),
                 high = __ballot_sync(kAll, listed[kHalf + threadIdx.x]);
  return static_cast<uint64_t>(high) << 32 | low;
}
__device__ __forceinline__ int place(int bit) {
  return static_cast<int>(threadIdx.x / 32 * 32) + bit + (bit & 32) / 32 * (kHalf - 32);
}

template <class T>
__device__ __forceinline__ void finish(const Ends& ends, int64_t m, int64_t n, float total) {
  if (ends.bias) total += static_cast<float>(static_cast<const T*>(ends.bias)[n]);
  if (ends.residual) total += static_cast<float>(static_cast<const T*>(ends.residual)[m * ends.residual_m + n]);
  static_cast<T*>(ends.out)[m * ends.N + n] = T(total);
}

// Number `at` of a result of M x N from the sums [chunks, M, N], added up in order.
template <class T>
__device__ __forceinline__ void add_chunks(const float* sums, int64_t chunks, int64_t M, const Ends& ends) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, all = M * ends.N;
  if (at >= all) return;
  float total = 0.0f;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * all + at];
  finish<T>(ends, at / ends.N, at % ends.N, total);
}

}  // namespace scrimp::cuda::sparse_linear
