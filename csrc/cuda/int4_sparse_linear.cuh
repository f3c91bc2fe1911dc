// int4_sparse_linear, the kernels: a warp adds up the codes of its listed channels, eight outputs a lane.
//
// As in sparse_linear a channel has its warp and its place in the order of additions, whatever else is listed. Codes
// come through a ring of the warp's own that asynchronous copies fill; 32 channels, which share their scales, are
// summed with whole codes, then scale and zero meet the sum.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float_type.h"
#include "common/int4.h"
#include "common/ptx.cuh"
#include "cuda/sparse_linear.parts.cuh"

namespace scrimp::cuda::int4_sparse_linear {

using sparse_linear::Ends;
using sparse_linear::kAll;
using sparse_linear::kChunk;
using sparse_linear::kHalf;
using sparse_linear::kThreads;
using sparse_linear::kWarps;
using sparse_linear::List;
using sparse_linear::Vector;

constexpr int kOutputs = 256, kRowBytes = kOutputs / 2;  // of a block, bytes of their codes of a channel
constexpr int kStage = 8, kStages = 4;                   // channels that are asked for together, such stages of a ring
constexpr int kRing = kStage * kStages * kRowBytes;      // bytes of a warp
constexpr int kGroups = kChunk / 32, kSlots = 276;       // scales of a chunk at most, of the outputs of a block

// What a code q stands for: (q - 8) s, (q - 8) s + what a zero adds, c[q] s.
struct Plain {};
struct Zeros {};
struct Codebook {};

template <class Form>
constexpr int kShared =
    kWarps * kRing + kGroups * kSlots * static_cast<int>(sizeof(float)) * (std::is_same_v<Form, Zeros> ? 2 : 1);

struct Arguments {
  const void* x;         // [M, K] in any strides
  const uint8_t* codes;  // [K, row_bytes], rows codes_k bytes apart, at multiples of 16
  const void *scales, *zeros;
  const void* codebook;  // [16]
  List list;
  Ends ends;
  float* sums;  // [chunks, M, N] where there are several chunks, else null
  int64_t x_m, x_k, codes_k, scales_g, zeros_g, M, K, chunks;
  int64_t group, row_bytes;  // group: 0 where all channels share a scale
  uint32_t row_tiles = 0, tiles = 0;
  FloatType type, scale_type;  // of x, bias and results; of scales, and of zeros that are no bytes
  Int4Zeros kind;
  bool byte_zeros, byte_codebook;
  bool wide_x, wide_scales;  // 16 bits each, in whole vectors
};

__device__ __forceinline__ float number(const void* from, int64_t at, FloatType type) {
  if (type == FloatType::fp32) return static_cast<const float*>(from)[at];
  if (type == FloatType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
  return __half2float(static_cast<const __half*>(from)[at]);
}

// Where number j of a lane lies among those of all outputs: lanes meet in no bank, and outputs one after the other in
// none either.
__device__ __forceinline__ int slot(int j, int lane) { return 32 * j + j % 4 + j / 4 * 16 + lane; }
// The same of an output: a lane's word holds outputs 4 a + i and 16 more of 32 r, a and r of its own.
__device__ __forceinline__ int slot_of(int output) {
  return slot(2 * (output % 4) + output / 16 % 2, output / 128 * 16 + output / 4 % 4 * 4 + output / 32 % 4);
}

// The rows' numbers in a chunk's channels, eight at once where they are whole vectors.
template <int kRows>
__device__ __forceinline__ void load_inputs(const Arguments& p, int64_t first_m, int64_t begin, int64_t end,
                                            Vector<float, kRows> (&inputs)[kChunk]) {
  const int each = p.wide_x ? 8 : 1, count = static_cast<int>(end - begin) / each;
  for (int i = threadIdx.x; i < count * kRows; i += kThreads) {
    const int r = i / count, k = i % count * each;
    const bool exists = first_m + r < p.M;
    const int64_t at = (first_m + r) * p.x_m + (begin + k) * p.x_k;
    if (p.wide_x) {
      const uint4 whole = exists ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.x) + at) : uint4{};
#pragma unroll
      for (int j = 0; j < 8; ++j) inputs[k + j].x[r] = number(&whole, j, p.type);
    } else {
      inputs[k].x[r] = exists ? number(p.x, at, p.type) : 0.0f;
    }
  }
}

// The scales of a chunk's groups, and what a zero adds to the sum of the inputs:
// (q - z) s = (q - 8) s + (8 - z) s, and q s + z = (q - 8) s + (8 s + z).
template <class Form>
__device__ __forceinline__ void load_scales(const Arguments& p, int64_t first_group, int groups, int64_t first_n,
                                            float (*scales)[kSlots], float (*zeros)[kSlots]) {
  for (int i = threadIdx.x; i < groups * (kOutputs / 8); i += kThreads) {
    const int g = i / (kOutputs / 8), output = i % (kOutputs / 8) * 8;
    const int64_t n = first_n + output, at = (first_group + g) * p.scales_g + n;
    float some[8];
    if (p.wide_scales && n < p.ends.N) {
      const uint4 whole = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.scales) + at);
#pragma unroll
      for (int j = 0; j < 8; ++j) some[j] = number(&whole, j, p.scale_type);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) some[j] = n + j < p.ends.N ? number(p.scales, at + j, p.scale_type) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) scales[g][slot_of(output + j)] = some[j];
    if constexpr (std::is_same_v<Form, Zeros>) {
      const int64_t zero = (first_group + g) * p.zeros_g + n;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float z = 0.0f;
        if (n + j < p.ends.N)
          z = p.byte_zeros ? static_cast<const uint8_t*>(p.zeros)[zero + j] : number(p.zeros, zero + j, p.scale_type);
        zeros[g][slot_of(output + j)] = p.kind == Int4Zeros::offset ? fmaf(8.0f, some[j], z) : (8.0f - z) * some[j];
      }
    }
  }
}

__device__ __forceinline__ void finish(const Arguments& p, int64_t m, int64_t n, float total) {
  if (p.type == FloatType::fp32) return sparse_linear::finish<float>(p.ends, m, n, total);
  if (p.type == FloatType::bf16) return sparse_linear::finish<__nv_bfloat16>(p.ends, m, n, total);
  sparse_linear::finish<__half>(p.ends, m, n, total);
}

// Launched with row_tiles x tiles x chunks blocks of kThreads.
template <class Form, int kRows>
__global__ void __launch_bounds__(kThreads) int4_sparse_linear_kernel(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Vector<float, kRows> inputs[kChunk];
  __shared__ bool listed[kChunk];
  __shared__ uint16_t order[kWarps][64];  // listed channels of a warp
  __shared__ float table[16];
  auto* const scales = reinterpret_cast<float (*)[kSlots]>(memory + kWarps * kRing);
  auto* const zeros = scales + kGroups;
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % p.row_tiles) * kRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / p.row_tiles % p.tiles) * kOutputs;
  const int64_t chunk = blockIdx.x / p.row_tiles / p.tiles, begin = chunk * kChunk, end = min(begin + kChunk, p.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  load_inputs(p, first_m, begin, end, inputs);
  if constexpr (std::is_same_v<Form, Codebook>) {
    if (threadIdx.x < 16)
      table[threadIdx.x] = p.byte_codebook ? static_cast<const int8_t*>(p.codebook)[threadIdx.x]
                                           : static_cast<const float*>(p.codebook)[threadIdx.x];
  }
  const int64_t first_group = p.group ? begin / p.group : 0;
  const int groups = p.group ? static_cast<int>((end - begin + p.group - 1) / p.group) : 1;
  load_scales<Form>(p, first_group, groups, first_n, scales, zeros);
  sparse_linear::find(p.list, begin, end, listed);
  __syncthreads();

  const uint64_t own = sparse_linear::own_channels(listed);
  const uint32_t masks[] = {static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32)};
  const int lows = __popc(masks[0]), count = lows + __popc(masks[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (masks[half] >> lane & 1)
      order[warp][half * lows + __popc(masks[half] & ((1u << lane) - 1))] = half * kHalf + 32 * warp + lane;
  __syncwarp();

  // Asks for the codes of eight channels, four at a time; zeros behind the ends.
  unsigned char* const ring = memory + warp * kRing;
  const int piece = lane % 8 * 16;
  const bool inside = first_n / 2 + piece < p.row_bytes;
  const uint8_t* const codes = p.codes + begin * p.codes_k + first_n / 2 + piece;
  const auto fetch = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kStage; i += 4) {
      const int entry = stage * kStage + i + lane / 8;
      if (entry < count)
        ptx::copy_async(ring + entry % (kStage * kStages) * kRowBytes + piece,
                        inside ? codes + order[warp][entry] * p.codes_k : p.codes, inside);
    }
    ptx::commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  float total[kRows][8] = {};
  int entry = 0;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float sums[kRows][8] = {}, all[kRows] = {};
#pragma unroll 1
    for (const int last = half ? count : lows; entry < last; ++entry) {
      if (entry % kStage == 0) {
        ptx::wait_copies<kStages - 2>();
        __syncwarp();  // all lanes' copies are there, and all are done with the stage that is filled now
        fetch(entry / kStage + kStages - 1);
      }
      const uint32_t word =
          *reinterpret_cast<const uint32_t*>(ring + entry % (kStage * kStages) * kRowBytes + 4 * lane);
      const Vector<float, kRows> x = inputs[order[warp][entry]];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float code;
        if constexpr (std::is_same_v<Form, Codebook>)
          code = table[word >> 4 * j & 15];
        else  // 2^23 + q, less 2^23 + 8
          code = __uint_as_float(ptx::and_xor(word >> 4 * j, 15, 0x4B000000)) - 8388616.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][j] = fmaf(x.x[r], code, sums[r][j]);
      }
      if constexpr (std::is_same_v<Form, Zeros>) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) all[r] += x.x[r];
      }
    }
    const int64_t channel = begin + half * kHalf + 32 * warp;
    if (channel >= end) break;
    const int g = p.group ? static_cast<int>(channel / p.group - first_group) : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float s = scales[g][slot(j, lane)];
#pragma unroll
      for (int r = 0; r < kRows; ++r) total[r][j] = fmaf(s, sums[r][j], total[r][j]);
      if constexpr (std::is_same_v<Form, Zeros>) {
        const float z = zeros[g][slot(j, lane)];
#pragma unroll
        for (int r = 0; r < kRows; ++r) total[r][j] = fmaf(z, all[r], total[r][j]);
      }
    }
  }
  ptx::wait_copies<0>();
  __syncwarp();

  // The warps' sums in their order, a row at a time, where their codes were.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t m = first_m + r, n = first_n + threadIdx.x;
    if (m >= p.M) break;
    const int place = r % 2 * kSlots;
#pragma unroll
    for (int j = 0; j < 8; ++j) reinterpret_cast<float*>(ring)[place + slot(j, lane)] = total[r][j];
    __syncthreads();
    if (n >= p.ends.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      sum += reinterpret_cast<const float*>(memory + w * kRing)[place + slot_of(threadIdx.x)];
    if (p.sums)
      p.sums[(chunk * p.M + m) * p.ends.N + n] = sum;
    else
      finish(p, m, n, sum);
  }
}

// Launched with a thread for each number of the result.
inline __global__ void __launch_bounds__(kThreads) int4_sparse_linear_sums_kernel(const __grid_constant__ Arguments p) {
  if (p.type == FloatType::fp32)
    sparse_linear::add_chunks<float>(p.sums, p.chunks, p.M, p.ends);
  else if (p.type == FloatType::bf16)
    sparse_linear::add_chunks<__nv_bfloat16>(p.sums, p.chunks, p.M, p.ends);
  else
    sparse_linear::add_chunks<__half>(p.sums, p.chunks, p.M, p.ends);
}

}  // namespace scrimp::cuda::int4_sparse_linear
