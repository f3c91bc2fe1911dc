// Codes of 4 bits become vectors with outputs in the lanes, and the integer products of int8 mode.
#pragma once

#include "common/simd.h"
#include "common/unroll.h"
#include "common/with_type.h"
#include "cpu/int4_linear.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kPanel = kInt4Panel;
constexpr int kPieces = 16 / kLanes;  // vectors of codes in a chunk of a row
constexpr int kPieceBytes = 4 * kLanes;

typedef int16_t ShortVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShortVec __attribute__((vector_size(4 * kLanes)));
typedef uint8_t ByteVec __attribute__((vector_size(4 * kLanes)));

SCRIMP_INLINE BitsVec load_bits(const void* p) {
  BitsVec bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}

// ---- sums of products: each 32-bit lane adds four products of an unsigned and a signed byte ----

SCRIMP_INLINE IntVec widen(ShortVec x) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  return (IntVec)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#else
  return ((IntVec)x << 16 >> 16) + ((IntVec)x >> 16);
#endif
}

// Exact for all bytes: what vpdpbusd does.
SCRIMP_INLINE IntVec add_products_in_software(IntVec sum, BitsVec u, IntVec s) {
  const ShortVec even = (ShortVec)((UShortVec)u & 0xff) * ((ShortVec)((UShortVec)s << 8) >> 8);
  const ShortVec odd = (ShortVec)((UShortVec)u >> 8) * ((ShortVec)s >> 8);
  return sum + widen(even) + widen(odd);
}

// Sums of products with bytes of any size.
struct WideSums {
  SCRIMP_INLINE static IntVec start(IntVec sum) { return sum; }
  SCRIMP_INLINE static IntVec add(IntVec part, BitsVec u, IntVec s) {
#if defined(SCRIMP_VNNI) && !defined(SCRIMP_EMULATE_VNNI)
    return (IntVec)_mm512_dpbusd_epi32((__m512i)part, (__m512i)u, (__m512i)s);
#else
    return add_products_in_software(part, u, s);
#endif
  }
  SCRIMP_INLINE static IntVec finish(IntVec, IntVec part) { return part; }
};

#if defined(SCRIMP_VNNI)
using NibbleSums = WideSums;
#else
// The same for u <= 15: up to 8 products of at most 2 * 15 * 127 add up in 16 bits before they are widened.
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
  SCRIMP_INLINE static IntVec finish(IntVec sum, IntVec part) { return sum + widen((ShortVec)part); }
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

// Calls put(first output, word, codes) for all words of 8 columns of a chunk, with kLanes outputs' codes in the lanes.
template <class Put>
SCRIMP_INLINE void for_codes(const Int4Panel& p, int64_t chunk, Put put) {
  const int64_t bytes = p.x->columns / 2 - chunk * 64, stride = p.codes_stride;
  const uint8_t* const first = p.codes + chunk * 64;
  const bool whole = first + (p.outputs - 1) * stride + 64 <= p.codes_end;
  for (int n = 0; n < kPanel && n < p.outputs; n += kLanes) {
    for (int piece = 0; piece < kPieces && piece * kPieceBytes < bytes; ++piece) {
      const uint8_t* at = first + n * stride + piece * kPieceBytes;
      Vec words[kLanes];
      if (whole && n + kLanes <= p.outputs) [[likely]] {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) words[i] = (Vec)load_bits(at + i * stride);
      } else {
        for (int i = 0; i < kLanes; ++i, at += n + i < p.outputs ? stride : 0) {
          uint8_t some[kPieceBytes] = {};
          memcpy(some, at, p.codes_end - at < kPieceBytes ? p.codes_end - at : kPieceBytes);
          words[i] = (Vec)load_bits(some);
        }
      }
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) put(n, piece * kLanes + i, (BitsVec)words[i]);
    }
  }
}

// Fetches what lies at this place of the next panel, were its codes of a chunk one array: few at a time, because more
// would stall the loads.
SCRIMP_INLINE void fetch_next(const Int4Panel& p, int64_t chunk, int n, int word) {
  __builtin_prefetch(p.next + chunk * kPanel * 64 + n * 64 + word * kPieceBytes, 0, 2);
}

// to[column][output] of a chunk, in exact mode
template <bool Book>
void unpack(const Int4Panel& p, int64_t chunk, float* to) {
  const FloatCodes<Book> codes(p.codebook);
  for_codes(p, chunk, [&](int n, int word, BitsVec q) __attribute__((always_inline)) {
    float* at = to + word * 8 * kPanel + n;
    fetch_next(p, chunk, n, word);
    store(at, codes.template value<0>(q));
    store(at + kPanel, codes.template value<1>(q));
    store(at + 2 * kPanel, codes.template value<2>(q));
    store(at + 3 * kPanel, codes.template value<3>(q));
    store(at + 4 * kPanel, codes.template value<4>(q));
    store(at + 5 * kPanel, codes.template value<5>(q));
    store(at + 6 * kPanel, codes.template value<6>(q));
    store(at + 7 * kPanel, codes.template value<7>(q));
  });
}

// to[word][even columns, odd columns][output] of a chunk, in int8 mode
template <bool Book>
void unpack(const Int4Panel& p, int64_t chunk, uint32_t* to) {
  const ByteCodes<Book> codes{static_cast<const int8_t*>(p.codebook)};
  for_codes(p, chunk, [&](int n, int word, BitsVec q) __attribute__((always_inline)) {
    const BitsVec even = codes.values(q), odd = codes.values(q >> 4);
    fetch_next(p, chunk, n, word);
    memcpy(to + 2 * word * kPanel + n, &even, sizeof even);
    memcpy(to + (2 * word + 1) * kPanel + n, &odd, sizeof odd);
  });
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
