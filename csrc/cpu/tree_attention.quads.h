// tree_attention: keys turned into columns on their way from memory, 16 bytes of each key at a time.
#pragma once

#include "common/query_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// 16 bytes from each of kLanes / 4 places, `step` bytes apart.
SCRIMP_INLINE Vec load_quads(const char* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  const auto quad = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
  __m512 x = _mm512_insertf32x4(_mm512_castps128_ps512(quad(0)), quad(1), 1);
  x = _mm512_insertf32x4(x, quad(2), 2);
  return (Vec)_mm512_insertf32x4(x, quad(3), 3);
#elif defined(__AVX2__)
  const auto quad = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(quad(0)), quad(1), 1);
#else
  return load(reinterpret_cast<const float*>(p));
#endif
}

// Of every four lanes: a0 b0 a1 b1 and a2 b2 a3 b3.
SCRIMP_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  low = (Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b);
  high = (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  low = (Vec)_mm256_unpacklo_ps((__m256)a, (__m256)b);
  high = (Vec)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Of every four lanes: a0 a1 b0 b1 and a2 a3 b2 b3.
SCRIMP_INLINE void interleave_pairs(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  low = (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
  high = (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  low = (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
  high = (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  low = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  high = __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// Transposes the 4 x 4 block that every four lanes of four vectors are.
SCRIMP_INLINE void transpose_quads(Vec (&x)[4]) {
  Vec low[2], high[2];
  interleave(x[0], x[1], low[0], high[0]);
  interleave(x[2], x[3], low[1], high[1]);
  interleave_pairs(low[0], low[1], x[0], x[1]);
  interleave_pairs(high[0], high[1], x[2], x[3]);
}

SCRIMP_INLINE void prefetch_quads(const char* p, int64_t step) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) __builtin_prefetch(p + i * step, 0, 2);
}

SCRIMP_INLINE void store_column(float* packed, int64_t d, Vec x, const float*) { store(packed + d * kPitch, x); }

SCRIMP_INLINE void store_column(float* packed, int64_t d, Vec pairs, const BFloat16*) {
  store(packed + 2 * d * kPitch, (Vec)((BitsVec)pairs << 16));
  store(packed + (2 * d + 1) * kPitch, (Vec)((BitsVec)pairs & 0xffff0000));
}

// K^T of kLanes keys, 16 bytes of each at a time; bf16 travel in pairs. Meanwhile their values are fetched.
template <class T>
SCRIMP_INLINE void pack_lanes(const T* keys, int64_t stride, const T* values, int64_t value_stride, int64_t head_dim,
                              float* packed) {
  const auto* from = reinterpret_cast<const char*>(keys);
  const auto* beside = reinterpret_cast<const char*>(values);
  const int64_t step = stride * sizeof(T), value_step = value_stride * sizeof(T);
  for (int64_t d = 0; d < head_dim * static_cast<int64_t>(sizeof(T)) / 4; d += 4) {
    Vec x[4];
    for_vectors<4, 1>([&](int i, int) { x[i] = load_quads(from + i * step + 4 * d, 4 * step); });
    transpose_quads(x);
    for_vectors<4, 1>([&](int i, int) { store_column(packed, d + i, x[i], keys); });
    prefetch_quads(beside + d / 4 % 4 * value_step + 4 * d, 4 * value_step);
  }
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
