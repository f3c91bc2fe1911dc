// kv_compact, the kernel: a warp moves the rows of one head of one layer and sequence, in the order of the path.
#pragma once

#include <cstdint>

namespace scrimp::cuda::kv_compact {

struct Arguments {
  char* cache;           // [L, B, G, C, D]; strides in bytes, the last dimension is contiguous
  const int32_t* start;  // [B]
  const int32_t* path;   // [B, T], contiguous
  int64_t cache_l, cache_b, cache_g, cache_c, items, C, T;
  uint32_t B, G, vectors;  // vectors of kWidth bytes a row
};

constexpr int kWarps = 4;    // of a block; each has an item of its own
constexpr int kVectors = 8;  // of a lane, all loaded before one is stored

template <int kWidth>
struct alignas(kWidth) Vector {
  uint8_t bytes[kWidth];
};
template <>
struct Vector<16> {
  uint4 bytes;
};

// Launched with L x B x G items, kWarps a block. Row path[i] lies at or behind its place i and rows ascend, so what a
// warp stores lies before all that it has not loaded yet, but for the vectors that it holds.
template <int kWidth>
__global__ void __launch_bounds__(32 * kWarps) kv_compact_kernel(const __grid_constant__ Arguments p) {
  using Vec = Vector<kWidth>;
  constexpr unsigned kAll = 0xFFFFFFFF;
  const uint32_t lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= p.items) return;
  const int64_t b = item / p.G % p.B, first = p.start[b];
  const int64_t behind = first >= 0 ? p.C - first : 0;  // the first row that lies outside
  char* cache = p.cache + item / p.G / p.B * p.cache_l + b * p.cache_b + item % p.G * p.cache_g + first * p.cache_c;
  const int32_t* path = p.path + b * p.T;

  for (int64_t begin = 0; begin < p.T; begin += 32) {
    const int32_t row = begin + lane < p.T ? path[begin + lane] : -1;
    const uint32_t ended = __ballot_sync(kAll, row < 0);
    const uint32_t rows = ended ? __ffs(ended) - 1 : 32, count = rows * p.vectors;
    for (uint32_t done = 0; done < count; done += 32 * kVectors) {
      Vec held[kVectors];
      int64_t to[kVectors];  // negative where nothing moves
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const uint32_t at = done + 32 * k + lane, i = at / p.vectors;
        const int64_t place = begin + i, from = __shfl_sync(kAll, row, i);
        const int64_t offset = static_cast<int64_t>(at % p.vectors) * kWidth;
        const bool moves = at < count && from > place && from < behind;
        to[k] = moves ? place * p.cache_c + offset : -1;
        if (moves) held[k] = *reinterpret_cast<const Vec*>(cache + from * p.cache_c + offset);
      }
      __syncwarp();  // all lanes have loaded
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        if (to[k] >= 0) *reinterpret_cast<Vec*>(cache + to[k]) = held[k];
    }
    if (ended) return;
  }
}

}  // namespace scrimp::cuda::kv_compact
