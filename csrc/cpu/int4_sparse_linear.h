// int4_sparse_linear on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/float_type.h"
#include "common/int4.h"
#include "common/int4_tile.h"

namespace scrimp {

constexpr int64_t kInt4Block = 128;      // channels that are summed before scales are applied, at most
constexpr int64_t kInt4SpanQuads = 4;    // quads of channels whose products are summed in registers
constexpr int64_t kInt4SparseRows = 64;  // rows of one pass over the weight

// Up to kInt4SpanQuads quads of listed channels, all of one block.
struct Int4Span {
  int64_t first, quads;  // places in the list of quads
  int64_t block;
  bool opens, closes;  // whether it is the first, and the last, of its block
};

// The listed channels in quads; where a block has none left, its last one once more as a filler.
struct Int4SparseList {
  const int32_t* channel;  // [quad][4]: whose codes are read
  const int32_t* input;    // [quad][4]: which element of a row they multiply
  const Int4Span* spans;
  int64_t span_count;
  int64_t block;  // channels of a block
};

// Rows of x made ready for `int4_sparse_linear`.
struct Int4SparseRows {
  const Int4SparseList* list;
  int64_t rows;
  float* values;     // exact: [quad][4][row]
  int8_t* integers;  // int8: [quad][row][4]
  float* sums;       // [block][row]: of the values or integers
  float* scales;     // int8: [block][row]
  int32_t* starts;   // int8: [block][row]: what a sum of products starts from, -center * sums
  int32_t center;    // the code that stands for zero, where it is the same for all
  bool int8;
};

// One row to be packed as number `row`, in the blocks of spans [begin, end).
struct Int4SparseRow {
  const Int4SparseRows* to;
  int64_t row, begin, end;
  const void* x;
  FloatType type;
};

// Some outputs, from the first of a tile on, for all rows.
struct Int4SparsePart {
  const Int4SparseRows* x;
  int64_t outputs, width;               // width: outputs rounded up to tiles
  const uint8_t* codes;                 // of channel 0
  int64_t codes_stride;                 // bytes from channel to channel
  int64_t group;                        // channels of a scale
  const void *scales, *zeros;           // of group 0; zeros may be null
  int64_t scales_stride, zeros_stride;  // elements from group to group
  FloatType scale_type;
  bool byte_zeros;
  Int4Zeros kind;
  const void* codebook;  // fp32 [16] in exact mode, int8 [16] in int8 mode, or null
  const void* bias;      // [outputs], or null
  void* out;             // [rows][outputs]
  int64_t out_stride;    // elements
  FloatType type;        // of bias and out
  float *sums, *totals;  // [tile][row][kInt4Tile] of memory each
};

}  // namespace scrimp

// int4_sparse_pack packs one row of x, int4_sparse_linear multiplies all rows with a part of the weight.
SCRIMP_DECLARE_VNNI_KERNEL(void int4_sparse_pack(const Int4SparseRow& row);
                           void int4_sparse_linear(const Int4SparsePart& part))
