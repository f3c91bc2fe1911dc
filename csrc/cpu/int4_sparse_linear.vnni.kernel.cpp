// int4_sparse_linear, the loops: spans of listed channels x tiles of outputs x rows.
//
// A span's channels are read side by side along the outputs of the part, while those of the next span are fetched. Sums
// of a block stay in memory between its spans; its scales are applied once, and blocks are added in their order. In
// int8 mode sums are exact, in exact mode they are taken in the order of the channels: a row's result depends neither
// on the other rows nor on channels that are listed for their sake. Compiled with -ffp-contract=off, because int8 mode
// rounds every operation; fused ones are written fma().
#include "cpu/int4_sparse_linear.math.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 2 : 1;  // rows whose sums stay in registers
constexpr int kSlices = 16 / kLanes;             // vectors of codes in a tile
constexpr int kSliceBytes = 4 * kLanes;

typedef int8_t QuarterVec __attribute__((vector_size(kLanes)));

// Fetches a quad's codes of a tile.
SCRIMP_INLINE void fetch(const Int4SparsePart& p, int64_t quad, int64_t bytes) {
  const int32_t* const channel = p.x->list->channel + 4 * quad;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_prefetch(p.codes + channel[i] * p.codes_stride + bytes, 0, 2);
}

template <class Math, int R>
SCRIMP_INLINE void step(const Math& math, const Int4Span& span, const Place& at) {
  const Int4SparsePart& p = math.p;
  typename Math::Lanes sum[R][kVectors] = {};
  const int64_t first = at.bytes / 64 * kInt4Tile + at.bytes % 64 / 4;  // output of the first lane
  const auto held = [&](int r, int i) { return p.sums + (at.row + r) * p.width + first + 16 * i; };
  if (!span.opens) for_vectors<R, kVectors>([&](int r, int i) { memcpy(&sum[r][i], held(r, i), sizeof(Vec)); });
  math.template add<R>(span, at, sum);
  if (!span.closes) {
    for_vectors<R, kVectors>([&](int r, int i) { memcpy(held(r, i), &sum[r][i], sizeof(Vec)); });
    return;
  }
  const int64_t group = span.block * p.x->list->block / p.group;
  for_vectors<1, kVectors>([&](int, int i) {
    const int64_t n = first + 16 * i;
    const Vec scale = scales_of(p, group, n), zero = p.zeros ? zeros_of(p, group, n) : Vec{};
    for_vectors<R, 1>([&](int r, int) {
      float* const total = p.totals + (at.row + r) * p.width + n;
      store(total, math.term(sum[r][i], span.block * p.x->rows + at.row + r, scale, zero, load(total)));
    });
  });
}

template <class Math>
void run(const Int4SparsePart& p) {
  const Math math{p};
  const Int4SparseRows& x = *p.x;
  const Int4SparseList& list = *x.list;
  memset(p.totals, 0, sizeof(float) * x.rows * p.width);
  for (int64_t s = 0; s < list.span_count; ++s) {
    const Int4Span& span = list.spans[s];
    const Int4Span& next = list.spans[s + 1 < list.span_count ? s + 1 : s];
    for (int64_t bytes = 0; bytes < p.width / 2; bytes += 64) {
      for (int64_t quad = next.first; quad < next.first + next.quads; ++quad) fetch(p, quad, bytes);
      for (int slice = 0; slice < kSlices; ++slice) {
        for (int64_t row = 0; row < x.rows; row += kTileRows) {
          with_constant<kTileRows>(x.rows - row, [&](auto rows) {
            step<Math, decltype(rows)::value>(math, span, {row, bytes + slice * kSliceBytes});
          });
        }
      }
    }
  }
}

template <class T>
void finish(const Int4SparsePart& p, const T* bias) {
  for (int64_t row = 0; row < p.x->rows; ++row) {
    for (int64_t n = 0; n < p.outputs; n += kLanes) {
      Vec y = load(p.totals + row * p.width + n);
      if (bias) y += load_first(bias + n, p.outputs - n);
      store_first(static_cast<T*>(p.out) + row * p.out_stride + n, y, p.outputs - n);
    }
  }
}

// ---- rows of x ----

// values[columns] to integers; returns their sum, and their scale in *scale. Both hold whole vectors.
float quantize(const float* values, int64_t columns, int8_t* integers, float* scale) {
  const Steps found = steps_of(values, columns);
  *scale = found.scale;
  memset(integers, 0, kInt4Block);
  if (!found.usable) return 0.0f;
  Vec sum{};
  for (int64_t k = 0; k < columns; k += kLanes) {
    const Vec rounded = round_steps(load(values + k), broadcast(found.steps));
    sum += rounded;
    const QuarterVec bytes = __builtin_convertvector(__builtin_convertvector(rounded, IntVec), QuarterVec);
    memcpy(integers + k, &bytes, sizeof bytes);
  }
  return sum_lanes(sum);
}

// The listed values lie at their places in the block, so that sums do not depend on the list.
template <class T>
void pack(const Int4SparseRow& row, const T* x) {
  const Int4SparseRows& to = *row.to;
  const Int4SparseList& list = *to.list;
  for (int64_t s = 0, end; s < list.span_count; s = end) {
    for (end = s + 1; !list.spans[end - 1].closes; ++end) continue;
    const int64_t block = list.spans[s].block, base = block * list.block, begin = 4 * list.spans[s].first;
    const int64_t last = 4 * (list.spans[end - 1].first + list.spans[end - 1].quads);
    float values[kInt4Block] = {};
    for (int64_t j = begin; j < last; ++j) {
      if (list.input[j] >= 0) values[list.channel[j] - base] = one(x + list.input[j]);
    }
    const int64_t at = block * to.rows + row.row;
    if (to.int8) {
      int8_t integers[kInt4Block];
      to.sums[at] = quantize(values, list.block, integers, to.scales + at);
      to.starts[at] = -to.center * static_cast<int32_t>(to.sums[at]);
      for (int64_t j = begin; j < last; ++j) {
        const int8_t value = list.input[j] >= 0 ? integers[list.channel[j] - base] : 0;
        to.integers[4 * (j / 4 * to.rows + row.row) + j % 4] = value;
      }
    } else {
      Vec sum{};
      for (int64_t k = 0; k < list.block; k += kLanes) sum += load(values + k);
      to.sums[at] = sum_lanes(sum);
      for (int64_t j = begin; j < last; ++j) {
        to.values[j * to.rows + row.row] = list.input[j] >= 0 ? values[list.channel[j] - base] : 0.0f;
      }
    }
  }
}

}  // namespace

void int4_sparse_pack(const Int4SparseRow& row) {
  with_type(row.type, row.x, [&](auto* x) { pack(row, x); });
}

void int4_sparse_linear(const Int4SparsePart& part) {
  if (part.x->int8) {
    part.codebook ? run<Int8Math<true, WideSums>>(part) : run<Int8Math<false, NibbleSums>>(part);
  } else {
    part.codebook ? run<ExactMath<true>>(part) : run<ExactMath<false>>(part);
  }
  with_type(part.type, part.bias, [&](auto* bias) { finish(part, bias); });
}

}  // namespace scrimp::SCRIMP_ISA
