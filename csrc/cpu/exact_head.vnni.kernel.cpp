// exact_head, the loops of the screen: dot products of integers, exact whatever their order, hence the same bits for
// every instruction set up to the scale and bound that close a row.
//
// A vector of codes holds kLanes rows of the head x 2 words of 16 bits; a word holds 2 or 4 coordinates, which are cut
// out by a shift and a mask and multiplied pairwise with the hidden state's integers; with VNNI as bytes, four at a
// time. Integers of a hidden state have 16 bits, but in most groups their lower byte is 0: there the upper one is
// enough.
#include "cpu/exact_head.h"

#include "common/byte_products.h"
#include "common/simd.h"
#include "common/unroll.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int64_t kPairs = kScreenGroup / 2;
constexpr int kLargest = 32639;  // 127 * 256 + 127
constexpr int kLargestByte = 127;
constexpr double kShare = 0.1;               // of the bound: where a byte would add more in one group, it has two
constexpr int kMost = kLanes == 16 ? 8 : 4;  // hidden states whose sums stay in registers
constexpr int64_t kVectorBytes = 4 * kScreenTile;
constexpr int64_t kVectors = kScreenTile / kLanes;  // of rows in a tile
constexpr int kTogether = 2;                        // of them, whose sums share what is read of the hidden states

SCRIMP_INLINE IntVec broadcast_int(int32_t x) { return (IntVec)broadcast(__builtin_bit_cast(float, x)); }

#if defined(SCRIMP_VNNI)
constexpr int kQuads = kScreenGroup / 4;

// Four bytes of integers for each of the group's kQuads vectors of bytes of codes: first the upper ones, then the lower
// ones. A vector of codes of 8 bits is one of bytes; of 4 bits it is two, the lower and the upper half of each byte.
SCRIMP_INLINE void put_integers(const int16_t* integers, bool wide, int32_t* pieces, int64_t stride) {
  constexpr int kOrder[2][4] = {{0, 4, 1, 5}, {0, 2, 1, 3}};
  for (int quad = 0; quad < kQuads; ++quad) {
    const int16_t* from = integers + (wide ? 4 * quad : quad / 2 * 8 + quad % 2 * 2);
    int8_t upper[4], lower[4];
    for (int i = 0; i < 4; ++i) {
      const int integer = from[kOrder[wide][i]];
      upper[i] = static_cast<int8_t>((integer + 128) >> 8);
      lower[i] = static_cast<int8_t>(integer);
    }
    memcpy(pieces + quad * stride, upper, sizeof upper);
    memcpy(pieces + (kQuads + quad) * stride, lower, sizeof lower);
  }
}

// sum[r][c] += one group of kLanes rows of the head, from codes[r] on, x one byte of each integer of hidden state c
template <int Bits, int R, int C>
SCRIMP_INLINE void add_bytes(IntVec (&sum)[R][C], const uint8_t* const (&codes)[R], int64_t ahead,
                             const int32_t* pieces, int64_t stride) {
  constexpr int kFields = 8 / Bits;
#pragma GCC unroll 4
  for (int vector = 0; vector < 2 * Bits; ++vector) {
    BitsVec bits[R];
    for_vectors<R, 1>([&](int r, int) {
      memcpy(&bits[r], codes[r] + vector * kVectorBytes, sizeof bits[r]);
      __builtin_prefetch(codes[r] + vector * kVectorBytes + ahead, 0, 2);
    });
#pragma GCC unroll 2
    for (int field = 0; field < kFields; ++field, pieces += stride) {
      BitsVec piece[R];
      for_vectors<R, 1>([&](int r, int) { piece[r] = Bits == 8 ? bits[r] : bits[r] >> Bits * field & 0x0f0f0f0f; });
      for_vectors<1, C>([&](int, int c) {
        const IntVec quad = broadcast_int(pieces[c]);
        for_vectors<R, 1>([&](int r, int) { sum[r][c] = WideSums::add(sum[r][c], piece[r], quad); });
      });
    }
  }
}

// sum[r][c] = one group of kLanes rows of the head, from codes[r] on, x hidden state c, whose bytes lie every `stride`;
// it is 0 before
template <int Bits, int R, int C>
SCRIMP_INLINE void add_group(IntVec (&sum)[R][C], const uint8_t* const (&codes)[R], int64_t ahead,
                             const int32_t* pieces, int64_t stride, bool fine) {
  add_bytes<Bits, R, C>(sum, codes, ahead, pieces, stride);
  for_vectors<R, C>([&](int r, int c) { sum[r][c] <<= 8; });
  if (fine) add_bytes<Bits, R, C>(sum, codes, ahead, pieces + kQuads * stride, stride);
}
#else
// The integers of a group, two and two.
SCRIMP_INLINE void put_integers(const int16_t* integers, bool, int32_t* pieces, int64_t stride) {
  for (int64_t pair = 0; pair < kPairs; ++pair) memcpy(pieces + pair * stride, integers + 2 * pair, sizeof(int32_t));
}

typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));

// Lane by lane `sum` and two products of signed 16-bit words.
SCRIMP_INLINE IntVec add_pieces(IntVec sum, Words a, IntVec b) {
#if defined(__AVX512F__)
  return sum + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const IntVec x = (IntVec)a;
  return sum + (x << 16 >> 16) * (b << 16 >> 16) + (x >> 16) * (b >> 16);
#endif
}

// sum[r][c] += one group of kLanes rows of the head, from codes[r] on, x hidden state c, whose pairs lie every `stride`
template <int Bits, int R, int C>
SCRIMP_INLINE void add_group(IntVec (&sum)[R][C], const uint8_t* const (&codes)[R], int64_t ahead,
                             const int32_t* pieces, int64_t stride, bool) {
  constexpr int kFields = 16 / Bits;
  constexpr uint16_t kMask = (1 << Bits) - 1;
#pragma GCC unroll 4
  for (int vector = 0; vector < 2 * Bits; ++vector) {
    Words words[R];
    for_vectors<R, 1>([&](int r, int) {
      memcpy(&words[r], codes[r] + vector * kVectorBytes, sizeof words[r]);
      __builtin_prefetch(codes[r] + vector * kVectorBytes + ahead, 0, 2);
    });
#pragma GCC unroll 4
    for (int field = 0; field < kFields; ++field, pieces += stride) {
      Words piece[R];
      for_vectors<R, 1>([&](int r, int) {
        piece[r] = words[r] >> Bits * field;
        if (field + 1 < kFields) piece[r] &= kMask;
      });
      for_vectors<1, C>([&](int, int c) {
        const IntVec pair = broadcast_int(pieces[c]);
        for_vectors<R, 1>([&](int r, int) { sum[r][c] = add_pieces(sum[r][c], piece[r], pair); });
      });
    }
  }
}
#endif

// Centres of R x kLanes rows of the head for C hidden states from `first` on, without the rows' scales.
template <int R, int C>
SCRIMP_INLINE void add_groups(const ScreenBlock& b, int64_t first, const uint8_t* (&codes)[R], int64_t ahead,
                              Vec (&total)[R][C]) {
  const int32_t* pieces = b.pieces + first;
  const int32_t* offset = b.offset + first * b.groups;
  const float* step = b.step + first * b.groups;
  const auto group = [&](auto bits, int64_t g) {
    constexpr int kBits = decltype(bits)::value;
    IntVec sum[R][C] = {};
    add_group<kBits, R, C>(sum, codes, ahead, pieces + g * kPairs * b.rows, b.rows, b.fine[g]);
    for_vectors<R, C>([&](int r, int c) {
      const IntVec exact = sum[r][c] - broadcast_int(offset[c * b.groups + g]);
      total[r][c] = fma(broadcast(step[c * b.groups + g]), __builtin_convertvector(exact, Vec), total[r][c]);
    });
    for_vectors<R, 1>([&](int r, int) { codes[r] += 2 * kBits * kVectorBytes; });
  };
  for (int64_t g = 0; g < b.wide; ++g) group(Int<8>{}, g);
  for (int64_t g = b.wide; g < b.groups; ++g) group(Int<4>{}, g);
}

// Vectors [at, at + R) of the block's rows of the head, of which kVectors are a tile.
template <int R, int C>
void screen_rows(const ScreenBlock& b, int64_t first, int64_t at) {
  const int64_t bytes = kScreenTile * kScreenGroup / 2 * (b.groups + b.wide);
  const uint8_t* codes[R];
  for_vectors<R, 1>(
      [&](int r, int) { codes[r] = b.codes + (at + r) / kVectors * bytes + (at + r) % kVectors * (4 * kLanes); });
  Vec total[R][C] = {};
  add_groups<R, C>(b, first, codes, R > kVectors ? R * bytes : bytes, total);
  for_vectors<R, C>([&](int r, int c) {
    const int64_t state = first + c, tile = (at + r) / kVectors;
    const Vec scale = load(b.scales + (at + r) * kLanes);
    const float centre = highest_lane(scale * total[r][c]);
    const float upper = highest_lane(scale * (total[r][c] + broadcast(b.bound[state])));
    float &best = b.centre[state * b.best_stride + tile], &top = b.upper[state * b.best_stride + tile];
    const bool fresh = (at + r) % kVectors == 0;
    best = fresh || centre > best ? centre : best;
    top = fresh || upper > top ? upper : top;
    store(b.totals + state * b.best_stride * kScreenTile + (at + r) * kLanes, total[r][c]);
  });
}

// A group's integers as multiples of `unit`, at most `largest` of them; returns the length of what they leave over.
double round_group(const float* h, float size, int largest, int unit, int16_t* integers, float& step) {
  const float coarse = size / static_cast<float>(largest);
  double left = 0;
  for (int64_t i = 0; i < kScreenGroup; ++i) {
    const float scaled = coarse > 0 ? h[i] / coarse : 0.0f;
    const auto near = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    const int32_t integer = unit * (near > largest ? largest : near < -largest ? -largest : near);
    const double behind = h[i] - static_cast<double>(coarse / static_cast<float>(unit)) * integer;
    integers[i] = static_cast<int16_t>(integer);
    left += behind * behind;
  }
  step = coarse / static_cast<float>(unit);
  return __builtin_sqrt(left);
}

}  // namespace

void exact_head_state(const ScreenState& s) {
  double bound = s.rest, sums = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    double length = 0;
    for (int64_t i = g * kScreenGroup; i < (g + 1) * kScreenGroup; ++i)
      length += static_cast<double>(s.coordinates[i]) * s.coordinates[i];
    length = __builtin_sqrt(length);
    bound += length * s.error[g];
    sums += length * s.norm[g];
  }
  const double most = kShare * bound;
  for (int64_t g = 0; g < s.groups; ++g) {
    const float* h = s.coordinates + g * kScreenGroup;
    float size = 0;
    for (int64_t i = 0; i < kScreenGroup; ++i) {
      const float own = __builtin_fabsf(h[i]);
      size = own > size ? own : size;
    }
    int16_t integers[kScreenGroup];
    double left = round_group(h, size, kLargestByte, 256, integers, s.step[g]);
    if (left * s.norm[g] > most) {
      s.fine[g] = 1;
      left = round_group(h, size, kLargest, 1, integers, s.step[g]);
    }
    int32_t sum = 0;
    for (const int16_t integer : integers) sum += integer;
    put_integers(integers, g < s.wide, s.pieces + g * kPairs * s.stride, s.stride);
    s.offset[g] = sum * (g < s.wide ? 128 : 8);
    bound += left * s.norm[g];
    sums += left * s.norm[g];
  }
  // rounding of the screen's own fp32 sums
  bound += static_cast<double>(2 * s.groups + 8) * 0x1p-24 * sums;
  *s.bound = static_cast<float>(bound * (1 + 0x1p-20));
}

void exact_head_screen(const ScreenBlock& b) {
  const int64_t vectors = b.tiles * kVectors;
  for (int64_t at = 0; at < vectors; at += kTogether) {
    for (int64_t first = 0; first < b.rows; first += kMost) {
      const int64_t count = b.rows - first < kMost ? b.rows - first : kMost;
      with_constant<kMost>(count, [&](auto size) {
        if (at + kTogether <= vectors) return screen_rows<kTogether, size.value>(b, first, at);
        screen_rows<1, size.value>(b, first, at);
      });
    }
  }
}

}  // namespace scrimp::SCRIMP_ISA
