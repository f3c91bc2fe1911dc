// int4_linear, the kernel: tiles of y^T = W x^T on tensor cores, the codes straight from their canonical bytes.
//
// A word of 32 bits holds 8 columns of a row of W. Shifted by 4 i and masked, it leaves columns i and 4 + i in its
// halves, which under an exponent are two 16-bit floats `base + q`. A product sums over columns in any order, as long
// as W and x agree on it: thread t of the four that share a row takes columns 8 t to 8 t + 7 of every 32, and of x,
// too, column i beside column 4 + i. So nothing is shuffled beforehand, and groups of 32 columns and more are sums of
// whole products: D is exact in the codes, and scale and zero meet it in fp32.
//
// Each of the four warps takes every fourth block of 128 columns, through a ring of its own that asynchronous copies
// fill: the loop has no barrier. The four sums are added at the end in one order. A row's bits depend neither on the
// tile nor on the other rows, for every tile does the same operations in the same order for it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/float_type.h"
#include "common/int4.h"
#include "common/ptx.cuh"

namespace scrimp::cuda::int4_linear {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlock = 128, kBlockBytes = kBlock / 2;  // columns of a warp's turn, bytes of their codes in a row

// What a code q stands for: (q - 8) s, (q - 8) s + what a zero adds, c[q] s.
struct Plain {};
struct Zeros {};
struct Codebook {};

struct Arguments {
  const void* x;               // [M, K], rows x_stride elements apart; each starts at a multiple of 16 bytes
  const uint8_t* codes;        // [N, K / 2], at a multiple of 16 bytes; K is a multiple of 32
  const void *scales, *zeros;  // [N, groups]
  const int8_t* codebook;      // [16]
  const void* bias;            // [N], or null
  void* out;                   // [M, N]
  int64_t x_stride;
  int M, N, K, groups;
  int words;                  // 32 columns each that share a scale, as a power of two: 0, 1, or 2 for 128 and more
  int groups_of_block;        // 0 where a row is one group
  int chunk = 0;              // blocks whose scales are in shared memory at a time, a multiple of kWarps
  uint32_t chunk_groups = 0;  // of these blocks, at most kGroups
  int tiles = 0;              // of rows of x
  FloatType scale_type;
  Int4Zeros kind;
  bool byte_zeros;
};

// 16 kRows_ outputs by 8 kTokens_ rows of x. Codes are asked for kStages_ - 1 blocks ahead, x for kAhead_ times 32
// columns; kGroups_ scales of an output are in shared memory at a time.
template <int kRows_, int kTokens_, int kStages_, int kAhead_, int kGroups_, int kResident_>
struct Tile {
  static constexpr int kRows = kRows_, kTokens = kTokens_, kStages = kStages_, kAhead = kAhead_, kResident = kResident_;
  static constexpr int kOutputs = 16 * kRows, kStageBytes = kOutputs * kBlockBytes;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kGroups = kGroups_, kPitch = kGroups + 1;  // of scales: rows begin in different banks
  static constexpr int kSumPitch = kOutputs + 4;                  // of sums: rows of x 2 apart are 8 banks apart
  static_assert(kWarps * 8 * kTokens * kSumPitch * 4 <= kRingBytes, "the sums take the ring's place");
};

// Of few rows of x many small tiles of outputs keep a GPU busy; of more rows larger tiles read x less often.
struct Few : Tile<1, 1, 8, 4, 128, 4> {};
struct Some : Tile<2, 2, 6, 4, 64, 3> {};
struct Many : Tile<4, 4, 3, 2, 64, 2> {};

template <class T>
struct Pair;

template <>
struct Pair<__half> {
  using Is = __half2;
  static constexpr uint32_t kBase = 0x64006400, kCentre = 0x64086408, kOnes = 0x3c003c00;  // 1024, 1032, 1
};

template <>
struct Pair<__nv_bfloat16> {
  using Is = __nv_bfloat162;
  static constexpr uint32_t kBase = 0x43004300, kCentre = 0x43084308, kOnes = 0x3f803f80;  // 128, 136, 1
};

// The codes in bits 0 to 3 and 16 to 19 of a word as a pair of T: exact.
template <class T, class Form>
struct Codes {
  __device__ explicit Codes(const int8_t*) {}
  __device__ uint32_t operator()(uint32_t word) const {
    using Is = typename Pair<T>::Is;
    const uint32_t based = (word & 0x000f000f) | Pair<T>::kBase, centre = Pair<T>::kCentre;
    const Is pair = __hsub2(reinterpret_cast<const Is&>(based), reinterpret_cast<const Is&>(centre));
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Lanes i and 16 + i hold entry i; a shuffle looks at the lowest five bits of a lane's number.
template <class T>
struct Codes<T, Codebook> {
  uint32_t entry;
  __device__ explicit Codes(const int8_t* codebook) {
    const T value = T(static_cast<float>(codebook[threadIdx.x % 16]));
    entry = reinterpret_cast<const uint16_t&>(value);
  }
  __device__ uint32_t operator()(uint32_t word) const {
    const uint32_t low = __shfl_sync(~0u, entry, word), high = __shfl_sync(~0u, entry, word >> 16);
    return low | high << 16;
  }
};

__device__ inline float number(const void* from, int64_t at, FloatType type) {
  if (type == FloatType::fp32) return static_cast<const float*>(from)[at];
  if (type == FloatType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
  return __half2float(static_cast<const __half*>(from)[at]);
}

// A group's scale s, and with zeros what multiplies the sum of its inputs, too:
// (q - z) s = (q - 8) s + (8 - z) s, and q s + z = (q - 8) s + (8 s + z).
template <class Form>
using Scale = std::conditional_t<std::is_same_v<Form, Zeros>, float2, float>;

__device__ inline void load_scale(const Arguments& p, int64_t at, float& to) {
  to = number(p.scales, at, p.scale_type);
}
__device__ inline void load_scale(const Arguments& p, int64_t at, float2& to) {
  const float s = number(p.scales, at, p.scale_type);
  const float z = p.byte_zeros ? static_cast<const uint8_t*>(p.zeros)[at] : number(p.zeros, at, p.scale_type);
  to = {s, p.kind == Int4Zeros::offset ? fmaf(8.0f, s, z) : (8.0f - z) * s};
}

__device__ inline float scale_of(float scale) { return scale; }
__device__ inline float scale_of(float2 scale) { return scale.x; }

// Bytes of shared memory: the ring, then scales [outputs][kPitch].
template <class Form, class Tile>
constexpr int kShared = Tile::kRingBytes + Tile::kOutputs * Tile::kPitch * static_cast<int>(sizeof(Scale<Form>));

// Launched with tiles of outputs x p.tiles blocks.
template <class T, class Form, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) int4_linear_kernel(const __grid_constant__ Arguments p) {
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens, kStages = Tile::kStages, kAhead = Tile::kAhead;
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const scales = reinterpret_cast<Scale<Form>*>(memory + Tile::kRingBytes);
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  const int first_n = blockIdx.x / p.tiles * Tile::kOutputs, first_m = blockIdx.x % p.tiles * 8 * kTokens;
  const int tokens = min(8 * kTokens, p.M - first_m);
  const int blocks = (p.K + kBlock - 1) / kBlock, bytes_of_row = p.K / 2;
  unsigned char* const ring = memory + warp * kStages * Tile::kStageBytes;
  const int swizzle = row / 2;  // the four pieces of a row of codes change places, so that 8 rows meet in no bank
  const Codes<T, Form> codes(p.codebook);

  // A block's codes, 8 rows at a time; zeros behind the ends.
  const uint8_t* const from = p.codes + static_cast<int64_t>(first_n + row) * bytes_of_row + 16 * part;
  const auto request = [&](int block, int stage) {
    unsigned char* const to = ring + stage * Tile::kStageBytes + row * kBlockBytes + 16 * (part ^ swizzle);
#pragma unroll
    for (int i = 0; i < Tile::kOutputs / 8; ++i) {
      const bool there = first_n + 8 * i + row < p.N && block * kBlock + 32 * part < p.K;
      const int64_t at = static_cast<int64_t>(8 * i) * bytes_of_row + block * kBlockBytes;
      ptx::copy_async(to + 8 * i * kBlockBytes, from + at, there);
    }
    ptx::commit_copies();
  };

  // 8 columns of x from `column` + 8 part on; zeros behind the ends.
  const T* const x = static_cast<const T*>(p.x) + (first_m + row) * p.x_stride + 8 * part;
  const auto load_inputs = [&](uint4(&to)[kTokens], int column) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      to[i] = 8 * i + row < tokens && column < p.K
                  ? __ldg(reinterpret_cast<const uint4*>(x + 8 * i * p.x_stride + column))
                  : uint4{};
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) request(warp + i * kWarps, i);
  uint4 inputs[kAhead][kTokens];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_inputs(inputs[i], warp * kBlock + 32 * i);

  float total[kRows][kTokens][4] = {};
  int stage = 0;
  for (int first = 0; first < blocks; first += p.chunk) {
    const int first_group = first * p.groups_of_block;
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < Tile::kOutputs * p.chunk_groups; i += kThreads) {
      const int n = i / p.chunk_groups, group = i % p.chunk_groups;
      Scale<Form> scale = {};
      if (first_n + n < p.N && first_group + group < p.groups)
        load_scale(p, static_cast<int64_t>(first_n + n) * p.groups + first_group + group, scale);
      scales[n * Tile::kPitch + group] = scale;
    }
    __syncthreads();

    for (int block = first + warp; block < min(first + p.chunk, blocks); block += kWarps) {
      ptx::wait_copies<kStages - 2>();
      __syncwarp();
      request(block + (kStages - 1) * kWarps, stage ? stage - 1 : kStages - 1);
      const unsigned char* const now = ring + stage * Tile::kStageBytes + row * kBlockBytes + 4 * part;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      float d[kRows][kTokens][4] = {}, ones[kTokens][4] = {};  // of a group: codes times inputs, and inputs
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t words[kRows][2];
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i)
          words[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(now + 8 * i * kBlockBytes + 16 * (j ^ swizzle));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[kRows][4];
#pragma unroll
          for (int i = 0; i < 4 * kRows; ++i)
            a[i / 4][i % 4] = codes(words[i / 4][i % 2] >> (8 * half + i % 4 / 2 * 4));
#pragma unroll
          for (int i = 0; i < kTokens; ++i) {
            if (8 * i >= tokens) break;
            const uint4& v = inputs[j % kAhead][i];
            const uint32_t low = half ? v.y : v.x, high = half ? v.w : v.z;
            const uint32_t b0 = __byte_perm(low, high, 0x5410), b1 = __byte_perm(low, high, 0x7632);
#pragma unroll
            for (int r = 0; r < kRows; ++r) ptx::multiply<T>(d[r][i], a[r], b0, b1);
            if constexpr (std::is_same_v<Form, Zeros>) {
              constexpr uint32_t kOnes = Pair<T>::kOnes, all[4] = {kOnes, kOnes, kOnes, kOnes};
              ptx::multiply<T>(ones[i], all, b0, b1);
            }
          }
        }
        load_inputs(inputs[j % kAhead], (block + (j + kAhead) / 4 * kWarps) * kBlock + (j + kAhead) % 4 * 32);
        if ((j + 1) % (1 << p.words)) continue;
        const auto* const scale_row =
            scales + row * Tile::kPitch + (block - first) * p.groups_of_block + (j >> p.words);
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) {
          const Scale<Form> scale = scale_row[8 * i * Tile::kPitch];
#pragma unroll
          for (int k = 0; k < 2 * kTokens; ++k) {
            float &sum = total[i / 2][k / 2][i % 2 * 2 + k % 2], &product = d[i / 2][k / 2][i % 2 * 2 + k % 2];
            if constexpr (std::is_same_v<Form, Zeros>) sum = fmaf(ones[k / 2][k % 2], scale.y, sum);
            sum = fmaf(product, scale_of(scale), sum);
            product = 0.0f;
          }
        }
#pragma unroll
        for (int i = 0; i < 4 * kTokens; ++i) ones[i / 4][i % 4] = 0.0f;
      }
    }
  }

  ptx::wait_copies<0>();
  __syncthreads();
  auto* const sums = reinterpret_cast<float*>(memory);  // [warp][token][output]
#pragma unroll
  for (int i = 0; i < 4 * kRows * kTokens; ++i) {
    const int r = i / (4 * kTokens), k = i / 4 % kTokens, c = i % 4;
    sums[((warp * kTokens + k) * 8 + 2 * part + c % 2) * Tile::kSumPitch + 16 * r + c / 2 * 8 + row] = total[r][k][c];
  }
  __syncthreads();
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < tokens * Tile::kOutputs; i += kThreads) {
    const int n = i % Tile::kOutputs, m = i / Tile::kOutputs;
    if (first_n + n >= p.N) continue;
    constexpr int kNext = 8 * kTokens * Tile::kSumPitch;
    const float* const sum = sums + m * Tile::kSumPitch + n;
    float y = (sum[0] + sum[kNext]) + (sum[2 * kNext] + sum[3 * kNext]);
    if (p.bias) y += static_cast<float>(static_cast<const T*>(p.bias)[first_n + n]);
    static_cast<T*>(p.out)[static_cast<int64_t>(first_m + m) * p.N + first_n + n] = T(y);
  }
}

}  // namespace scrimp::cuda::int4_linear
