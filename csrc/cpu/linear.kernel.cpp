// linear, the loops: every output is one vector of partial sums over K, in the order of K, and one tree over its lanes.
//
// That order is the same for every number of rows, which makes a row's result independent of the others. A tile is
// kTile weights x a group of rows, whose sums stay in registers. A chunk of the kTile weights stays in the cache while
// all groups use it and the next chunk is prefetched, so every weight is read from memory once.
#include "cpu/linear.h"

#include "common/simd.h"
#include "common/unroll.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kTile = 4;                // weights of a tile
constexpr int kStepBytes = 4 * kLanes;  // of a weight, read at once
constexpr int kLineSteps = 64 / kStepBytes;
constexpr int kChunk = 4096 / kStepBytes;  // steps of a chunk at most

typedef float Quad __attribute__((vector_size(16)));

// How a weight's bytes become vectors: a step is kStepBytes of it, kVectors vectors of inputs. At most kGroup rows are
// a group: what the registers hold.
template <class T>
struct Step;

template <>
struct Step<float> {
  static constexpr int kVectors = 1;
  static constexpr int kInputs = kLanes;
  static constexpr int kGroup = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
  template <int V>
  SCRIMP_INLINE static Vec load(const char* p) {
    return SCRIMP_ISA::load(reinterpret_cast<const float*>(p));
  }
};

// Inputs of even and odd index become a vector each.
template <>
struct Step<BFloat16> {
  static constexpr int kVectors = 2;
  static constexpr int kInputs = 2 * kLanes;
  static constexpr int kGroup = kLanes == 16 ? 5 : 2;
  template <int V>
  SCRIMP_INLINE static Vec load(const char* p) {
    BitsVec bits;
    memcpy(&bits, p, sizeof bits);
    return (Vec)(V ? bits & 0xffff0000u : bits << 16);
  }
};

// Lane sums of four vectors; each is the tree of lane i + lane i + n/2, n = kLanes, ..., 2.
SCRIMP_INLINE Quad lane_sums(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const __m512 va = (__m512)a, vb = (__m512)b, vc = (__m512)c, vd = (__m512)d;
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(va, vb, 0x44), _mm512_shuffle_f32x4(va, vb, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(vc, vd, 0x44), _mm512_shuffle_f32x4(vc, vd, 0xee));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 pairs = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0x4e));
  const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
  const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  return (Quad)_mm512_castps512_ps128(_mm512_permutexvar_ps(first, sums));
#else
  const auto quad = [](Vec x) -> Quad {
#if defined(__AVX2__)
    return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
    return x;
#endif
  };
  const Quad x = quad(a), y = quad(b), z = quad(c), w = quad(d);
  const Quad xy = __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
  const Quad zw = __builtin_shufflevector(z, w, 0, 4, 1, 5) + __builtin_shufflevector(z, w, 2, 6, 3, 7);
  return __builtin_shufflevector(xy, zw, 0, 1, 4, 5) + __builtin_shufflevector(xy, zw, 2, 3, 6, 7);
#endif
}

// A tile's part of a chunk.
struct Strip {
  const char* weight[kTile];
  int64_t steps;
  const char* next;  // this group's share of the next chunk of the tile's first weight
  int64_t next_stride;
  int64_t groups;
};

template <class T, int C>
SCRIMP_INLINE void add_step(Vec (&sum)[kTile][C], const char* const (&weight)[kTile], int64_t at, const float* x) {
  const auto half = [&](auto v) {
    constexpr int V = decltype(v)::value - 1;
    Vec row[C];
    for_vectors<1, C>([&](int, int c) { row[c] = load(x + (V * C + c) * kLanes); });
    for_vectors<kTile, 1>([&](int r, int) {
      const Vec w = Step<T>::template load<V>(weight[r] + at);
      for_vectors<1, C>([&](int, int c) { sum[r][c] = fma(w, row[c], sum[r][c]); });
    });
  };
  half(Int<1>{});
  if constexpr (Step<T>::kVectors == 2) half(Int<2>{});
}

// sum[r][c] += weight r * row c over the strip's inputs
template <class T, int C>
SCRIMP_INLINE void add_strip(Vec (&sum)[kTile][C], const Strip& strip, const float* x) {
  const char* const weight[kTile] = {strip.weight[0], strip.weight[1], strip.weight[2], strip.weight[3]};
  const char* next = strip.next;
  const int64_t burst = strip.groups * kLineSteps;  // the groups share the next chunk's lines
  for (int64_t step = 0; step < strip.steps; next += 64) {
    for_vectors<kTile, 1>([&](int r, int) { __builtin_prefetch(next + r * strip.next_stride, 0, 2); });
    const int64_t end = step + burst < strip.steps ? step + burst : strip.steps;
    for (; step < end; ++step, x += Step<T>::kVectors * C * kLanes) add_step<T, C>(sum, weight, step * kStepBytes, x);
  }
}

// The groups of `rows`: as few as possible, of like size.
struct Groups {
  int64_t count, small, larger;  // `larger` groups have small + 1 rows

  Groups(int64_t rows, int64_t most) : count((rows + most - 1) / most), small(rows / count), larger(rows % count) {}

  int64_t size(int64_t group) const { return small + (group < larger); }
  int64_t first(int64_t group) const { return group * small + (group < larger ? group : larger); }
};

template <class T>
int64_t padded(int64_t inputs) {
  return (inputs + Step<T>::kInputs - 1) / Step<T>::kInputs * Step<T>::kInputs;
}

// packed[group][vector of inputs][row of the group][lane]
template <class T>
void pack(const LinearRows& r) {
  constexpr int kInputs = Step<T>::kInputs;
  const Groups groups(r.rows, Step<T>::kGroup);
  const int64_t pitch = padded<T>(r.inputs), whole = r.inputs / kInputs * kInputs;
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t size = groups.size(group), first = groups.first(group);
    const auto put = [&](const T* x, float*& to) {
      const char* bytes = reinterpret_cast<const char*>(x);
      store(to, Step<T>::template load<0>(bytes));
      to += size * kLanes;
      if constexpr (Step<T>::kVectors == 2) {
        store(to, Step<T>::template load<1>(bytes));
        to += size * kLanes;
      }
    };
    for (int64_t c = 0; c < size; ++c) {
      const T* x = static_cast<const T*>(r.x[first + c]);
      float* to = r.packed + first * pitch + c * kLanes;
      for (int64_t k = 0; k < whole; k += kInputs) put(x + k, to);
      if (whole == r.inputs) continue;
      T rest[kInputs] = {};
      memcpy(rest, x + whole, sizeof(T) * (r.inputs - whole));
      put(rest, to);
    }
  }
}

// Row m of the output: products + bias + residual.
template <class T, class Product>
void finish(const LinearBlock& b, int64_t m, const Product* products) {
  for (int64_t n = 0; n < b.outputs; n += kLanes) {
    const int64_t count = b.outputs - n;
    Vec y = load_first(products + n, count);
    if (b.bias) y += load_first(static_cast<const T*>(b.bias) + n, count);
    if (b.residual) y += load_first(static_cast<const T*>(b.residual[m]) + b.residual_offset + n, count);
    store_first(static_cast<T*>(b.out) + m * b.out_stride + n, y, count);
  }
}

template <class T>
void add(const LinearBlock& b) {
  for (int64_t m = 0; m < b.rows; ++m) finish<T>(b, m, static_cast<const T*>(b.out) + m * b.out_stride);
}

template <class T>
struct Block {
  const LinearBlock& b;
  const Groups groups;
  const int64_t whole, left;  // steps, and inputs behind them
  const int64_t chunks, pitch, stride;
  Vec kept[kTile * kLinearRows];  // a tile's sums between chunks, group by group
  float sums[kLinearRows][kLinearOutputs];

  explicit Block(const LinearBlock& block)
      : b(block),
        groups(b.rows, Step<T>::kGroup),
        whole(b.inputs / Step<T>::kInputs),
        left(b.inputs % Step<T>::kInputs),
        chunks(whole ? (whole + kChunk - 1) / kChunk : 1),
        pitch(padded<T>(b.inputs)),
        stride(b.weight_stride * static_cast<int64_t>(sizeof(T))) {}

  // The sums of outputs [n, n + kTile) and one group: the strip's inputs and, with its last one, those left.
  template <int C>
  void tile(int64_t n, int64_t group, int64_t step, const Strip& strip) {
    Vec* keep = kept + kTile * groups.first(group);
    Vec sum[kTile][C];
    for_vectors<kTile, C>([&](int r, int c) { sum[r][c] = step ? keep[r * C + c] : Vec{}; });
    constexpr int64_t pitch_of_step = C * Step<T>::kVectors * kLanes;
    const float* x = b.packed + groups.first(group) * pitch + step * pitch_of_step;
    add_strip<T, C>(sum, strip, x);
    if (step + strip.steps < whole) {
      return for_vectors<kTile, C>([&](int r, int c) { keep[r * C + c] = sum[r][c]; });
    }
    if (left) {
      char rest[kTile][kStepBytes] = {};
      for (int r = 0; r < kTile; ++r) {
        memcpy(rest[r], strip.weight[r] + strip.steps * kStepBytes, left * static_cast<int64_t>(sizeof(T)));
      }
      const char* const rows[kTile] = {rest[0], rest[1], rest[2], rest[3]};
      add_step<T, C>(sum, rows, 0, x + strip.steps * pitch_of_step);
    }
    for_vectors<1, C>([&](int, int c) {
      const Quad quad = lane_sums(sum[0][c], sum[1][c], sum[2][c], sum[3][c]);
      memcpy(&sums[groups.first(group) + c][n], &quad, sizeof quad);
    });
  }

  // The weight of output n; of the last one for what lies behind.
  const char* weight(int64_t n) const {
    const int64_t output = n < b.outputs ? n : b.outputs - 1;
    return static_cast<const char*>(b.weight) + (b.index ? b.index[output] : output) * stride;
  }

  // The sums of outputs [n, n + kTile), for all rows.
  void outputs(int64_t n) {
    const char *first = weight(n), *after = b.index ? weight(n + kTile) : first + kTile * stride;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t step = whole * chunk / chunks, end = whole * (chunk + 1) / chunks;
      const char* next = chunk + 1 < chunks ? first + end * kStepBytes : after;
      const int64_t share = (end - step + groups.count - 1) / groups.count * kStepBytes;
      for (int64_t group = 0; group < groups.count; ++group) {
        Strip strip{{}, end - step, next + group * share, b.index ? 0 : stride, groups.count};
        for (int r = 0; r < kTile; ++r) {
          strip.weight[r] = weight(n + r) + step * kStepBytes;
        }
        with_constant<Step<T>::kGroup>(groups.size(group), [&](auto size) { tile<size.value>(n, group, step, strip); });
      }
    }
  }

  void run() {
    for (int64_t n = 0; n < b.outputs; n += kTile) outputs(n);
    for (int64_t m = 0; m < b.rows; ++m) finish<T>(b, m, sums[m]);
  }
};

}  // namespace

void linear_pack(const LinearRows& rows) { rows.bf16 ? pack<BFloat16>(rows) : pack<float>(rows); }

void linear(const LinearBlock& block) { block.bf16 ? Block<BFloat16>(block).run() : Block<float>(block).run(); }

void linear_add(const LinearBlock& block) { block.bf16 ? add<BFloat16>(block) : add<float>(block); }

}  // namespace scrimp::SCRIMP_ISA
