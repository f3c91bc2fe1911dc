// int4_linear, the loops: a panel of outputs x all rows, chunk by chunk of columns.
//
// A chunk's codes are unpacked once, with outputs in the lanes, and stay in the cache while all rows use them. Sums
// over a block of columns are taken in the order of the columns and added up in the order of the blocks, for every
// number of rows alike: a row's result does not depend on the others. The file is compiled with -ffp-contract=off,
// because int8 mode rounds every operation; fused ones are written fma().
#include "cpu/int4_linear.groups.h"
#include "cpu/int4_linear.row_exact.h"
#include "cpu/int4_linear.row_int8.h"
#include "cpu/int4_linear.tiles.h"

namespace scrimp::SCRIMP_ISA {
namespace {

typedef int8_t QuarterVec __attribute__((vector_size(kLanes)));
typedef uint16_t PairVec __attribute__((vector_size(kLanes)));
typedef uint8_t PairHalf __attribute__((vector_size(kLanes / 2)));

// ---- rows of x ----

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

// x[begin, begin + columns) to integers, of each Span columns first the even ones; returns their sum, and their scale
// in *scale.
template <int Span>
float quantize(const float* x, int64_t begin, int64_t columns, int8_t* to, float* scale) {
  const Steps found = steps_of(x + begin, columns);
  *scale = found.scale;
  if (!found.usable) return 0.0f;
  const Vec steps = broadcast(found.steps);
  Vec sum{};
  for (int64_t k = begin; k < begin + columns; k += kLanes) {
    const Vec rounded = round_steps(load(x + k), steps);
    sum += rounded;
    const auto pairs = (PairVec) __builtin_convertvector(__builtin_convertvector(rounded, IntVec), QuarterVec);
    const PairHalf even = __builtin_convertvector(pairs & 0xff, PairHalf);
    const PairHalf odd = __builtin_convertvector(pairs >> 8, PairHalf);
    constexpr int kRun = Span < kLanes ? Span : kLanes;
    for (int i = 0; i < kLanes; i += kRun) {
      int8_t* const at = to + (k + i) / Span * Span + (k + i) % Span / 2;
      memcpy(at, reinterpret_cast<const char*>(&even) + i / 2, kRun / 2);
      memcpy(at + Span / 2, reinterpret_cast<const char*>(&odd) + i / 2, kRun / 2);
    }
  }
  return sum_lanes(sum);
}

// ---- a panel ----

struct Panel {
  const Int4Panel& p;
  const Int4Rows& x;
  float* const totals;  // [row][output]
  float* const unpacked;
  Groups groups;

  explicit Panel(const Int4Panel& panel)
      : p(panel),
        x(*panel.x),
        totals(panel.scratch),
        unpacked(totals + x.rows * kPanel),
        groups(panel, unpacked + kInt4Chunk * kPanel) {}

  // All rows with one block of columns, `begin` columns into the chunk.
  void add_block(int64_t chunk, int64_t begin, int64_t columns) {
    const int64_t block = (chunk * kInt4Chunk + begin) / x.block;
    const int64_t group = groups.find((chunk * kInt4Chunk + begin) / p.group);
    for (int64_t n = 0; n < p.outputs; n += kTileOutputs) {
      for (int64_t row = 0, size; row < x.rows; row += size) {
        const int64_t left = x.rows - row, tiles = (left + kTileRows - 1) / kTileRows;
        size = (left + tiles - 1) / tiles;
        const int64_t at = block * x.rows + row, value = (chunk * x.rows + row) * kInt4Chunk + begin;
        const Block b{columns, groups.scales + group + n, groups.zeros + group + n, x.sums + at,
                      totals + row * kPanel + n};
        with_constant<kTileRows>(size, [&](auto rows) {
          constexpr int C = decltype(rows)::value;
          if (!x.int8) {
            const float* w = unpacked + begin * kPanel + n;
            return p.zeros ? add_tile<C, true>(b, w, x.values + value) : add_tile<C, false>(b, w, x.values + value);
          }
          const uint32_t* w = reinterpret_cast<const uint32_t*>(unpacked) + begin / 4 * kPanel + n;
          const auto add = [&](auto tile) { tile(b, w, x.integers + value, x.scales + at, x.starts + at); };
          if (p.kind == Int4Zeros::shift) return add(add_tile<C, Int4Zeros::shift, NibbleSums>);
          if (p.kind == Int4Zeros::offset) return add(add_tile<C, Int4Zeros::offset, NibbleSums>);
          if (p.codebook) return add(add_tile<C, Int4Zeros::none, WideSums>);
          add(add_tile<C, Int4Zeros::none, NibbleSums>);
        });
      }
    }
  }

  template <bool Book>
  void unpack(int64_t chunk) {
    if (x.int8) return SCRIMP_ISA::unpack<Book>(p, chunk, reinterpret_cast<uint32_t*>(unpacked));
    SCRIMP_ISA::unpack<Book>(p, chunk, unpacked);
  }

  void run() {
    memset(totals, 0, sizeof(float) * x.rows * kPanel);
    const int64_t chunks = (x.columns + kInt4Chunk - 1) / kInt4Chunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t columns = x.columns - chunk * kInt4Chunk < kInt4Chunk ? x.columns - chunk * kInt4Chunk : kInt4Chunk;
      p.codebook ? unpack<true>(chunk) : unpack<false>(chunk);
      for (int64_t begin = 0; begin < columns; begin += x.block) {
        add_block(chunk, begin, columns - begin < x.block ? columns - begin : x.block);
      }
    }
    with_type(p.type, p.bias, [&](auto* bias) {
      for (int64_t row = 0; row < x.rows; ++row) {
        for (int64_t n = 0; n < p.outputs; n += kLanes) finish(p, bias, row, n, load(totals + row * kPanel + n));
      }
    });
  }
};

}  // namespace

void int4_pack(const Int4Row& row) {
  const Int4Rows& to = *row.to;
  const float* x = ordered(row);
  const int64_t chunks = (to.columns + kInt4Chunk - 1) / kInt4Chunk;
  for (int64_t chunk = 0; to.int8 && chunk < chunks; ++chunk) {
    memset(to.integers + (chunk * to.rows + row.row) * kInt4Chunk, 0, kInt4Chunk);
  }
  for (int64_t column = 0; column < to.columns; column += to.block) {
    const int64_t block = column / to.block * to.rows + row.row, chunk = column / kInt4Chunk;
    const int64_t at = (chunk * to.rows + row.row) * kInt4Chunk, begin = column % kInt4Chunk;
    const int64_t padded =
        (to.columns - column < to.block ? (to.columns - column + kLanes - 1) / kLanes * kLanes : to.block);
    if (to.int8) {
      const auto quantize = by_rows(to) ? SCRIMP_ISA::quantize<kVectorColumns> : SCRIMP_ISA::quantize<8>;
      to.sums[block] = quantize(x + chunk * kInt4Chunk, begin, padded, to.integers + at, to.scales + block);
      to.starts[block] = -to.center * static_cast<int32_t>(to.sums[block]);
    } else {
      memcpy(to.values + at + begin, x + column, sizeof(float) * to.block);
      Vec sum{};
      for (int64_t k = 0; k < padded; k += kLanes) sum += load(x + column + k);
      to.sums[block] = sum_lanes(sum);
    }
  }
}

void int4_panel(const Int4Panel& panel) {
  if (by_rows(*panel.x)) return Int8RowPanel{panel}.run();
  if (by_chunks(*panel.x)) return ExactRowPanel{panel}.run();
  Panel(panel).run();
}

}  // namespace scrimp::SCRIMP_ISA
