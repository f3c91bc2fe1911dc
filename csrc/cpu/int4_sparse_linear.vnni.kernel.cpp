// int4_sparse_linear, the loops: spans of listed channels x tiles of outputs x rows.
//
// A span's channels are read side by side along the outputs of the part, and fetched some tiles before. Sums of a block
// stay in memory between its spans; its scales are applied once, and blocks are added in their order. In
// int8 mode sums are exact, in exact mode they are taken in the order of the channels: a row's result depends neither
// on the other rows nor on channels that are listed for their sake. Compiled with -ffp-contract=off, because int8 mode
// rounds every operation; fused ones are written fma().
#include "cpu/int4_sparse_linear.math.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kSlices = 16 / kLanes;  // vectors of codes in a tile
constexpr int kSliceBytes = 4 * kLanes;
// Tiles from the one that is read to the one that is fetched; where the sums of a part lie in the first cache (rows x
// tiles), there is room for two: one into that, a farther one into the second.
constexpr int64_t kAhead = 4, kNear = 2, kFar = 8, kSmall = 64;

typedef int8_t QuarterVec __attribute__((vector_size(kLanes)));

// The scales and zeros of a group for the outputs of a tile; zeros behind the last one.
struct Scales {
  alignas(64) float scale[kInt4Tile], zero[kInt4Tile];
};

[[gnu::noinline]] void read_scales(const Int4SparsePart& p, int64_t group, int64_t first, Scales& to) {
  const auto read = [&](auto* from, int64_t stride, float* values) {
    for (int64_t n = 0; n < kInt4Tile; n += kLanes) {
      store(values + n, load_first(from + group * stride + first + n, p.outputs - first - n));
    }
  };
  with_type(p.scale_type, p.scales, [&](auto* from) { read(from, p.scales_stride, to.scale); });
  if (!p.zeros) return;
  if (p.byte_zeros) return read(static_cast<const uint8_t*>(p.zeros), p.zeros_stride, to.zero);
  with_type(p.scale_type, p.zeros, [&](auto* from) { read(from, p.zeros_stride, to.zero); });
}

// R rows from `row` on take in a span, for V vectors from First on of the outputs of a slice of a tile. A function
// of its own: together, all variants take more registers than there are.
template <int R, int First, int V, class Math>
[[gnu::noinline]] void step(const Math& math, const Int4Span& span, const SpanCodes& from, const Scales& scales,
                            int64_t tile, int slice, int64_t row) {
  const Int4SparsePart& p = math.p;
  const int64_t begin = slice * kLanes + 16 * First, at = (tile * math.x.rows + row) * kInt4Tile + begin;
  float *const held = p.sums + at, *const totals = p.totals + at;
  typename Math::Lanes sum[R][V] = {};
  if (!span.opens) {
    for_vectors<R, V>([&](int r, int i) { memcpy(&sum[r][i], held + r * kInt4Tile + 16 * i, sizeof(Vec)); });
  }
  math.template add<R, First>(span, from, tile * 64 + slice * kSliceBytes, row, sum);
  if (!span.closes) {
    for_vectors<R, V>([&](int r, int i) { memcpy(held + r * kInt4Tile + 16 * i, &sum[r][i], sizeof(Vec)); });
    return;
  }
  math.close(sum);
  for_vectors<R, 1>([&](int r, int) {
    const auto of_row = math.of_row(span.block * math.x.rows + row + r);
    for_vectors<1, V>([&](int, int i) {
      const Vec scale = load(scales.scale + begin + 16 * i), zero = load(scales.zero + begin + 16 * i);
      float* const total = totals + r * kInt4Tile + 16 * i;
      store(total, math.term(sum[r][i], of_row, scale, zero, load(total)));
    });
  });
}

SCRIMP_INLINE SpanCodes codes_of(const Int4SparsePart& p, const Int4SparseList& list, const Int4Span& span) {
  SpanCodes from;
  from.channels = 4 * span.quads;
  for (int64_t j = 0; j < from.channels; ++j) {
    from.channel[j] = p.codes + list.channel[4 * span.first + j] * p.codes_stride;
  }
  return from;
}

// Fetches the codes of a tile of the span that is read, or, behind its last one, of the next span. (GCC drops it from a
// lambda, as something without effect.)
template <int Cache>
SCRIMP_INLINE void fetch(const SpanCodes& from, const SpanCodes& then, int64_t tile, int64_t tiles) {
  const SpanCodes& codes = tile < tiles ? from : then;
  const int64_t at = 64 * (tile < tiles ? tile : (tile - tiles) % tiles);
  for (int64_t j = 0; j < codes.channels; ++j) __builtin_prefetch(codes.channel[j] + at, 0, Cache);
}

template <class Math>
void run(const Int4SparsePart& part) {
  const Math math(part);
  const Int4SparsePart& p = math.p;
  const Int4SparseList& list = math.list;
  const int64_t rows = math.x.rows, tiles = p.width / kInt4Tile;
  const bool small = rows * tiles <= kSmall;
  memset(p.totals, 0, sizeof(float) * rows * p.width);
  Scales scales = {};
  for (int64_t s = 0; s < list.span_count; ++s) {
    const Int4Span span = list.spans[s], next = list.spans[s + 1 < list.span_count ? s + 1 : s];
    const SpanCodes from = codes_of(p, list, span), then = codes_of(p, list, next);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (span.closes) read_scales(p, span.block * list.block / p.group, tile * kInt4Tile, scales);
      fetch<3>(from, then, tile + (small ? kNear : kAhead), tiles);
      if (small) fetch<2>(from, then, tile + kFar, tiles);
      for (int slice = 0; slice < kSlices; ++slice) {
        for (int64_t row = 0; row < rows; row += Math::kTileRows) {
          with_constant<Math::kTileRows>(rows - row, [&](auto count) __attribute__((always_inline)) {
            constexpr int R = decltype(count)::value;
            if constexpr (R * kVectors <= kHeld) {
              step<R, 0, kVectors>(math, span, from, scales, tile, slice, row);
            } else {
              step<R, 0, kVectors / 2>(math, span, from, scales, tile, slice, row);
              step<R, kVectors / 2, kVectors / 2>(math, span, from, scales, tile, slice, row);
            }
          });
        }
      }
    }
  }
}

template <class T>
void finish(const Int4SparsePart& p, const T* bias) {
  const int64_t rows = p.x->rows;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < p.outputs; n += kLanes) {
      Vec y = load(p.totals + (n / kInt4Tile * rows + row) * kInt4Tile + n % kInt4Tile);
      if (bias) y += load_first(bias + n, p.outputs - n);
      store_first(static_cast<T*>(p.out) + row * p.out_stride + n, y, p.outputs - n);
    }
  }
}

// ---- rows of x ----

// values[columns] to integers, which are zeros before; returns their sum, and their scale in *scale. Columns are whole
// vectors.
float quantize(const float* values, int64_t columns, int8_t* integers, float* scale) {
  const Steps found = steps_of(values, columns);
  *scale = found.scale;
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

// Whether number j of the list only fills a quad: the block's last channel once more.
SCRIMP_INLINE bool is_filler(const Int4SparseList& list, int64_t j) {
  return j % 4 != 0 && list.channel[j] == list.channel[j - 1];
}

// The listed values of a block, which has the quads [first, last), as integers. What depends on all of them depends on
// no order.
template <class T>
void pack_integers(const Int4SparseRow& row, const Int4SparseList& list, const T* x, int64_t first, int64_t last,
                   int64_t at) {
  const Int4SparseRows& to = *row.to;
  const int64_t count = 4 * (last - first);
  const int32_t* const input = list.input + 4 * first;
  float values[kInt4Block];
  int8_t integers[kInt4Block] = {};
  for (int64_t j = 0; j < count; ++j) values[j] = one(x + input[j]);
  for (int64_t j = count; j % kLanes; ++j) values[j] = 0.0f;
  for (int64_t j = count - 3; j < count; ++j) {
    if (is_filler(list, 4 * first + j)) values[j] = 0.0f;
  }
  to.sums[at] = quantize(values, (count + kLanes - 1) / kLanes * kLanes, integers, to.scales + at);
  to.starts[at] = -to.center * static_cast<int32_t>(to.sums[at]);
  for (int64_t quad = first; quad < last; ++quad) {
    memcpy(to.integers + 4 * (quad * to.rows + row.row), integers + 4 * (quad - first), 4);
  }
}

// The listed values of a block. They lie at their places in the block when they are added up, so that their sum does
// not depend on the list.
template <class T>
void pack_values(const Int4SparseRow& row, const Int4SparseList& list, const T* x, int64_t block, int64_t first,
                 int64_t last, int64_t at) {
  const Int4SparseRows& to = *row.to;
  float values[kInt4Block] = {};
  for (int64_t j = 4 * first; j < 4 * last; ++j) {
    const float value = one(x + list.input[j]);
    values[list.channel[j] - block * list.block] = value;
    to.values[j * to.rows + row.row] = is_filler(list, j) ? 0.0f : value;
  }
  Vec sum{};
  for (int64_t k = 0; k < list.block; k += kLanes) sum += load(values + k);
  to.sums[at] = sum_lanes(sum);
}

template <class T>
void pack(const Int4SparseRow& row, const T* x) {
  const Int4SparseList list = *row.to->list;
  for (int64_t s = row.begin, end; s < row.end; s = end) {
    for (end = s + 1; !list.spans[end - 1].closes; ++end) continue;
    const int64_t first = list.spans[s].first, last = list.spans[end - 1].first + list.spans[end - 1].quads;
    const int64_t block = list.spans[s].block, at = block * row.to->rows + row.row;
    row.to->int8 ? pack_integers(row, list, x, first, last, at) : pack_values(row, list, x, block, first, last, at);
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
