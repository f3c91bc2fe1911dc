// codebook_topk, the loops: tiles of rows x codes, whose scores are compared with each row's k-th best at once.
//
// Codes are packed in panels of two vectors, a code a lane, so that a tile is a matrix product: every score is the
// same sum in the order of D, whatever the tile is. Few vectors hold a score that passes; those lanes are inserted one
// by one in the order of codes, so that of equal scores the lower code stays before the other.
#include "cpu/codebook_topk.h"

#include <math.h>

#include "common/unroll.h"
#include "common/with_type.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kTile = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // rows whose sums the registers hold
constexpr int kSum = 256;           // numbers that are summed one by one; then such sums are
constexpr int kPanel = 2 * kLanes;  // codes of a tile
static_assert(kCodebookPanel % kPanel == 0);

// ---- packing ----

// Rows become tiles [D][rows of the tile].
template <class T>
void pack_rows(const CodebookSearch& s) {
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t tile = row / kTile * kTile, pitch = s.rows - tile < kTile ? s.rows - tile : kTile;
    const T* x = static_cast<const T*>(s.x[row]);
    float* to = s.packed_rows + tile * s.width + row - tile;
    for (int64_t d = 0; d < s.width; d += kLanes) {
      const Vec some = load_first(x + d, s.width - d);
      for (int64_t i = 0; i < kLanes && d + i < s.width; ++i) to[(d + i) * pitch] = some[i];
    }
  }
}

// The next numbers of kLanes codes, zeros where there are none.
template <class T>
SCRIMP_INLINE void load_block(Vec (&block)[kLanes], const T* from, int64_t stride, int64_t codes, int64_t numbers) {
  if (codes >= kLanes && numbers >= kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      __builtin_prefetch(from + (kLanes + i) * stride);  // codes are short for the hardware to foresee
      block[i] = load(from + i * stride);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) block[i] = i < codes ? load_first(from + i * stride, numbers) : Vec{};
  }
}

// Up to kLanes codes become a vector for each d, kPanel apart, and one of what is added to their scores.
template <class T>
void pack_lanes(const CodebookSearch& s, const T* codebook, int64_t code, int64_t count, float* to) {
  const T* from = codebook + code * s.codebook_stride;
  Vec norm{}, lost{};  // a sum of squares, compensated: its rounding would be that of a number larger than the scores
  for (int64_t d = 0; d < s.width; d += kLanes) {
    const int64_t numbers = s.width - d;
    Vec block[kLanes];
    load_block(block, from + d, s.codebook_stride, count, numbers);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i < numbers) store(to + (d + i) * kPanel, block[i]);
    }
    if (!s.euclidean) continue;
    Vec squares{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) squares = fma(block[i], block[i], squares);  // zeros behind the width
    const Vec more = squares + lost, sum = norm + more;
    lost = more - (sum - norm);
    norm = sum;
  }
  const Vec bias = s.bias && count > 0 ? load_first(s.bias + code, count) : Vec{};
  store(to + s.width * kPanel, s.euclidean ? bias - 0.5f * norm : bias);
}

template <class T>
void pack_codes(const CodebookSearch& s, const T* codebook, int64_t first, int64_t last) {
  float* to = s.packed_codes;
  for (int64_t code = first; code < last; code += kPanel, to += (s.width + 1) * kPanel) {
    pack_lanes(s, codebook, code, last - code, to);
    pack_lanes(s, codebook, code + kLanes, last - code - kLanes, to + kLanes);
  }
}

// ---- the best codes of a row ----

void put(float* scores, int32_t* index, int64_t k, float score, int32_t code) {
  if (score != score) {
    for (int64_t i = 0; i < k; ++i) {
      scores[i] = NAN;
      index[i] = -1;
    }
  }
  if (!(score > scores[k - 1])) return;  // that of a broken row is NaN
  int64_t i = k - 1;
  for (; i > 0 && scores[i - 1] < score; --i) {
    scores[i] = scores[i - 1];
    index[i] = index[i - 1];
  }
  scores[i] = score;
  index[i] = code;
}

// Bit i: whether lane i is above the bar, or either of them is NaN.
SCRIMP_INLINE uint32_t lanes_above(Vec x, Vec bar) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bar, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)bar, _CMP_NLE_UQ)));
#else
  const IntVec above = ~(x <= bar) & IntVec{1, 2, 4, 8};
  return static_cast<uint32_t>(above[0] | above[1] | above[2] | above[3]);
#endif
}

// sum += products of C rows and a panel over `count` numbers; both pointers move behind these.
template <int C>
SCRIMP_INLINE void add_products(Vec (&sum)[C][2], const float*& x, const float*& panel, int64_t count) {
  for (int64_t d = 0; d < count; ++d, x += C, panel += kPanel) {
    const Vec low = load(panel), high = load(panel + kLanes);
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      const Vec own = broadcast(x[c]);
      sum[c][0] = fma(low, own, sum[c][0]);
      sum[c][1] = fma(high, own, sum[c][1]);
    }
  }
}

// The scores of C rows for a panel, of which `exist` has the codes that there are.
template <int C>
void tile(const CodebookSearch& s, int64_t row, const float* panel, int64_t code, uint32_t exist) {
  const float* x = s.packed_rows + row * s.width;
  const int64_t before = s.width ? (s.width - 1) / kSum * kSum : 0;  // numbers before the last sum
  float found[C][kPanel];
  for (int64_t d = 0; d < before; d += kSum) {
    Vec part[C][2] = {};
    add_products<C>(part, x, panel, kSum);
#pragma GCC unroll 12
    for (int c = 0; c < C; ++c) {
      store(found[c], d ? load(found[c]) + part[c][0] : part[c][0]);
      store(found[c] + kLanes, d ? load(found[c] + kLanes) + part[c][1] : part[c][1]);
    }
  }
  Vec sum[C][2] = {};
  add_products<C>(sum, x, panel, s.width - before);
  const Vec low = load(panel), high = load(panel + kLanes);
  float* scores = s.scores + row * s.found_stride;
  uint32_t passed[C];
#pragma GCC unroll 12
  for (int c = 0; c < C; ++c) {
    const Vec bar = broadcast(scores[c * s.found_stride + s.k - 1]);
    Vec a = sum[c][0], b = sum[c][1];
    if (before) {
      a += load(found[c]);
      b += load(found[c] + kLanes);
    }
    a += low;
    b += high;
    store(found[c], a);
    store(found[c] + kLanes, b);
    passed[c] = (lanes_above(a, bar) | lanes_above(b, bar) << kLanes) & exist;
  }
  for (int c = 0; c < C; ++c) {
    for (uint32_t lanes = passed[c]; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const int64_t at = (row + c) * s.found_stride;
      put(s.scores + at, s.index + at, s.k, found[c][lane], static_cast<int32_t>(code + lane));
    }
  }
}

template <class T>
void find(const CodebookSearch& s, const T* codebook) {
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t i = 0; i < s.k; ++i) {
      s.scores[row * s.found_stride + i] = -INFINITY;
      s.index[row * s.found_stride + i] = -1;
    }
  }
  pack_rows<T>(s);
  for (int64_t first = s.first; first < s.last; first += s.block) {
    const int64_t last = first + s.block < s.last ? first + s.block : s.last;
    pack_codes(s, codebook, first, last);
    for (int64_t row = 0; row < s.rows; row += kTile) {
      with_constant<kTile>(s.rows - row, [&](auto size) {
        const float* panel = s.packed_codes;
        for (int64_t code = first; code < last; code += kPanel, panel += (s.width + 1) * kPanel) {
          const uint32_t exist = last - code < kPanel ? (uint32_t{1} << (last - code)) - 1 : ~uint32_t{0};
          tile<size.value>(s, row, panel, code, exist);
        }
      });
    }
  }
}

// ---- their sum or mean ----

template <class T>
void add_up_row(const CodebookGather& g, const T* codebook, const float* scores, const int32_t* index, T* out) {
  int64_t count = 0;
  while (count < g.k && index[count] >= 0) ++count;
  const bool broken = scores[0] != scores[0];
  const Vec share = broadcast(g.mean && count ? static_cast<float>(count) : 1.0f);
  for (int64_t d = 0; d < g.width; d += kLanes) {
    Vec sum = broadcast(broken ? NAN : 0.0f);
    for (int64_t i = 0; i < count; ++i) sum += load_first(codebook + index[i] * g.codebook_stride + d, g.width - d);
    store_first(out + d, sum / share, g.width - d);
  }
}

template <class T>
void add_up(const CodebookGather& g, const T* codebook) {
  for (int64_t row = 0; row < g.rows; ++row) {
    float* scores = g.scores + row * g.found_stride;
    int32_t* index = g.index + row * g.found_stride;
    for (int64_t part = 0; part < g.parts; ++part) {
      const int64_t at = part * g.part_stride + row * g.k;
      for (int64_t i = 0; i < g.k; ++i) put(scores, index, g.k, g.more_scores[at + i], g.more_index[at + i]);
    }
    add_up_row(g, codebook, scores, index, static_cast<T*>(g.out) + row * g.out_stride);
  }
}

}  // namespace

void codebook_topk(const CodebookSearch& search) {
  with_type(search.type, search.codebook, [&](auto* codebook) { find(search, codebook); });
}

void codebook_topk_gather(const CodebookGather& gather) {
  with_type(gather.type, gather.codebook, [&](auto* codebook) { add_up(gather, codebook); });
}

}  // namespace scrimp::SCRIMP_ISA
