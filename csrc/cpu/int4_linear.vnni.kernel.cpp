// int4_linear, the loops: a panel of outputs x all rows, chunk by chunk of columns.
//
// A chunk's codes are unpacked once, with outputs in the lanes, and stay in the cache while all rows use them. Sums
// over a block of columns are taken in the order of the columns and added up in the order of the blocks, for every
// number of rows alike: a row's result does not depend on the others. The file is compiled with -ffp-contract=off,
// because every operation is rounded; fused ones are written fma().
#include "cpu/int4_linear.groups.h"
#include "cpu/int4_linear.row_integers.h"
#include "cpu/int4_linear.row_values.h"
#include "cpu/int4_linear.rows.h"
#include "cpu/int4_linear.tiles.h"

namespace scrimp::SCRIMP_ISA {
namespace {

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
        const Block b{columns,
                      x.limbs,
                      x.plane,
                      groups.scales + group + n,
                      groups.zeros + group + n,
                      x.sums + at,
                      totals + row * kPanel + n};
        with_constant<kTileRows>(size, [&](auto rows) {
          constexpr int C = decltype(rows)::value;
          if (!x.limbs) {
            const float* w = unpacked + begin * kPanel + n;
            return p.zeros ? add_tile<C, true>(b, w, x.values + value) : add_tile<C, false>(b, w, x.values + value);
          }
          const uint32_t* w = reinterpret_cast<const uint32_t*>(unpacked) + begin / 4 * kPanel + n;
          const auto add = [&](auto tile) { tile(b, w, x.integers + value, x.scales + at, x.starts + at); };
          if (p.kind == Int4Zeros::shift && x.limbs == 1) return add(add_tile<C, Int4Zeros::shift, NibbleSums>);
          if (p.zeros) return add(add_tile<C, Int4Zeros::offset, NibbleSums>);
          if (p.codebook) return add(add_tile<C, Int4Zeros::none, WideSums>);
          add(add_tile<C, Int4Zeros::none, NibbleSums>);
        });
      }
    }
  }

  template <bool Book>
  void unpack(int64_t chunk) {
    if (x.limbs) return SCRIMP_ISA::unpack<Book>(p, chunk, reinterpret_cast<uint32_t*>(unpacked));
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
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t at = (chunk * to.rows + row.row) * kInt4Chunk;
    if (!to.limbs) memcpy(to.values + at, x + chunk * kInt4Chunk, sizeof(float) * kInt4Chunk);
    for (int64_t limb = 0; limb < to.limbs; ++limb) memset(to.integers + limb * to.plane + at, 0, kInt4Chunk);
  }
  for (int64_t column = 0; column < to.columns; column += to.block) {
    const int64_t block = column / to.block * to.rows + row.row, chunk = column / kInt4Chunk;
    const int64_t at = (chunk * to.rows + row.row) * kInt4Chunk, begin = column % kInt4Chunk;
    const int64_t padded =
        (to.columns - column < to.block ? (to.columns - column + kLanes - 1) / kLanes * kLanes : to.block);
    if (to.limbs) {
      int8_t* const integers = to.integers + (by_rows(to) ? at * to.limbs : at);
      const int32_t sum = quantize(to, x + chunk * kInt4Chunk, begin, padded, integers, to.scales + block);
      to.sums[block] = static_cast<float>(sum);
      to.starts[block] = -to.center * sum;
    } else {
      Vec sum{};
      for (int64_t k = 0; k < padded; k += kLanes) sum += load(x + column + k);
      to.sums[block] = sum_lanes(sum);
    }
  }
}

void int4_panel(const Int4Panel& panel) {
  if (by_rows(*panel.x)) return IntegersRowPanel{panel}.run();
  if (by_chunks(*panel.x)) return ValuesRowPanel{panel}.run();
  Panel(panel).run();
}

}  // namespace scrimp::SCRIMP_ISA
