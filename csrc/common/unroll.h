// Loops whose bounds are constants, so that an array of vectors stays in registers.
#pragma once

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls body(Int<n>) for 1 <= n <= N.
template <int N, class Body>
SCRIMP_INLINE void with_constant(int64_t n, Body body) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, body);
  }
  body(Int<N>{});
}

// Calls body(r, c) for every vector of an R x C block (R <= 6, C <= 8); unrolled.
template <int R, int C, class Body>
SCRIMP_INLINE void for_vectors(Body body) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) body(r, c);
  }
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
