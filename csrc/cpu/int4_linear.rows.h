// int4_linear, rows of x: in the order of the weight's columns, then as integers where the processor multiplies bytes.
//
// Exact mode's integers are of 24 bits: 2^16 l0 + 2^8 l1 + l2, with limbs that are signed bytes. Each is multiplied as
// int8 mode's integers are, and the sum over a block of up to 32 columns is exact.
#pragma once

#include "common/int4_codes.h"
#include "common/with_type.h"
#include "cpu/int4_linear.h"

namespace scrimp::SCRIMP_ISA {
namespace {

typedef int8_t QuarterVec __attribute__((vector_size(kLanes)));
typedef uint16_t PairVec __attribute__((vector_size(kLanes)));
typedef uint8_t PairHalf __attribute__((vector_size(kLanes / 2)));

// fp32, in the order of the weight's columns, zeros behind them to the end of a chunk.
const float* ordered(const Int4Row& row) {
  const int64_t columns = row.to->columns, padded = (columns + kInt4Chunk - 1) / kInt4Chunk * kInt4Chunk;
  with_type(row.type, row.x, [&](auto* x) {
    if (row.permutation) {
      for (int64_t k = 0; k < columns; ++k) row.scratch[k] = one(x + row.permutation[k]);
    } else {
      for (int64_t k = 0; k < columns; k += kLanes) {
        store_first(row.scratch + k, load_first(x + k, columns - k), columns - k);
      }
    }
  });
  memset(row.scratch + columns, 0, sizeof(float) * (padded - columns));
  return row.scratch;
}

// 2^exponent for exponents of -126 to 127.
SCRIMP_INLINE float power_of_two(int32_t exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// Steps of exact mode: powers of two, so that numbers of few digits stay what they are. Integers are below
// (1 - 2^-7) 2^23, because limbs of 127 make less than 2^23: a number too close to the next power of two counts as one
// above it. Neither the step nor its inverse is denormal.
SCRIMP_INLINE Steps fine_steps_of(const float* x, int64_t columns) {
  const uint32_t most = largest_bits(x, columns);
  if (most >= kInfinityBits) return {0.0f, __builtin_nanf(""), false};
  const int32_t exponent = static_cast<int32_t>((most + (1u << 17)) >> 23) - 127;
  const int32_t step = exponent < -104 ? -126 : exponent - 22;
  return {power_of_two(-step), power_of_two(step), true};
}

// x to the nearest integers, below 2^23.
SCRIMP_INLINE IntVec nearest(Vec x) {
  const BitsVec half = ((BitsVec)x & 0x80000000u) | (BitsVec)broadcast(0.5f);
  return __builtin_convertvector(x + (Vec)half, IntVec);
}

constexpr int kVectorColumns = 8 * kLanes;  // columns of a vector of codes

// Whether x is packed for, and multiplied by, the loops of one row.
SCRIMP_INLINE bool by_rows(const Int4Rows& x) { return x.limbs && x.rows == 1; }

// x[begin, begin + columns) to integers: of each Span columns first the even ones, with `stride` bytes from one Span to
// the next and `plane` bytes from limb to limb. Returns their sum, and their scale in *scale.
template <int Limbs, int Span>
int32_t quantize(const float* x, int64_t begin, int64_t columns, int8_t* to, int64_t stride, int64_t plane,
                 float* scale) {
  const Steps found = Limbs == 1 ? steps_of(x + begin, columns) : fine_steps_of(x + begin, columns);
  *scale = found.scale;
  if (!found.usable) return 0;
  const Vec steps = broadcast(found.steps);
  IntVec sum{};
  for (int64_t k = begin; k < begin + columns; k += kLanes) {
    IntVec n;
    if constexpr (Limbs == 1) {
      n = __builtin_convertvector(round_steps(load(x + k), steps), IntVec);
      sum += n;
    } else {
      n = nearest(load(x + k) * steps);
      sum += n;
      n = (n + 0x808080) ^ 0x808080;  // a byte of 128 and more takes 256 from the next one
    }
    for (int limb = Limbs - 1; limb >= 0; --limb, n >>= 8) {
      const auto pairs = (PairVec) __builtin_convertvector(n, QuarterVec);
      const PairHalf even = __builtin_convertvector(pairs & 0xff, PairHalf);
      const PairHalf odd = __builtin_convertvector(pairs >> 8, PairHalf);
      constexpr int kRun = Span < kLanes ? Span : kLanes;
      for (int i = 0; i < kLanes; i += kRun) {
        int8_t* const at = to + limb * plane + (k + i) / Span * stride + (k + i) % Span / 2;
        memcpy(at, reinterpret_cast<const char*>(&even) + i / 2, kRun / 2);
        memcpy(at + Span / 2, reinterpret_cast<const char*>(&odd) + i / 2, kRun / 2);
      }
    }
  }
  int32_t total;
  const float bits = fold_lanes((Vec)sum, [](Vec a, Vec b) { return (Vec)((IntVec)a + (IntVec)b); });
  memcpy(&total, &bits, sizeof total);
  return total;
}

SCRIMP_INLINE int32_t quantize(const Int4Rows& rows, const float* x, int64_t begin, int64_t columns, int8_t* to,
                               float* scale) {
  constexpr int kSpan = kVectorColumns;
  if (rows.limbs == 1) {
    if (by_rows(rows)) return quantize<1, kSpan>(x, begin, columns, to, kSpan, kSpan, scale);
    return quantize<1, 8>(x, begin, columns, to, 8, rows.plane, scale);
  }
  if (by_rows(rows)) return quantize<3, kSpan>(x, begin, columns, to, 3 * kSpan, kSpan, scale);
  return quantize<3, 8>(x, begin, columns, to, 8, rows.plane, scale);
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
