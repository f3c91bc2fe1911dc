// int4_linear, one row of x as values: what one row costs beyond reading the codes is their conversion, so that
// codes become values in registers and are used at once.
//
// A sum of products in the order of the columns is one chain of additions. A few chunks of a few outputs are walked at
// once, so that there are chains enough; the codes come from few rows of the weight at a time.
#pragma once

#include "cpu/int4_linear.groups.h"
#include "cpu/int4_linear.tiles.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kSide = 4;         // chunks side by side, at most
constexpr int kChunkWords = 16;  // words of 8 columns of a chunk

// Whether a row is multiplied by what follows.
SCRIMP_INLINE bool by_chunks(const Int4Rows& x) { return !x.limbs && x.rows == 1 && x.columns % 8 == 0; }

// Sums over the words [first, last) of each of C chunks, for kLanes outputs. words: [chunk][word][output].
template <bool Book, int C>
void add_words(const FloatCodes<Book>& codes, const uint32_t* words, const float* x, int first, int last,
               const uint8_t* ahead, Vec (&sums)[kSide]) {
  Vec sum[C] = {};
  for (int word = first; word < last; ++word) {
    BitsVec q[C];
    for_vectors<C, 1>([&](int c, int) {
      q[c] = load_bits(words + (c * kChunkWords + word) * kInt4RowPanel);
      __builtin_prefetch(ahead + (word * C + c) * kPieceBytes, 0, 2);
    });
    const auto add = [&](auto column) __attribute__((always_inline)) {
      constexpr int I = decltype(column)::value;
      for_vectors<C, 1>([&](int c, int) {
        sum[c] = fma(codes.template value<I>(q[c]), broadcast(x[c * kInt4Chunk + word * 8 + I]), sum[c]);
      });
    };
    add(Int<0>{}), add(Int<1>{}), add(Int<2>{}), add(Int<3>{});
    add(Int<4>{}), add(Int<5>{}), add(Int<6>{}), add(Int<7>{});
  }
  for_vectors<C, 1>([&](int c, int) { sums[c] = sum[c]; });
}

// The panel's outputs, kInt4RowPanel at most, for one row.
struct ValuesRowPanel {
  const Int4Panel& p;
  const Int4Rows& x = *p.x;
  float* const totals = p.scratch;                                                        // [output]
  float* const sums = totals + kInt4RowPanel;                                             // [chunk][block][output]
  uint32_t* const words = reinterpret_cast<uint32_t*>(sums + kSide * 8 * kInt4RowPanel);  // [chunk][word][output]
  Groups groups{p, sums + kSide * (8 + kChunkWords) * kInt4RowPanel};

  // C chunks, of which only a single one may be short.
  template <bool Book, int C>
  void add_chunks(int64_t chunk, int columns) {
    const FloatCodes<Book> codes(p.codebook);
    for (int c = 0; c < C; ++c) {
      for_codes(p, chunk + c, [&](int n, int word, BitsVec q) __attribute__((always_inline)) {
        memcpy(words + (c * kChunkWords + word) * kInt4RowPanel + n, &q, sizeof q);
      });
    }
    const int block_words = static_cast<int>(x.block / 8), blocks = (columns + 8 * block_words - 1) / (8 * block_words);
    const float* const from = x.values + chunk * kInt4Chunk;
    for (int n = 0; n < p.outputs; n += kLanes) {
      const uint8_t* ahead = p.next + (chunk * kInt4RowPanel + n * C) * 64;
      for (int block = 0; block < blocks; ++block) {
        const int first = block * block_words;
        const int last = first + block_words < columns / 8 ? first + block_words : columns / 8;
        Vec sum[kSide];
        add_words<Book, C>(codes, words + n, from, first, last, ahead, sum);
        for (int c = 0; c < C; ++c) store(sums + (c * blocks + block) * kInt4RowPanel + n, sum[c]);
      }
    }
    for (int64_t block = 0; block < C * blocks; ++block) {
      const int64_t at = groups.find((chunk * kInt4Chunk + block * x.block) / p.group);
      const Vec sum_x = broadcast(x.sums[chunk * kInt4Chunk / x.block + block]);
      for (int n = 0; n < p.outputs; n += kLanes) {
        Vec total = fma(load(sums + block * kInt4RowPanel + n), load(groups.scales + at + n), load(totals + n));
        if (p.zeros) total = fma(load(groups.zeros + at + n), sum_x, total);
        store(totals + n, total);
      }
    }
  }

  template <bool Book>
  void run() {
    memset(totals, 0, sizeof(float) * kInt4RowPanel);
    const int64_t whole = x.columns / kInt4Chunk;
    for (int64_t chunk = 0, count; chunk < whole; chunk += count) {
      count = whole - chunk < kSide ? whole - chunk : kSide;
      with_constant<kSide>(count, [&](auto c) { add_chunks<Book, decltype(c)::value>(chunk, kInt4Chunk); });
    }
    if (x.columns % kInt4Chunk) add_chunks<Book, 1>(whole, static_cast<int>(x.columns % kInt4Chunk));
    with_type(p.type, p.bias, [&](auto* bias) {
      for (int64_t n = 0; n < p.outputs; n += kLanes) finish(p, bias, 0, n, load(totals + n));
    });
  }

  void run() { p.codebook ? run<true>() : run<false>(); }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
