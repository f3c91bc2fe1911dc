// sparse_linear, the loops: products are summed over spans of kSpan channels, spans over blocks of kBlock, then blocks.
//
// Which products make a sum depends on the channels' numbers, never on their places in the list: a channel that is
// listed for another row's sake adds a zero, which changes no bit.
#include "cpu/sparse_linear.h"

#include "common/simd.h"
#include "common/unroll.h"
#include "common/with_type.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kSpan = 16;    // channels; the half of them that is read at once is as many streams of memory
constexpr int kBlock = 128;  // channels
constexpr int kGroup = kLanes == 16 ? 4 : 2;  // rows whose sums stay in registers

// The listed channels [first, first + count) of one span.
struct Span {
  int64_t first, count;
  const int32_t* channel;
};

template <class T, int V>
SCRIMP_INLINE void fetch(const T* weight) {
#pragma GCC unroll 8
  for (int64_t at = 0; at < V * kLanes * static_cast<int64_t>(sizeof(T)); at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(weight) + at, 0, 2);
  }
}

// part[r] of outputs [n, n + V vectors), of which `outputs` exist, takes in a span; x is [listed][R].
template <class T, int R, int V>
SCRIMP_INLINE void tile(const SparseLinearBlock& b, const Span& span, int64_t n, int64_t outputs, const float* x,
                        float* part, bool fetches) {
  const T* weight = static_cast<const T*>(b.weight) + n;
  Vec sum[R][V] = {};
  for (int64_t j = 0; j < span.count; ++j, x += R) {
    const T* row = weight + span.channel[j] * b.weight_stride;
    if (fetches) fetch<T, V>(row + V * kLanes);
    Vec w[V];
    for_vectors<1, V>([&](int, int v) { w[v] = V == 1 ? load_first(row, outputs) : load(row + v * kLanes); });
    for_vectors<R, 1>([&](int r, int) {
      const Vec input = broadcast(x[r]);
      for_vectors<1, V>([&](int, int v) { sum[r][v] = fma(input, w[v], sum[r][v]); });
    });
  }
  for_vectors<R, V>([&](int r, int v) {
    float* to = part + r * b.outputs + n + v * kLanes;
    store_first(to, load_first(to, outputs - v * kLanes) + sum[r][v], outputs - v * kLanes);
  });
}

// The outputs [n, n + V vectors) of all rows take in a span.
template <class T, int V>
SCRIMP_INLINE void outputs(const SparseLinearBlock& b, const Span& span, int64_t n, int64_t count) {
  for (int64_t m = 0; m < b.rows; m += kGroup) {
    with_constant<kGroup>(b.rows - m, [&](auto size) {
      constexpr int R = decltype(size)::value;
      const float* x = b.packed + m * b.listed + span.first * R;
      tile<T, R, V>(b, span, n, count, x, b.part + m * b.outputs, m == 0 && b.rows > 1);
    });
  }
}

// Adds the part to the total, and empties it.
void flush(const SparseLinearBlock& b) {
  for (int64_t i = 0; i < b.rows * b.outputs; i += kLanes) {
    const int64_t count = b.rows * b.outputs - i;
    store_first(b.total + i, load_first(b.total + i, count) + load_first(b.part + i, count), count);
  }
  memset(b.part, 0, sizeof(float) * b.rows * b.outputs);
}

template <int V, class T>
void run(const SparseLinearBlock& b, const T*) {
  memset(b.total, 0, sizeof(float) * b.rows * b.outputs);
  memset(b.part, 0, sizeof(float) * b.rows * b.outputs);
  const auto end_of = [&](int64_t first) {
    int64_t end = first;
    while (end < b.listed && b.index[end] / kSpan == b.index[first] / kSpan) ++end;
    return end;
  };
  for (int64_t first = 0, end; first < b.listed; first = end) {
    end = end_of(first);
    const Span span{first, end - first, b.index + first};
    int64_t n = 0;
    for (; n + V * kLanes <= b.outputs; n += V * kLanes) outputs<T, V>(b, span, n, V * kLanes);
    for (; n < b.outputs; n += kLanes) outputs<T, 1>(b, span, n, b.outputs - n);
    if (end == b.listed || b.index[end] / kBlock != b.index[first] / kBlock) flush(b);
  }
  for (int64_t m = 0; m < b.rows; ++m) {
    for (int64_t n = 0; n < b.outputs; n += kLanes) {
      const int64_t count = b.outputs - n;
      Vec y = load_first(b.total + m * b.outputs + n, count);
      if (b.bias) y += load_first(static_cast<const T*>(b.bias) + n, count);
      if (b.residual) y += load_first(static_cast<const T*>(b.residual[m]) + b.residual_offset + n, count);
      store_first(static_cast<T*>(b.out) + m * b.out_stride + n, y, count);
    }
  }
}

// packed[group of rows][listed][row of the group]
template <class T>
void pack(const SparseLinearRows& r, const T*) {
  float* to = r.packed;
  for (int64_t first = 0; first < r.rows; first += kGroup) {
    const int64_t size = r.rows - first < kGroup ? r.rows - first : kGroup;
    for (int64_t j = 0; j < r.listed; ++j) {
      for (int64_t m = first; m < first + size; ++m) *to++ = one(static_cast<const T*>(r.x[m]) + r.index[j]);
    }
  }
}

}  // namespace

void sparse_linear_pack(const SparseLinearRows& rows) {
  with_type(rows.type, rows.x[0], [&](auto* x) { pack(rows, x); });
}

void sparse_linear(const SparseLinearBlock& block) {
  with_type(block.type, block.weight,
            [&](auto* weight) { block.rows == 1 ? run<8>(block, weight) : run<4>(block, weight); });
}

}  // namespace scrimp::SCRIMP_ISA
