// The logits of neighbouring tokens from the scores of their codes, for kernel files.
#pragma once

#include <stdint.h>

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// table[index[i]] for kLanes numbers.
template <class T>
SCRIMP_INLINE Vec gather(const T* table, const int32_t* index) {
  T found[kLanes];
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i]];
  return load(found);
}

#if defined(__AVX512F__)
template <>
SCRIMP_INLINE Vec gather(const float* table, const int32_t* index) {
  return (Vec)_mm512_i32gather_ps(_mm512_loadu_si512(index), table, 4);
}
#elif defined(__AVX2__)
template <>
SCRIMP_INLINE Vec gather(const float* table, const int32_t* index) {
  return (Vec)_mm256_i32gather_ps(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
}
#endif

// The codes [levels, tokens] of a head, its bias (or null), and one row of scores of its codes.
template <class T>
struct TokenLogits {
  const T* scores;
  const int32_t* codes;
  const T* bias;
  int64_t levels, tokens;

  // Of tokens v, v + 1, ...; all kLanes of them exist.
  SCRIMP_INLINE Vec lanes(int64_t v) const {
    Vec sum = gather(scores, codes + v);
    for (int64_t level = 1; level < levels; ++level) sum += gather(scores, codes + level * tokens + v);
    return bias ? sum + load(bias + v) : sum;
  }

  float one(int64_t v) const {
    const auto number = [](const T* p) { return load_first(p, 1)[0]; };
    float sum = number(scores + codes[v]);
    for (int64_t level = 1; level < levels; ++level) sum += number(scores + codes[level * tokens + v]);
    return bias ? sum + number(bias + v) : sum;
  }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
