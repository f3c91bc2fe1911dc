// Tiles of int4_linear: kTileVectors vectors of outputs x a few rows, whose sums over a block stay in registers.
#pragma once

#include "cpu/int4_linear.codes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileOutputs = kTileVectors * kLanes;
constexpr int kTileRows = kLanes == 16 ? 6 : 4;
constexpr int64_t kStrip = 32;  // columns whose products add up before they are widened

// Sums of products with limbs are taken modulo 2^32, which only the last of them needs to fit in.
SCRIMP_INLINE IntVec add(IntVec a, IntVec b) { return (IntVec)((BitsVec)a + (BitsVec)b); }
SCRIMP_INLINE IntVec next_limb(IntVec sum) { return (IntVec)((BitsVec)sum << 8); }

// What a tile reads of one block of columns. Strides: kPanel from column to column or group to group of outputs,
// kInt4Chunk from row to row of x, one from row to row of sums, scales and starts, kPanel from row to row of totals.
struct Block {
  int64_t columns, limbs, plane;
  const float* scales;
  const float* zeros;
  const float* sums;
  float* totals;
};

// totals += (scale) (sum of products) [+ (zero) (sum of x)], all in fp32; the order of the columns is the order of
// sums.
template <int C, bool Zeros>
void add_tile(const Block& b, const float* weights, const float* x) {
  Vec sum[kTileVectors][C] = {};
  for (int64_t k = 0; k < b.columns; ++k) {
    Vec w[kTileVectors];
    for_vectors<kTileVectors, 1>([&](int r, int) { w[r] = load(weights + k * kPanel + r * kLanes); });
    for_vectors<1, C>([&](int, int c) {
      const Vec value = broadcast(x[c * kInt4Chunk + k]);
      for_vectors<kTileVectors, 1>([&](int r, int) { sum[r][c] = fma(w[r], value, sum[r][c]); });
    });
  }
  for_vectors<kTileVectors, C>([&](int r, int c) {
    float* to = b.totals + c * kPanel + r * kLanes;
    Vec total = fma(sum[r][c], load(b.scales + r * kLanes), load(to));
    if constexpr (Zeros) total = fma(load(b.zeros + r * kLanes), broadcast(b.sums[c]), total);
    store(to, total);
  });
}

// totals += t (scale of x)
template <int C, Int4Zeros Kind, class Sums>
void add_tile(const Block& b, const uint32_t* weights, const int8_t* x, const float* x_scales, const int32_t* starts) {
  IntVec sum[kTileVectors][C] = {};
  for (int64_t limb = 0; limb < b.limbs; ++limb, x += b.plane) {
    if (limb > 0) for_vectors<kTileVectors, C>([&](int r, int c) { sum[r][c] = next_limb(sum[r][c]); });
    for (int64_t strip = 0; strip < b.columns; strip += kStrip) {
      const int64_t end = strip + kStrip < b.columns ? strip + kStrip : b.columns;
      IntVec part[kTileVectors][C];
      for_vectors<kTileVectors, C>([&](int r, int c) { part[r][c] = Sums::start(sum[r][c]); });
      for (int64_t word = strip / 4; word < (end + 7) / 8 * 2; ++word) {
        BitsVec w[kTileVectors];
        for_vectors<kTileVectors, 1>([&](int r, int) { w[r] = load_bits(weights + word * kPanel + r * kLanes); });
        for_vectors<1, C>([&](int, int c) {
          const IntVec value = broadcast_word(x + c * kInt4Chunk + word * 4);
          for_vectors<kTileVectors, 1>([&](int r, int) { part[r][c] = Sums::add(part[r][c], w[r], value); });
        });
      }
      for_vectors<kTileVectors, C>([&](int r, int c) { sum[r][c] = Sums::finish(sum[r][c], part[r][c]); });
    }
  }
  for_vectors<kTileVectors, C>([&](int r, int c) {
    const Vec dot = __builtin_convertvector(add(sum[r][c], IntVec{} + starts[c]), Vec);
    const Vec scale = load(b.scales + r * kLanes);
    const Vec t = term<Kind>(dot, scale, load(b.zeros + r * kLanes), broadcast(b.sums[c]));
    float* to = b.totals + c * kPanel + r * kLanes;
    store(to, load(to) + t * broadcast(x_scales[c]));
  });
}

// Writes a vector of outputs of one row, with the bias.
template <class T>
SCRIMP_INLINE void finish(const Int4Panel& p, const T* bias, int64_t row, int64_t n, Vec y) {
  if (bias) y += load_first(bias + n, p.outputs - n);
  store_first(static_cast<T*>(p.out) + row * p.out_stride + n, y, p.outputs - n);
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
