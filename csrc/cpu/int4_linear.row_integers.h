// int4_linear, one row of x as integers: the weight is read once, in the order of its addresses.
//
// A vector of codes is split into its even and its odd columns, and x lies in that order. Neighbouring lanes are added
// until each lane holds the product of one block, with kLanes blocks of an output in a vector: their scales lie so in
// memory. Terms of kLanes outputs are transposed at the end, so that the sum over blocks keeps their order.
#pragma once

#include "cpu/int4_linear.tiles.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int64_t kAhead = 4096;  // bytes from a code that is read to the one that is fetched

// Lane i: the sum of the lanes [Count i, Count (i + 1)) of all vectors laid side by side.
template <int Count>
SCRIMP_INLINE IntVec add_neighbours(IntVec (&x)[Count]) {
#pragma GCC unroll 4
  for (int half = Count / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const IntVec a = x[2 * i], b = x[2 * i + 1];
#if defined(__AVX512F__)
      x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
             __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
      x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
             __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
      x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
    }
  }
  return x[0];
}

// The first half of the elements, each twice.
SCRIMP_INLINE Vec twice(Vec x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3);
#else
  return __builtin_shufflevector(x, x, 0, 0, 1, 1);
#endif
}

// Products of the kLanes blocks whose codes begin at `codes`, of which the output has `bytes`; a block is 8 Vectors
// columns.
template <bool Book, class Sums, int Vectors, int Limbs>
SCRIMP_INLINE IntVec multiply_blocks(const ByteCodes<Book>& of, const uint8_t* codes, int64_t bytes, const int8_t* x,
                                     const uint8_t* ahead) {
  IntVec sums[Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Vectors; ++i) {
    sums[i] = IntVec{};
    const int at = i * kPieceBytes;
    if (at < bytes) {
      const BitsVec q = load_bits(codes + at), even = of.values(q), odd = of.values(q >> 4);
#pragma GCC unroll 3
      for (int limb = 0; limb < Limbs; ++limb) {
        const int8_t* from = x + 2 * (i * Limbs + limb) * kPieceBytes;
        if (limb > 0) sums[i] = next_limb(sums[i]);
        IntVec part = Sums::start(sums[i]);
        part = Sums::add(part, even, (IntVec)load_bits(from));
        part = Sums::add(part, odd, (IntVec)load_bits(from + kPieceBytes));
        sums[i] = Sums::finish(sums[i], part);
      }
      if (at % 64 == 0) __builtin_prefetch(ahead + at, 0, 2);
    }
  }
  return add_neighbours(sums);
}

// The panel's outputs for one row.
struct IntegersRowPanel {
  const Int4Panel p;  // copies, so that stores through other pointers cannot change them
  const Int4Rows x = *p.x;
  const int64_t blocks = (x.columns + x.block - 1) / x.block;
  const int64_t groups = (x.columns + p.group - 1) / p.group;
  const int doublings = x.block < p.group ? (2 * x.block < p.group ? 2 : 1) : 0;  // from a block to a group

  // Scales or zeros of the blocks from `block` on; what lies behind the last one is not used.
  template <class T>
  SCRIMP_INLINE Vec of_blocks(const T* from, const void* end, int64_t output, int64_t block) const {
    if (groups == 1) return broadcast(load_first(from + output, 1)[0]);
    const T* at = from + output * groups + (block >> doublings);
    Vec values = load_first(at, static_cast<const T*>(end) - at);
    for (int i = 0; i < doublings; ++i) values = twice(values);
    return values;
  }

  SCRIMP_INLINE Vec zeros(int64_t output, int64_t block) const {
    if (p.byte_zeros) return of_blocks(static_cast<const uint8_t*>(p.zeros), p.zeros_end, output, block);
    return with_type(p.scale_type, p.zeros, [&](auto* from) { return of_blocks(from, p.zeros_end, output, block); });
  }

  // What kLanes blocks whose sums of products are `sums` add to an output.
  template <int Limbs>
  SCRIMP_INLINE Vec terms(IntVec sums, int64_t output, int64_t block) const {
    const Vec dot = __builtin_convertvector(add(sums, (IntVec)load_bits(x.starts + block)), Vec);
    const Vec scale =
        with_type(p.scale_type, p.scales, [&](auto* from) { return of_blocks(from, p.scales_end, output, block); });
    const Vec sum = load(x.sums + block), factor = load(x.scales + block);
    if (p.kind == Int4Zeros::none) return term<Int4Zeros::none>(dot, scale, Vec{}, sum) * factor;
    const Vec zero = zeros(output, block);
    if (Limbs > 1) return term<Int4Zeros::offset>(dot, scale, centered(p.kind, scale, zero), sum) * factor;
    if (p.kind == Int4Zeros::shift) return term<Int4Zeros::shift>(dot, scale, zero, sum) * factor;
    return term<Int4Zeros::offset>(dot, scale, zero, sum) * factor;
  }

  // The terms of an output to to[kLanes blocks][.][block].
  template <bool Book, class Sums, int Vectors, int Limbs>
  SCRIMP_INLINE void multiply(const ByteCodes<Book>& of, int64_t output, float* to) const {
    constexpr int kStepBytes = Vectors * kPieceBytes;
    const uint8_t* codes = p.codes + output * p.codes_stride;
    const int64_t beyond = (output - p.outputs) * p.codes_stride + kAhead;
    const uint8_t* ahead = beyond < 0 ? codes + kAhead : p.next + beyond;
    const int8_t* integers = x.integers;
    int64_t bytes = x.columns / 2;
    for (int64_t block = 0; block < blocks; block += kLanes) {
      const uint8_t* from = codes;
      uint8_t some[kStepBytes];
      if (p.codes_end - codes < kStepBytes) [[unlikely]] {
        memset(some, 0, kStepBytes);
        memcpy(some, codes, bytes < kStepBytes ? bytes : kStepBytes);
        from = some;
      }
      const IntVec sums = multiply_blocks<Book, Sums, Vectors, Limbs>(of, from, bytes, integers, ahead);
      store(to, terms<Limbs>(sums, output, block));
      codes += kStepBytes, ahead += kStepBytes, bytes -= kStepBytes;
      integers += 2 * Limbs * kStepBytes, to += kLanes * kLanes;
    }
  }

  template <bool Book, class Sums, int Vectors, int Limbs>
  SCRIMP_INLINE void run() const {
    const ByteCodes<Book> of{static_cast<const int8_t*>(p.codebook)};
    float* const at = p.scratch;  // [kLanes blocks][output][block]
    for (int64_t n = 0; n < p.outputs; n += kLanes) {
      for (int64_t i = 0; i < kLanes && n + i < p.outputs; ++i) {
        multiply<Book, Sums, Vectors, Limbs>(of, n + i, at + i * kLanes);
      }
      Vec total{};
      for (int64_t block = 0; block < blocks; block += kLanes) {
        Vec some[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) some[i] = load(at + (block + i) * kLanes);
        transpose(some);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (block + i < blocks) total += some[i];
        }
      }
      with_type(p.type, p.bias, [&](auto* bias) { finish(p, bias, 0, n, total); });
    }
  }

  template <bool Book, class Sums>
  SCRIMP_INLINE void run() const {
    if (x.block == 128) return run<Book, Sums, 16, 1>();
    if (x.block == 64) return run<Book, Sums, 8, 1>();
    if (x.block == 32) return run<Book, Sums, 4, 1>();
    run<Book, Sums, 2, 1>();
  }

  SCRIMP_INLINE void run() const {
    if (x.limbs == 3) return x.block == 32 ? run<false, NibbleSums, 4, 3>() : run<false, NibbleSums, 2, 3>();
    p.codebook ? run<true, WideSums>() : run<false, NibbleSums>();
  }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
