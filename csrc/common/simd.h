// One vector type for every instruction set: Vec holds kLanes floats (16 on AVX-512, 8 on AVX2, else 4).
//
// A kernel file is compiled once per instruction set with -DSCRIMP_ISA=portable|avx2|avx512 and the
// matching -m flags. Everything here is local to that object, so no instruction of one set can be
// linked into another. Operators + - * < >= ?: work on Vec element by element.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns inside its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace scrimp::SCRIMP_ISA {
namespace {

#define SCRIMP_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr float kLog2E = 1.44269504f;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitsVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// ---- memory: any alignment ----

SCRIMP_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

SCRIMP_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfVec half;
  memcpy(&half, p, sizeof half);
  const BitsVec wide = __builtin_convertvector(half, BitsVec);
#endif
  return (Vec)((BitsVec)wide << 16);
}

SCRIMP_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HalfVec half;
  memcpy(&half, p, sizeof half);
  const BitsVec bits = __builtin_convertvector(half, BitsVec), sign = (bits & 0x8000) << 16;
  const Vec finite = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
  return (Vec)(((bits & 0x7c00) == 0x7c00 ? (bits & 0x3ff) << 13 | 0x7f800000 : (BitsVec)finite) | sign);
#endif
}

SCRIMP_INLINE Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof bytes);
  const IntVec wide = __builtin_convertvector(bytes, IntVec);
#endif
  return __builtin_convertvector((IntVec)wide, Vec);
}

SCRIMP_INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

// Rounded to bf16, to nearest even, in the upper half of each lane; a NaN stays a NaN. The lower half is not zero.
SCRIMP_INLINE BitsVec round_bits(Vec x) {
  const BitsVec bits = (BitsVec)x;
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

SCRIMP_INLINE void store(BFloat16* p, Vec x) {
  const HalfVec half = __builtin_convertvector(round_bits(x) >> 16, HalfVec);
  memcpy(p, &half, sizeof half);
}

// Rounded to nearest even.
SCRIMP_INLINE void store(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const BitsVec bits = (BitsVec)x & 0x7fffffff, sign = (BitsVec)x >> 16 & 0x8000;
  const BitsVec normal = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
  const BitsVec small = (BitsVec)((Vec)bits + 0.5f) - 0x3f000000;  // below 2^-14: steps of 2^-24
  BitsVec half = bits < 0x38800000u ? small : normal;
  half = bits >= 0x47800000u ? (BitsVec{} + 0x7c00) : half;
  half = bits > 0x7f800000u ? (BitsVec{} + 0x7e00) : half;
  const HalfVec packed = __builtin_convertvector(half | sign, HalfVec);
  memcpy(p, &packed, sizeof packed);
#endif
}

// x rounded to what a T holds.
template <class T>
SCRIMP_INLINE Vec round_to(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  return (Vec)(round_bits(x) & 0xffff0000);
}

// The first n of kLanes elements, zeros behind them.
template <class T>
SCRIMP_INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
SCRIMP_INLINE void store_first(T* p, Vec x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T padded[kLanes];
  store(padded, x);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// ---- arithmetic ----

SCRIMP_INLINE Vec broadcast(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

SCRIMP_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SCRIMP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// fold(upper half, lower half) until one lane is left: always in the same order.
template <class Fold>
SCRIMP_INLINE float fold_lanes(Vec x, Fold fold) {
#if defined(__AVX512F__)
  x = fold(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = fold(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = fold(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = fold(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
  x = fold(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = fold(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = fold(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  x = fold(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
  x = fold(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
  return x[0];
}

SCRIMP_INLINE float sum_lanes(Vec x) {
  return fold_lanes(x, [](Vec a, Vec b) { return a + b; });
}

SCRIMP_INLINE float highest_lane(Vec x) {
  return fold_lanes(x, [](Vec a, Vec b) { return max(a, b); });
}

// 0, 1, 2, ... kLanes - 1.
SCRIMP_INLINE Vec lane_index() {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
  return x;
}

// 2^x for x < 128, within 3 ulp; exactly 1 at 0, 0 below 2^-126 (also at -inf), NaN at NaN.
// x = n + f with f in [0, 1]; 2^f is a minimax polynomial with p(0) = 1, relative error 8e-8.
SCRIMP_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = (x - 0.5f) + magic;
  const Vec f = x - (shifted - magic);
#endif
  Vec p = fma(broadcast(1.867130072e-3f), f, broadcast(9.017030316e-3f));
  p = fma(p, f, broadcast(5.579991311e-2f));
  p = fma(p, f, broadcast(2.401644502e-1f));
  p = fma(p, f, broadcast(6.931513119e-1f));
  p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
  const Vec scaled = (Vec)((BitsVec)p + ((BitsVec)shifted << 23));
  return x < -126.0f ? Vec{} : scaled;
#endif
}

// ---- a kLanes x kLanes block: rows become columns ----

SCRIMP_INLINE void transpose(Vec (&rows)[kLanes]) {
  // One stage interleaves row i with row i + kLanes/2; log2(kLanes) stages are a transposition.
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const Vec a = rows[i], b = rows[i + kLanes / 2];
#if defined(__AVX512F__)
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      next[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
