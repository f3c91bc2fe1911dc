// fp16 beside the fp32 and bf16 of simd.h: memory only, arithmetic is fp32.
#pragma once

#include "common/float_kind.h"
#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

struct Float16 {
  uint16_t bits;
};

SCRIMP_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfVec half;
  memcpy(&half, p, sizeof half);
  const BitsVec wide = __builtin_convertvector(half, BitsVec);
  const BitsVec magnitude = (wide & 0x7fff) << 13;
  const Vec number = (Vec)magnitude * 0x1p112f;  // the exponent's bias goes from 15 to 127; subnormals become normal
  const BitsVec finite = (BitsVec)number, beyond = magnitude | 0x7f800000;
  return (Vec)(((wide & 0x7fff) >= 0x7c00 ? beyond : finite) | (wide & 0x8000) << 16);
#endif
}

// Rounded to nearest even; a NaN stays a NaN.
SCRIMP_INLINE void store(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const BitsVec bits = (BitsVec)x, magnitude = bits & 0x7fffffff;
  const BitsVec normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const BitsVec tiny = (BitsVec)((Vec)magnitude + 0.5f) - 0x3f000000;  // the addition rounds to multiples of 2^-24
  const BitsVec beyond = magnitude > 0x7f800000 ? (BitsVec{} + 0x7e00) : (BitsVec{} + 0x7c00);
  const BitsVec number = magnitude < 0x38800000 ? tiny : normal;
  const BitsVec half = (magnitude >= 0x47800000 ? beyond : number) | (bits >> 16 & 0x8000);
  const HalfVec out = __builtin_convertvector(half, HalfVec);
  memcpy(p, &out, sizeof out);
#endif
}

// One number.
SCRIMP_INLINE float one(const float* p) { return *p; }
SCRIMP_INLINE float one(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
SCRIMP_INLINE float one(const Float16* p) { return load_first(p, 1)[0]; }

// Calls body(T{}) with the T that `kind` names.
template <class Body>
SCRIMP_INLINE void with_float(FloatKind kind, Body body) {
  if (kind == FloatKind::fp32) return body(float{});
  if (kind == FloatKind::bf16) return body(BFloat16{});
  body(Float16{});
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
