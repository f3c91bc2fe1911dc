// int4_linear, the kernel: tiles of y^T = W x^T on tensor cores, the codes straight from their canonical bytes.
//
// A word of 32 bits holds 8 columns of a row of W. Shifted by 4 i and masked, it leaves columns i and 4 + i in its
// halves, which under an exponent are two 16-bit floats, `base + q` or, with inverted bits, `base - q`. A product sums
// over columns in any order, as long as W and x agree on it: thread t of the four that share a row takes columns 8 t to
// 8 t + 7 of every 32, and of x, too, column i beside column 4 + i. So nothing is shuffled beforehand, and groups of 32
// columns and more are sums of whole products: D is exact in the codes, and the scale meets it in fp32.
//
// Zeros of 8 bits go with the base: q - z is exact. Where zeros are floats, the last of the 16, 32 or 64 lines of a
// tile is no output but ones: its product is the sum of the inputs, which zeros multiply in fp32. A product for the sum
// alone would cost as much as 16 lines.
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

// What a code q stands for: (q - 8) s, (q - z) s with z of 8 bits, (q - 8) s + what a zero adds, c[q] s.
struct Plain {};
struct ByteZeros {};
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
  int last_word;              // of a group among those of a block, 32 columns each: 0, 1, or 3 for 128 and more
  int groups_of_block;        // 0 where a row is one group
  int chunk = 0;              // blocks whose scales are in shared memory at a time, a multiple of kWarps
  uint32_t chunk_groups = 0;  // of these blocks, at most kGroups
  int tiles = 0;              // of rows of x
  FloatType scale_type;
  Int4Zeros kind;
};

// 16 kRows_ lines of codes by 8 kTokens_ rows of x. Codes are asked for kStages_ - 1 blocks ahead, x for kAhead_ times
// 32 columns; kGroups_ scales of a line are in shared memory at a time.
template <int kRows_, int kTokens_, int kStages_, int kAhead_, int kGroups_, int kResident_>
struct Tile {
  static constexpr int kRows = kRows_, kTokens = kTokens_, kStages = kStages_, kAhead = kAhead_, kResident = kResident_;
  static constexpr int kLines = 16 * kRows, kStageBytes = kLines * kBlockBytes;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kGroups = kGroups_, kPitch = kGroups + 1;  // of scales: rows begin in different banks
  static constexpr int kSumPitch = kLines + 4;                    // of sums: rows of x 2 apart are 8 banks apart
  static_assert(kWarps * 8 * kTokens * kSumPitch * 4 <= kRingBytes, "the sums take the ring's place");
};

// Of few rows of x many small tiles of outputs keep a GPU busy; of more rows larger tiles read x less often.
struct Few : Tile<1, 1, 8, 4, 128, 4> {};
struct Some : Tile<2, 2, 6, 4, 64, 3> {};
struct Many : Tile<4, 4, 3, 2, 64, 2> {};

// A pair of T from its bits, and back.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
template <class T>
__device__ inline Pair<T> pair_of(uint32_t bits) {
  return reinterpret_cast<const Pair<T>&>(bits);
}
template <class Pair>
__device__ inline uint32_t bits_of(Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}

// A pair of T that stands for a zero of 8 bits: 1024 + z, or in bf16, which has no odd numbers above 256, 143 - z.
template <class T>
__device__ inline uint32_t shift_of(uint32_t z) {
  const uint32_t bits = std::is_same_v<T, __half> ? 0x6400 + z : __float_as_uint(143.0f - static_cast<float>(z)) >> 16;
  return bits << 16 | bits;
}

// Codes number i and 4 + i of a word as a pair of T, less the zero that `shift` stands for: exact.
template <class T, class Form>
struct Codes {
  __device__ explicit Codes(const int8_t*) {}
  __device__ uint32_t operator()(uint32_t word, int i, uint32_t shift) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // 143 - z, less 128 + 15 - q
      const uint32_t based = ptx::and_xor(word >> 4 * i, 0x000f000f, 0x430f430f);
      return bits_of(__hsub2(pair_of<T>(shift), pair_of<T>(based)));
    } else if (i % 2 == 0) {  // 1024 + q, less 1024 + z
      const uint32_t based = ptx::and_xor(word >> 4 * i, 0x000f000f, 0x64006400);
      return bits_of(__hsub2(pair_of<T>(based), pair_of<T>(shift)));
    } else {  // 1024 + 16 q, a sixteenth of it, plus 960 - (1024 + z)
      const uint32_t based = ptx::and_xor(word >> 4 * (i - 1), 0x00f000f0, 0x64006400);
      const Pair<T> less = __hsub2(pair_of<T>(0x63806380), pair_of<T>(shift));
      return bits_of(__hfma2(pair_of<T>(based), pair_of<T>(0x2c002c00), less));
    }
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
  __device__ uint32_t operator()(uint32_t word, int i, uint32_t) const {
    const uint32_t low = __shfl_sync(~0u, entry, word >> 4 * i), high = __shfl_sync(~0u, entry, word >> (16 + 4 * i));
    return low | high << 16;
  }
};

__device__ inline float number(const void* from, int64_t at, FloatType type) {
  if (type == FloatType::fp32) return static_cast<const float*>(from)[at];
  if (type == FloatType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
  return __half2float(static_cast<const __half*>(from)[at]);
}

// Outputs of a tile: its lines, but for the ones.
template <class Form, class Tile>
constexpr int kOutputs = Tile::kLines - std::is_same_v<Form, Zeros>;

// A group's scale s, and with zeros what they shift codes by, or what multiplies the sum of the inputs:
// (q - z) s = (q - 8) s + (8 - z) s, and q s + z = (q - 8) s + (8 s + z).
struct alignas(8) Shifted {
  float s;
  uint32_t shift;
};
template <class Form>
using Scale = std::conditional_t<std::is_same_v<Form, ByteZeros>, Shifted,
                                 std::conditional_t<std::is_same_v<Form, Zeros>, float2, float>>;

template <class T>
__device__ inline void load_scale(const Arguments& p, int64_t at, float& to) {
  to = number(p.scales, at, p.scale_type);
}
template <class T>
__device__ inline void load_scale(const Arguments& p, int64_t at, Shifted& to) {
  to = {number(p.scales, at, p.scale_type), shift_of<T>(static_cast<const uint8_t*>(p.zeros)[at])};
}
template <class T>
__device__ inline void load_scale(const Arguments& p, int64_t at, float2& to) {
  const float s = number(p.scales, at, p.scale_type), z = number(p.zeros, at, p.scale_type);
  to = {s, p.kind == Int4Zeros::offset ? fmaf(8.0f, s, z) : (8.0f - z) * s};
}

template <class T>
__device__ inline uint32_t shift_from(Shifted scale) {
  return scale.shift;
}
template <class T, class Scale>
__device__ inline uint32_t shift_from(Scale) {
  return shift_of<T>(8);
}
__device__ inline float scale_of(float scale) { return scale; }
__device__ inline float scale_of(Shifted scale) { return scale.s; }
__device__ inline float scale_of(float2 scale) { return scale.x; }

// Bytes of shared memory: the ring, then scales [kLines][kPitch].
template <class Form, class Tile>
constexpr int kShared = Tile::kRingBytes + Tile::kLines * Tile::kPitch * static_cast<int>(sizeof(Scale<Form>));

// Launched with tiles of outputs x p.tiles blocks.
template <class T, class Form, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResident) int4_linear_kernel(const __grid_constant__ Arguments p) {
  constexpr int kRows = Tile::kRows, kTokens = Tile::kTokens, kStages = Tile::kStages, kAhead = Tile::kAhead;
  constexpr int kTurn = kWarps * kBlock;  // columns from a warp's block to its next
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const scales = reinterpret_cast<Scale<Form>*>(memory + Tile::kRingBytes);
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  const int first_n = blockIdx.x / p.tiles * kOutputs<Form, Tile>, first_m = blockIdx.x % p.tiles * 8 * kTokens;
  const int end_n = min(first_n + kOutputs<Form, Tile>, p.N);
  const int tokens = min(8 * kTokens, p.M - first_m);
  const int blocks = (p.K + kBlock - 1) / kBlock, bytes_of_row = p.K / 2;
  const int swizzle = row / 2;  // the four pieces of a row of codes change places, so that 8 rows meet in no bank
  const Codes<T, Form> codes(p.codebook);

  // Asks for the codes of the warp's next block, 8 rows at a time; zeros behind the ends.
  unsigned char* const ring = memory + warp * kStages * Tile::kStageBytes + row * kBlockBytes;
  const uint8_t* from = p.codes + static_cast<int64_t>(first_n + row) * bytes_of_row + warp * kBlockBytes + 16 * part;
  const int lines_left = end_n - first_n - row;
  int columns_left = p.K - warp * kBlock - 32 * part;
  const auto request = [&](int stage) {
    const int lines = columns_left > 0 ? lines_left : 0;
#pragma unroll
    for (int i = 0; i < Tile::kLines / 8; ++i)
      ptx::copy_async(ring + stage * Tile::kStageBytes + 8 * i * kBlockBytes + 16 * (part ^ swizzle),
                      from + static_cast<int64_t>(i) * 8 * bytes_of_row, 8 * i < lines);
    ptx::commit_copies();
    from += kTurn / 2;
    columns_left -= kTurn;
  };

  // Loads eight columns of x, `column` behind the start of the warp's block; zeros behind the ends.
  const T* x = static_cast<const T*>(p.x) + (first_m + row) * p.x_stride + warp * kBlock + 8 * part;
  int inputs_left = p.K - warp * kBlock;
  const auto load_inputs = [&](uint4(&to)[kTokens], int column) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      to[i] = column < inputs_left && row + 8 * i < tokens
                  ? __ldg(reinterpret_cast<const uint4*>(x + 8 * i * p.x_stride + column))
                  : uint4{};
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) request(i);
  uint4 inputs[kAhead][kTokens];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_inputs(inputs[i], 32 * i);

  float total[kRows][kTokens][4] = {};
  int stage = 0;
  for (int first = 0; first < blocks; first += p.chunk) {
    const int first_group = first * p.groups_of_block;
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < Tile::kLines * p.chunk_groups; i += kThreads) {
      const int n = i / p.chunk_groups, group = i % p.chunk_groups;
      Scale<Form> scale = {};
      if (first_n + n < end_n && first_group + group < p.groups)
        load_scale<T>(p, static_cast<int64_t>(first_n + n) * p.groups + first_group + group, scale);
      scales[n * Tile::kPitch + group] = scale;
    }
    __syncthreads();

    const Scale<Form>* block_scales = scales + row * Tile::kPitch + warp * p.groups_of_block;
    for (int block = first + warp; block < min(first + p.chunk, blocks); block += kWarps) {
      ptx::wait_copies<kStages - 2>();
      __syncwarp();
      request(stage ? stage - 1 : kStages - 1);
      const unsigned char* const now = ring + stage * Tile::kStageBytes + 4 * part;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      const Scale<Form>* scale_row = block_scales;
      block_scales += kWarps * p.groups_of_block;
      float d[kRows][kTokens][4] = {};  // of a group: codes times inputs
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t words[kRows][2];
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i)
          words[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(now + 8 * i * kBlockBytes + 16 * (j ^ swizzle));
        uint32_t shifts[kRows][2];
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) shifts[i / 2][i % 2] = shift_from<T>(scale_row[8 * i * Tile::kPitch]);
        if constexpr (std::is_same_v<Form, Zeros>) {
          if (row == 7) words[kRows - 1][1] = 0x99999999;  // ones
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[kRows][4];
#pragma unroll
          for (int i = 0; i < 4 * kRows; ++i)
            a[i / 4][i % 4] = codes(words[i / 4][i % 2], 2 * half + i % 4 / 2, shifts[i / 4][i % 2]);
#pragma unroll
          for (int i = 0; i < kTokens; ++i) {
            if (i && 8 * i >= tokens) break;
            const uint4& v = inputs[j % kAhead][i];
            const uint32_t low = half ? v.y : v.x, high = half ? v.w : v.z;
            const uint32_t b0 = __byte_perm(low, high, 0x5410), b1 = __byte_perm(low, high, 0x7632);
#pragma unroll
            for (int r = 0; r < kRows; ++r) ptx::multiply<T>(d[r][i], a[r], b0, b1);
          }
        }
        load_inputs(inputs[j % kAhead], (j + kAhead) / 4 * kTurn + (j + kAhead) % 4 * 32);
        if (j < 3 && ((j + 1) & p.last_word)) continue;
        float sum_x[2 * kTokens];
        if constexpr (std::is_same_v<Form, Zeros>) {
#pragma unroll
          for (int k = 0; k < 2 * kTokens; ++k)
            sum_x[k] = __shfl_sync(~0u, d[kRows - 1][k / 2][2 + k % 2], 4 * 7 + part);
        }
#pragma unroll
        for (int i = 0; i < 2 * kRows; ++i) {
          const Scale<Form> scale = scale_row[8 * i * Tile::kPitch];
#pragma unroll
          for (int k = 0; k < 2 * kTokens; ++k) {
            float &sum = total[i / 2][k / 2][i % 2 * 2 + k % 2], &product = d[i / 2][k / 2][i % 2 * 2 + k % 2];
            if constexpr (std::is_same_v<Form, Zeros>) sum = fmaf(sum_x[k], scale.y, sum);
            sum = fmaf(product, scale_of(scale), sum);
            product = 0.0f;
          }
        }
        ++scale_row;
      }
      x += kTurn;
      inputs_left -= kTurn;
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
  for (uint32_t i = threadIdx.x; i < tokens * Tile::kLines; i += kThreads) {
    const int n = i % Tile::kLines, m = i / Tile::kLines;
    if (first_n + n >= end_n) continue;
    constexpr int kNext = 8 * kTokens * Tile::kSumPitch;
    const float* const sum = sums + m * Tile::kSumPitch + n;
    float y = (sum[0] + sum[kNext]) + (sum[2 * kNext] + sum[3 * kNext]);
    if (p.bias) y += static_cast<float>(static_cast<const T*>(p.bias)[first_n + n]);
    static_cast<T*>(p.out)[static_cast<int64_t>(first_m + m) * p.N + first_n + n] = T(y);
  }
}

}  // namespace scrimp::cuda::int4_linear
