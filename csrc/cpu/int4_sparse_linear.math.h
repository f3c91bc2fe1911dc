// int4_sparse_linear, the arithmetic of its two modes: sums of R rows x 8 vectors of outputs over a span of channels,
// and what a finished block adds to the totals. Lane j of vector i stands for output 16 i + j of a tile.
#pragma once

#include "common/int4_codes.h"
#include "common/unroll.h"
#include "common/with_type.h"
#include "cpu/int4_sparse_linear.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kVectors = 8;  // vectors of outputs whose codes are one vector

// Calls body(Int<i>) for every nibble of a word.
template <class Body>
SCRIMP_INLINE void for_nibbles(Body body) {
  body(Int<0>{}), body(Int<1>{}), body(Int<2>{}), body(Int<3>{});
  body(Int<4>{}), body(Int<5>{}), body(Int<6>{}), body(Int<7>{});
}

// Byte t of four words becomes word t.
SCRIMP_INLINE void turn_bytes(BitsVec (&w)[4]) {
  const BitsVec even01 = (w[0] & 0x00ff00ffu) | (w[1] << 8 & 0xff00ff00u);
  const BitsVec odd01 = (w[0] >> 8 & 0x00ff00ffu) | (w[1] & 0xff00ff00u);
  const BitsVec even23 = (w[2] & 0x00ff00ffu) | (w[3] << 8 & 0xff00ff00u);
  const BitsVec odd23 = (w[2] >> 8 & 0x00ff00ffu) | (w[3] & 0xff00ff00u);
  w[0] = (even01 & 0xffffu) | even23 << 16;
  w[1] = (odd01 & 0xffffu) | odd23 << 16;
  w[2] = even01 >> 16 | (even23 & 0xffff0000u);
  w[3] = odd01 >> 16 | (odd23 & 0xffff0000u);
}

// Where a step of the loops is: R rows from `row` on, and the vector of codes that begins `bytes` into the part.
struct Place {
  int64_t row, bytes;
};

// Scales or zeros of a group, for the outputs from n on.
template <class T>
SCRIMP_INLINE Vec of_group(const Int4SparsePart& p, const T* from, int64_t stride, int64_t group, int64_t n) {
  return load_first(from + group * stride + n, p.outputs - n);
}

SCRIMP_INLINE Vec scales_of(const Int4SparsePart& p, int64_t group, int64_t n) {
  return with_type(p.scale_type, p.scales, [&](auto* from) { return of_group(p, from, p.scales_stride, group, n); });
}

SCRIMP_INLINE Vec zeros_of(const Int4SparsePart& p, int64_t group, int64_t n) {
  if (p.byte_zeros) return of_group(p, static_cast<const uint8_t*>(p.zeros), p.zeros_stride, group, n);
  return with_type(p.scale_type, p.zeros, [&](auto* from) { return of_group(p, from, p.zeros_stride, group, n); });
}

// Sums of products with codes as fp32; what lies in the lanes are floats.
template <bool Book>
struct ExactMath {
  using Lanes = Vec;
  const Int4SparsePart& p;
  const FloatCodes<Book> codes{p.codebook};

  // In the order of the channels, one fused multiply-add after the other: a listed zero changes no bit.
  template <int R>
  SCRIMP_INLINE void add(const Int4Span& span, const Place& at, Vec (&sum)[R][kVectors]) const {
    const int64_t rows = p.x->rows;
    const int32_t* const channel = p.x->list->channel;
    const uint8_t* const from = p.codes + at.bytes;
    for (int64_t j = 4 * span.first; j < 4 * (span.first + span.quads); ++j) {
      const BitsVec q = load_bits(from + channel[j] * p.codes_stride);
      Vec x[R];
      for_vectors<R, 1>([&](int r, int) { x[r] = broadcast(p.x->values[j * rows + at.row + r]); });
      for_nibbles([&](auto nibble) __attribute__((always_inline)) {
        constexpr int I = decltype(nibble)::value;
        const Vec value = codes.template value<I>(q);
        for_vectors<R, 1>([&](int r, int) { sum[r][I] = fma(value, x[r], sum[r][I]); });
      });
    }
  }

  // Codes stand for q - 8: (q - z) s = (q - 8) s + (8 - z) s and q s + z = (q - 8) s + (z + 8 s).
  SCRIMP_INLINE Vec term(Vec sum, int64_t of_row, Vec scale, Vec zero, Vec total) const {
    total = fma(sum, scale, total);
    if (p.kind == Int4Zeros::none) return total;
    const Vec shift = p.kind == Int4Zeros::shift ? (8.0f - zero) * scale : fma(broadcast(8.0f), scale, zero);
    return fma(shift, broadcast(p.x->sums[of_row]), total);
  }
};

// Sums of products of integers, four channels at a time; what lies in the lanes are integers.
template <bool Book, class Sums>
struct Int8Math {
  using Lanes = IntVec;
  const Int4SparsePart& p;
  const ByteCodes<Book> codes{static_cast<const int8_t*>(p.codebook)};

  template <int R>
  SCRIMP_INLINE void add(const Int4Span& span, const Place& at, IntVec (&sum)[R][kVectors]) const {
    const int64_t rows = p.x->rows;
    const uint8_t* const from = p.codes + at.bytes;
    IntVec part[R][kVectors];
    for_vectors<R, kVectors>([&](int r, int i) { part[r][i] = Sums::start(sum[r][i]); });
    for (int64_t quad = span.first; quad < span.first + span.quads; ++quad) {
      const int32_t* const channel = p.x->list->channel + 4 * quad;
      BitsVec q[4];
      for_vectors<1, 4>([&](int, int i) { q[i] = load_bits(from + channel[i] * p.codes_stride); });
      turn_bytes(q);
      IntVec x[R];
      for_vectors<R, 1>([&](int r, int) { x[r] = broadcast_word(p.x->integers + 4 * (quad * rows + at.row + r)); });
      for_vectors<1, 4>([&](int, int i) {
        const BitsVec even = codes.values(q[i]), odd = codes.values(q[i] >> 4);
        for_vectors<R, 1>([&](int r, int) {
          part[r][2 * i] = Sums::add(part[r][2 * i], even, x[r]);
          part[r][2 * i + 1] = Sums::add(part[r][2 * i + 1], odd, x[r]);
        });
      });
    }
    for_vectors<R, kVectors>([&](int r, int i) { sum[r][i] = Sums::finish(sum[r][i], part[r][i]); });
  }

  SCRIMP_INLINE Vec term(IntVec sum, int64_t of_row, Vec scale, Vec zero, Vec total) const {
    const Vec dot = __builtin_convertvector(sum + p.x->starts[of_row], Vec);
    const Vec of_x = broadcast(p.x->sums[of_row]), factor = broadcast(p.x->scales[of_row]);
    if (p.kind == Int4Zeros::shift) return total + SCRIMP_ISA::term<Int4Zeros::shift>(dot, scale, zero, of_x) * factor;
    if (p.kind == Int4Zeros::offset)
      return total + SCRIMP_ISA::term<Int4Zeros::offset>(dot, scale, zero, of_x) * factor;
    return total + SCRIMP_ISA::term<Int4Zeros::none>(dot, scale, zero, of_x) * factor;
  }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
