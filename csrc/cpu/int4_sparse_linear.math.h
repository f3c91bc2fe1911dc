// int4_sparse_linear, the arithmetic of its two modes: sums of R rows x 8 vectors of outputs over a span of channels,
// and what a finished block adds to the totals.
//
// Byte 16 a + 4 r + i of a tile's 64 holds the codes of outputs 16 (2 r + h) + 4 a + i, in its nibbles h = 0 and 1. So
// four channels whose bytes are interleaved have 16, 8 or 4 neighbouring outputs in their lanes, whatever the width of
// a vector.
#pragma once

#include "common/int4_codes.h"
#include "common/unroll.h"
#include "common/with_type.h"
#include "cpu/int4_sparse_linear.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kVectors = 8;                   // vectors of outputs whose codes are one vector
constexpr int kHeld = kLanes == 16 ? 16 : 8;  // vectors of sums that stay in registers

// Elements of a and b in turn, from the lower or the upper half of each 16 bytes.
#if defined(__AVX512BW__)
#define SCRIMP_INTERLEAVE(name, size, intrinsic, ...) \
  SCRIMP_INLINE BitsVec name(BitsVec a, BitsVec b) { return (BitsVec)_mm512_##intrinsic##size((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
#define SCRIMP_INTERLEAVE(name, size, intrinsic, ...) \
  SCRIMP_INLINE BitsVec name(BitsVec a, BitsVec b) { return (BitsVec)_mm256_##intrinsic##size((__m256i)a, (__m256i)b); }
#else
#define SCRIMP_INTERLEAVE(name, size, intrinsic, ...)                               \
  SCRIMP_INLINE BitsVec name(BitsVec a, BitsVec b) {                                \
    typedef uint##size##_t Elements __attribute__((vector_size(16)));               \
    return (BitsVec)__builtin_shufflevector((Elements)a, (Elements)b, __VA_ARGS__); \
  }
#endif
SCRIMP_INTERLEAVE(low_bytes, 8, unpacklo_epi, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
SCRIMP_INTERLEAVE(high_bytes, 8, unpackhi_epi, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
SCRIMP_INTERLEAVE(low_pairs, 16, unpacklo_epi, 0, 8, 1, 9, 2, 10, 3, 11)
SCRIMP_INTERLEAVE(high_pairs, 16, unpackhi_epi, 4, 12, 5, 13, 6, 14, 7, 15)
SCRIMP_INTERLEAVE(low_words, 32, unpacklo_epi, 0, 4, 1, 5)
SCRIMP_INTERLEAVE(high_words, 32, unpackhi_epi, 2, 6, 3, 7)
#undef SCRIMP_INTERLEAVE

// Bytes of four channels: words First to First + Count, where word r holds bytes 4 r + i of each 16 in lane i.
template <int First, int Count>
SCRIMP_INLINE void interleave(BitsVec (&w)[4]) {
  BitsVec first[Count / 2], second[Count / 2];
#pragma GCC unroll 2
  for (int half = 0; half < Count / 2; ++half) {
    const bool low = First + 2 * half == 0;
    first[half] = low ? low_bytes(w[0], w[1]) : high_bytes(w[0], w[1]);
    second[half] = low ? low_bytes(w[2], w[3]) : high_bytes(w[2], w[3]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < Count / 2; ++half) {
    w[2 * half] = low_pairs(first[half], second[half]), w[2 * half + 1] = high_pairs(first[half], second[half]);
  }
}

// Lanes r of vectors i become lanes i of vectors r, in each four.
SCRIMP_INLINE void turn(BitsVec (&v)[4]) {
  const BitsVec low02 = low_words(v[0], v[2]), high02 = high_words(v[0], v[2]);
  const BitsVec low13 = low_words(v[1], v[3]), high13 = high_words(v[1], v[3]);
  v[0] = low_words(low02, low13), v[1] = high_words(low02, low13);
  v[2] = low_words(high02, high13), v[3] = high_words(high02, high13);
}

// Calls body(Int<i>) for every nibble of a word.
template <class Body>
SCRIMP_INLINE void for_nibbles(Body body) {
  body(Int<0>{}), body(Int<1>{}), body(Int<2>{}), body(Int<3>{});
  body(Int<4>{}), body(Int<5>{}), body(Int<6>{}), body(Int<7>{});
}

// Where the codes of a span's channels lie, for the outputs of the part.
struct SpanCodes {
  int64_t channels;
  const uint8_t* channel[4 * kInt4SpanQuads];
};

// What the loops know: copies, so that no store can change them.
struct Given {
  const Int4SparsePart p;
  const Int4SparseRows x;
  const Int4SparseList list;

  explicit Given(const Int4SparsePart& part) : p(part), x(*part.x), list(*part.x->list) {}
};

// Sums of products with codes as fp32.
template <bool Book>
struct ExactMath : Given {
  using Lanes = Vec;
  static constexpr int kTileRows = kHeld / kVectors;  // rows of a step: the sums of all vectors are turned together
  const FloatCodes<Book> codes;

  explicit ExactMath(const Int4SparsePart& part) : Given(part), codes(part.codebook) {}

  // Adds a span's products for R rows from `row` on, with the codes `bytes` into the part. In the order of the
  // channels, one fused multiply-add after the other: a listed zero changes no bit.
  template <int R, int First>
  SCRIMP_INLINE void add(const Int4Span& span, const SpanCodes& from, int64_t bytes, int64_t row,
                         Vec (&sum)[R][kVectors]) const {
    for (int64_t j = 0; j < 4 * span.quads; ++j) {
      const BitsVec q = load_bits(from.channel[j] + bytes);
      const float* const at = x.values + (4 * span.first + j) * x.rows + row;
      Vec values[R];
      for_vectors<R, 1>([&](int r, int) { values[r] = broadcast(at[r]); });
      for_nibbles([&](auto nibble) __attribute__((always_inline)) {
        constexpr int I = decltype(nibble)::value;
        const Vec value = codes.template value<I>(q);
        for_vectors<R, 1>([&](int r, int) { sum[r][I] = fma(value, values[r], sum[r][I]); });
      });
    }
  }

  // Puts the sums of a block into the order of the outputs.
  template <int R>
  SCRIMP_INLINE void close(Vec (&sum)[R][kVectors]) const {
    for_vectors<R, 2>([&](int r, int h) {
      BitsVec v[4] = {(BitsVec)sum[r][h], (BitsVec)sum[r][2 + h], (BitsVec)sum[r][4 + h], (BitsVec)sum[r][6 + h]};
      turn(v);
      for_vectors<1, 4>([&](int, int i) { sum[r][2 * i + h] = (Vec)v[i]; });
    });
  }

  // What a block needs to know of a row.
  using OfRow = Vec;
  SCRIMP_INLINE OfRow of_row(int64_t at) const { return broadcast(x.sums[at]); }

  // Codes stand for q - 8: (q - z) s = (q - 8) s + (8 - z) s and q s + z = (q - 8) s + (z + 8 s).
  SCRIMP_INLINE Vec term(Vec sum, OfRow of_x, Vec scale, Vec zero, Vec total) const {
    total = fma(sum, scale, total);
    if (p.kind == Int4Zeros::none) return total;
    const Vec shift = p.kind == Int4Zeros::shift ? (8.0f - zero) * scale : fma(broadcast(8.0f), scale, zero);
    return fma(shift, of_x, total);
  }
};

// Sums of products of integers, four channels at a time.
template <bool Book, class Sums>
struct Int8Math : Given {
  using Lanes = IntVec;
  static constexpr int kTileRows = 2 * kHeld / kVectors;  // rows of a step, which may take half of the vectors
  const ByteCodes<Book> codes;
#if defined(SCRIMP_VNNI)
  static constexpr bool kWholeBytes = !Book;  // sums of whole bytes stand for those of upper nibbles until the end
#else
  static constexpr bool kWholeBytes = false;
#endif

  explicit Int8Math(const Int4SparsePart& part) : Given(part), codes{static_cast<const int8_t*>(part.codebook)} {}

  // Of the V vectors from First on.
  template <int R, int First, int V>
  SCRIMP_INLINE void add(const Int4Span& span, const SpanCodes& from, int64_t bytes, int64_t row,
                         IntVec (&sum)[R][V]) const {
    IntVec part[R][V];
    for_vectors<R, V>([&](int r, int i) { part[r][i] = Sums::start(sum[r][i]); });
#pragma GCC unroll 1
    for (int64_t quad = 0; quad < span.quads; ++quad) {
      BitsVec q[4];
      for_vectors<1, 4>([&](int, int i) { q[i] = load_bits(from.channel[4 * quad + i] + bytes); });
      interleave<First / 2, V / 2>(q);
      const int8_t* const at = x.integers + 4 * ((span.first + quad) * x.rows + row);
      IntVec values[R];
      for_vectors<R, 1>([&](int r, int) { values[r] = broadcast_word(at + 4 * r); });
      for_vectors<1, V / 2>([&](int, int i) {
        const BitsVec low = codes.values(q[i]), high = kWholeBytes ? q[i] : codes.values(q[i] >> 4);
        for_vectors<R, 1>([&](int r, int) {
          part[r][2 * i] = Sums::add(part[r][2 * i], low, values[r]);
          part[r][2 * i + 1] = Sums::add(part[r][2 * i + 1], high, values[r]);
        });
      });
    }
    for_vectors<R, V>([&](int r, int i) { sum[r][i] = Sums::finish(sum[r][i], part[r][i]); });
  }

  // A byte is 16 times its upper nibble and its lower one.
  template <int R, int V>
  SCRIMP_INLINE void close(IntVec (&sum)[R][V]) const {
    if constexpr (!kWholeBytes) return;
    for_vectors<R, V / 2>([&](int r, int i) { sum[r][2 * i + 1] = (sum[r][2 * i + 1] - sum[r][2 * i]) >> 4; });
  }

  struct OfRow {
    IntVec start;
    Vec sum, scale;
  };
  SCRIMP_INLINE OfRow of_row(int64_t at) const {
    return {IntVec{} + x.starts[at], broadcast(x.sums[at]), broadcast(x.scales[at])};
  }

  SCRIMP_INLINE Vec term(IntVec sum, const OfRow& of, Vec scale, Vec zero, Vec total) const {
    const Vec dot = __builtin_convertvector(sum + of.start, Vec);
    if (p.kind == Int4Zeros::shift) {
      return total + SCRIMP_ISA::term<Int4Zeros::shift>(dot, scale, zero, of.sum) * of.scale;
    }
    if (p.kind == Int4Zeros::offset) {
      return total + SCRIMP_ISA::term<Int4Zeros::offset>(dot, scale, zero, of.sum) * of.scale;
    }
    return total + SCRIMP_ISA::term<Int4Zeros::none>(dot, scale, zero, of.sum) * of.scale;
  }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
