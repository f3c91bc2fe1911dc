// Products whose right side is a block of 64 queries in the lanes: Q^T, scores or weights.
//
// The left side is scalars, broadcast from where they lie in memory, so a row of K or V is only a pointer.
#pragma once

#include "common/simd.h"
#include "common/unroll.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int64_t kPitch = 64;  // floats from one row of Q^T, S^T or O^T to the next
// A strip, kStripRows x kStripVectors accumulators, fills the registers together with its operands.
constexpr int kStripRows = 6;
constexpr int kStripVectors = kLanes == 16 ? 4 : 2;
constexpr int kStrips = kPitch / kLanes / kStripVectors;  // strips side by side in a full row
constexpr int64_t kLine = 16;                             // floats in a cache line
constexpr float kInfinity = __builtin_inff();

// Cuts rows into strips of up to kStripRows, the last two of like height: body(Int<R>, first_row).
template <class Body>
SCRIMP_INLINE void for_row_strips(int64_t rows, Body body) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    const bool two_left = left > kStripRows && left < 2 * kStripRows;
    with_constant<kStripRows>(two_left ? (left + 1) / 2 : left, [&](auto height) {
      body(height, row);
      row += height.value;
    });
  }
}

// Cuts a rows x vectors block into strips: body(Int<R>, Int<C>, first_row, first_vector).
template <class Body>
SCRIMP_INLINE void for_strips(int64_t rows, int64_t vectors, Body body) {
  if constexpr (kStrips == 1) {
    with_constant<kStripVectors>(vectors, [&](auto width) {
      for_row_strips(rows, [&](auto height, int64_t row) { body(height, width, row, int64_t{0}); });
    });
  } else {
    for_row_strips(rows, [&](auto height, int64_t row) {
      for (int64_t vector = 0; vector < vectors; vector += kStripVectors) {
        with_constant<kStripVectors>(vectors - vector, [&](auto width) { body(height, width, row, vector); });
      }
    });
  }
}

// sum[r][c] += sum_i scalar(r, i) * lanes[i, c]
template <int R, int C, class Scalar>
SCRIMP_INLINE void multiply_add(Vec (&sum)[R][C], const float* lanes, int64_t depth, Scalar scalar) {
  for (int64_t i = 0; i < depth; ++i, lanes += kPitch) {
    Vec b[C];
    for_vectors<1, C>([&](int, int c) { b[c] = load(lanes + c * kLanes); });
    for_vectors<R, 1>([&](int r, int) {
      const Vec a = broadcast(scalar(r, i));
      for_vectors<1, C>([&](int, int c) { sum[r][c] = fma(a, b[c], sum[r][c]); });
    });
  }
}

// packed[d, i] = row(i)[d] * factor for i < lanes; zeros where row(i) is null, up to a whole vector.
template <class Row>
void pack_queries(int64_t lanes, int64_t head_dim, float factor, Row row, float* packed) {
  for (int64_t first = 0; first < lanes; first += kLanes) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const auto* query = row(first + i);
        block[i] = query ? load_first(query + d, head_dim - d) * factor : Vec{};
      }
      transpose(block);
      for (int64_t j = 0; j < kLanes && d + j < head_dim; ++j) store(packed + (d + j) * kPitch + first, block[j]);
    }
  }
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
