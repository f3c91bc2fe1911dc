// Sums of products of bytes: each 32-bit lane adds four products of an unsigned and a signed one.
#pragma once

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

typedef int16_t ShortVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShortVec __attribute__((vector_size(4 * kLanes)));

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
  return (IntVec)((BitsVec)sum + (BitsVec)widen(even) + (BitsVec)widen(odd));  // of limbs: modulo 2^32
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

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
