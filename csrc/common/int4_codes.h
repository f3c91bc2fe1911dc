// 4-bit codes as vectors of values, the integer products of int8 mode, and activations as integers.
//
// A kernel that includes this is compiled with -ffp-contract=off, because int8 mode rounds every operation by itself.
#pragma once

#include "common/byte_products.h"
#include "common/int4.h"
#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

typedef uint8_t ByteVec __attribute__((vector_size(4 * kLanes)));

SCRIMP_INLINE BitsVec load_bits(const void* p) {
  BitsVec bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

// ---- sums of products: each 32-bit lane adds four products of an unsigned and a signed byte ----

#if defined(SCRIMP_VNNI)
using NibbleSums = WideSums;
#else
// The same for u <= 15: up to 8 products of at most 2 * 15 * 128 add up in 16 bits before they are widened.
struct NibbleSums {
  SCRIMP_INLINE static IntVec start(IntVec) { return IntVec{}; }
  SCRIMP_INLINE static IntVec add(IntVec part, BitsVec u, IntVec s) {
#if defined(__AVX512BW__)
    return (IntVec)_mm512_add_epi16((__m512i)part, _mm512_maddubs_epi16((__m512i)u, (__m512i)s));
#elif defined(__AVX2__)
    return (IntVec)_mm256_add_epi16((__m256i)part, _mm256_maddubs_epi16((__m256i)u, (__m256i)s));
#else
    const ShortVec even = (ShortVec)((UShortVec)u & 0xff) * ((ShortVec)((UShortVec)s << 8) >> 8);
    const ShortVec odd = (ShortVec)((UShortVec)u >> 8) * ((ShortVec)s >> 8);
    return (IntVec)((UShortVec)part + (UShortVec)even + (UShortVec)odd);  // lanes without an output may overflow
#endif
  }
  SCRIMP_INLINE static IntVec finish(IntVec sum, IntVec part) {
    return (IntVec)((BitsVec)sum + (BitsVec)widen((ShortVec)part));
  }
};
#endif

// ---- what a code stands for ----

// In exact mode: q - 8, or the codebook's entry.
template <bool Book>
struct FloatCodes;

template <>
struct FloatCodes<false> {
  explicit FloatCodes(const void*) {}
#if defined(__AVX512F__)
  const Vec table = lane_index() - 8.0f;
  template <int I>
  SCRIMP_INLINE Vec value(BitsVec codes) const {
    return (Vec)_mm512_permutexvar_ps((__m512i)(codes >> (4 * I)), (__m512)table);
  }
#else
  template <int I>
  SCRIMP_INLINE Vec value(BitsVec codes) const {
    return __builtin_convertvector((IntVec)((codes ^ 0x88888888u) << (28 - 4 * I)) >> 28, Vec);
  }
#endif
};

template <>
struct FloatCodes<true> {
  const float* table;
  explicit FloatCodes(const void* book) : table(static_cast<const float*>(book)) {}
  template <int I>
  SCRIMP_INLINE Vec value(BitsVec codes) const {
#if defined(__AVX512F__)
    return (Vec)_mm512_permutexvar_ps((__m512i)(codes >> (4 * I)), (__m512)load(table));
#elif defined(__AVX2__)
    const __m256i index = (__m256i)(codes >> (4 * I));
    const __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), index);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), index);
    return (Vec)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(index, 28));
#else
    Vec value;
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = table[codes[lane] >> (4 * I) & 15];
    return value;
#endif
  }
};

// In int8 mode: q, or the codebook's entry + 128; four of them in a lane.
template <bool Book>
struct ByteCodes {
  const int8_t* book;

  SCRIMP_INLINE BitsVec values(BitsVec codes) const {
    const BitsVec q = codes & 0x0f0f0f0fu;
    if constexpr (!Book) return q;
#if defined(__AVX512BW__)
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(book));
    const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(entries), _mm512_set1_epi8(-128));
    return (BitsVec)_mm512_shuffle_epi8(table, (__m512i)q);
#elif defined(__AVX2__)
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(book));
    const __m256i table = _mm256_xor_si256(_mm256_broadcastsi128_si256(entries), _mm256_set1_epi8(-128));
    return (BitsVec)_mm256_shuffle_epi8(table, (__m256i)q);
#else
    ByteVec value = (ByteVec)q;
    for (int i = 0; i < 4 * kLanes; ++i) value[i] = static_cast<uint8_t>(book[value[i]] + 128);
    return (BitsVec)value;
#endif
  }
};

SCRIMP_INLINE IntVec broadcast_word(const void* p) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  return IntVec{} + word;
}

// What a block adds to an output but for the scale of x, as the contract of int8 mode says: every operation is rounded
// by itself.
template <Int4Zeros Kind>
SCRIMP_INLINE Vec term(Vec dot, Vec scale, Vec zero, Vec sum) {
  if constexpr (Kind == Int4Zeros::shift) return (dot - zero * sum) * scale;
  if constexpr (Kind == Int4Zeros::offset) return dot * scale + zero * sum;
  return dot * scale;
}

// ---- a block of activations as integers of -127 to 127 ----

constexpr float kSmallest = 0x1p-100f;  // a block below it counts as zero
constexpr uint32_t kInfinityBits = 0x7f800000;

// Integers are round(x steps), and scale is what one of them stands for; where x is not usable they are zeros.
struct Steps {
  float steps, scale;
  bool usable;
};

// The bits of the largest magnitude of x[columns], whole vectors; as integers, those of a NaN are above those of inf.
SCRIMP_INLINE uint32_t largest_bits(const float* x, int64_t columns) {
  BitsVec bits{};
  for (int64_t k = 0; k < columns; k += kLanes) {
    const BitsVec some = (BitsVec)load(x + k) & 0x7fffffffu;
    bits = some > bits ? some : bits;
  }
  const float largest = fold_lanes((Vec)bits, [](Vec a, Vec b) { return (BitsVec)a > (BitsVec)b ? a : b; });
  uint32_t most;
  memcpy(&most, &largest, sizeof most);
  return most;
}

SCRIMP_INLINE Steps steps_of(const float* x, int64_t columns) {
  const uint32_t most = largest_bits(x, columns);
  if (most >= kInfinityBits) return {0.0f, __builtin_nanf(""), false};
  float largest;
  memcpy(&largest, &most, sizeof most);
  if (largest < kSmallest) return {0.0f, 0.0f, false};
  return {127.0f / largest, largest / 127.0f, true};
}

SCRIMP_INLINE Vec round_steps(Vec x, Vec steps) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23 rounds to integers
  return (x * steps + magic) - magic;
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
