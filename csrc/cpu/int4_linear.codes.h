// Codes of a chunk of the weight's rows become vectors with outputs in the lanes.
#pragma once

#include "common/int4_codes.h"
#include "common/unroll.h"
#include "common/with_type.h"
#include "cpu/int4_linear.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kPanel = kInt4Panel;
constexpr int kPieces = 16 / kLanes;  // vectors of codes in a chunk of a row
constexpr int kPieceBytes = 4 * kLanes;

// Calls put(first output, word, codes) for all words of 8 columns of a chunk, with kLanes outputs' codes in the lanes.
template <class Put>
SCRIMP_INLINE void for_codes(const Int4Panel& p, int64_t chunk, Put put) {
  const int64_t bytes = p.x->columns / 2 - chunk * 64, stride = p.codes_stride;
  const uint8_t* const first = p.codes + chunk * 64;
  const bool whole = first + (p.outputs - 1) * stride + 64 <= p.codes_end;
  for (int n = 0; n < kPanel && n < p.outputs; n += kLanes) {
    for (int piece = 0; piece < kPieces && piece * kPieceBytes < bytes; ++piece) {
      const uint8_t* at = first + n * stride + piece * kPieceBytes;
      Vec words[kLanes];
      if (whole && n + kLanes <= p.outputs) [[likely]] {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) words[i] = (Vec)load_bits(at + i * stride);
      } else {
        for (int i = 0; i < kLanes; ++i, at += n + i < p.outputs ? stride : 0) {
          uint8_t some[kPieceBytes] = {};
          memcpy(some, at, p.codes_end - at < kPieceBytes ? p.codes_end - at : kPieceBytes);
          words[i] = (Vec)load_bits(some);
        }
      }
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) put(n, piece * kLanes + i, (BitsVec)words[i]);
    }
  }
}

// Fetches what lies at this place of the next panel, were its codes of a chunk one array: few at a time, because more
// would stall the loads.
SCRIMP_INLINE void fetch_next(const Int4Panel& p, int64_t chunk, int n, int word) {
  __builtin_prefetch(p.next + chunk * kPanel * 64 + n * 64 + word * kPieceBytes, 0, 2);
}

// to[column][output] of a chunk: codes - 8, or the codebook's entries
template <bool Book>
void unpack(const Int4Panel& p, int64_t chunk, float* to) {
  const FloatCodes<Book> codes(p.codebook);
  for_codes(p, chunk, [&](int n, int word, BitsVec q) __attribute__((always_inline)) {
    float* at = to + word * 8 * kPanel + n;
    fetch_next(p, chunk, n, word);
    store(at, codes.template value<0>(q));
    store(at + kPanel, codes.template value<1>(q));
    store(at + 2 * kPanel, codes.template value<2>(q));
    store(at + 3 * kPanel, codes.template value<3>(q));
    store(at + 4 * kPanel, codes.template value<4>(q));
    store(at + 5 * kPanel, codes.template value<5>(q));
    store(at + 6 * kPanel, codes.template value<6>(q));
    store(at + 7 * kPanel, codes.template value<7>(q));
  });
}

// to[word][even columns, odd columns][output] of a chunk: codes, or the codebook's entries + 128
template <bool Book>
void unpack(const Int4Panel& p, int64_t chunk, uint32_t* to) {
  const ByteCodes<Book> codes{static_cast<const int8_t*>(p.codebook)};
  for_codes(p, chunk, [&](int n, int word, BitsVec q) __attribute__((always_inline)) {
    const BitsVec even = codes.values(q), odd = codes.values(q >> 4);
    fetch_next(p, chunk, n, word);
    memcpy(to + 2 * word * kPanel + n, &even, sizeof even);
    memcpy(to + (2 * word + 1) * kPanel + n, &odd, sizeof odd);
  });
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
