// rotary_append, the loops: rotates the heads of one token's q and k, copies those of its v.
#include "cpu/rotary_append.h"

#include <string.h>

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// y_a = a cos - b sin, y_b = b cos + a sin for the n <= kLanes dimensions from i on of both halves a, b.
template <class T>
SCRIMP_INLINE void rotate_lanes(const T* x, T* y, const RotaryToken& token, int64_t i, int64_t n) {
  const int64_t j = token.rotary / 2 + i;
  const Vec a = load_first(x + i, n), b = load_first(x + j, n);
  const Vec cos_a = load_first(token.cos + i, n), cos_b = load_first(token.cos + j, n);
  const Vec sin_a = load_first(token.sin + i, n), sin_b = load_first(token.sin + j, n);
  store_first(y + i, fma(a, cos_a, -(b * sin_a)), n);
  store_first(y + j, fma(b, cos_b, a * sin_b), n);
}

template <class T>
void rotate(const TokenHeads& heads, const RotaryToken& token) {
  const int64_t half = token.rotary / 2, whole = half / kLanes * kLanes;
  for (int64_t h = 0; h < heads.heads; ++h) {
    const T* x = static_cast<const T*>(heads.from) + h * heads.from_stride;
    T* y = static_cast<T*>(heads.to) + h * heads.to_stride;
    for (int64_t i = 0; i < whole; i += kLanes) rotate_lanes(x, y, token, i, kLanes);
    if (whole < half) rotate_lanes(x, y, token, whole, half - whole);
    memcpy(y + token.rotary, x + token.rotary, (token.head_dim - token.rotary) * sizeof(T));
  }
}

template <class T>
void append(const RotaryToken& token) {
  rotate<T>(token.q, token);
  rotate<T>(token.k, token);
  for (int64_t h = 0; h < token.v.heads; ++h) {
    memcpy(static_cast<T*>(token.v.to) + h * token.v.to_stride,
           static_cast<const T*>(token.v.from) + h * token.v.from_stride, token.head_dim * sizeof(T));
  }
}

}  // namespace

void rotary_append(const RotaryToken& token) { token.bf16 ? append<BFloat16>(token) : append<float>(token); }

}  // namespace scrimp::SCRIMP_ISA
