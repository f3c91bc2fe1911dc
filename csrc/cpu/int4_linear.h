// int4_linear on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/float_type.h"
#include "common/int4.h"

namespace scrimp {

constexpr int64_t kInt4Chunk = 128;     // columns that are unpacked together: 64 bytes of a row of codes
constexpr int64_t kInt4Panel = 64;      // outputs that are computed together
constexpr int64_t kInt4RowPanel = 16;   // the same for one row of values
constexpr int64_t kInt4LimbBlock = 32;  // columns of a block in exact mode: 32 * 8 * 2^23 = 2^31
constexpr int64_t kInt4Rows = 256;      // rows of one pass over the weight
constexpr int64_t kInt4Groups = 16;     // groups whose scales lie at hand at once, at most
constexpr int64_t kInt4Lookahead = 64;  // bytes that may be read behind a panel's scratch

// Rows of x made ready for `int4_panel`: integers that share a scale in a block of columns, or values. A block is 16,
// 32, 64 or 128 columns; columns behind the last one are zeros. The arrays of blocks may be read kInt4Groups behind
// their end.
struct Int4Rows {
  int64_t rows, columns, block;
  int64_t limbs;     // signed bytes of an integer: 1 in int8 mode, 3 in exact mode where it pays, 0: there are values
  float* values;     // [chunk][row][128]
  int8_t* integers;  // [limb, the highest first][chunk][row][128], of 8 columns first the even ones; or, for one row,
                     // [vector of codes][limb][its even columns, its odd columns]
  int64_t plane;     // bytes from limb to limb
  float* sums;       // [block][row]: of the integers or values
  float* scales;     // [block][row]: what an integer of 1 stands for
  int32_t* starts;   // [block][row]: what is added to a sum of products, -center * sums
  int32_t center;    // the code that stands for zero, where it is the same for all
};

// One row to be packed as number `row`.
struct Int4Row {
  const Int4Rows* to;
  int64_t row;
  const void* x;
  FloatType type;
  const int32_t* permutation;  // [columns], or null
  float* scratch;              // [columns rounded up to chunks]
};

// Up to kInt4Panel outputs for all rows.
struct Int4Panel {
  const Int4Rows* x;
  int64_t outputs;
  const uint8_t* codes;  // [outputs][columns / 2]
  int64_t codes_stride;  // bytes
  const uint8_t* codes_end;
  const uint8_t* next;  // codes of the panel that this thread is likely to need next
  int64_t group;
  const void *scales, *zeros;  // [outputs][groups]; zeros may be null
  const void *scales_end, *zeros_end;
  FloatType scale_type;
  bool byte_zeros;
  Int4Zeros kind;
  const void* codebook;  // fp32 [16] in exact mode, int8 [16] in int8 mode, or null
  const void* bias;      // [outputs], or null
  void* out;             // [rows][outputs]
  int64_t out_stride;    // elements
  FloatType type;        // of bias and out
  float* scratch;        // int4_scratch(*x) floats
};

// Floats of scratch: a row of x in whole chunks; then, for a panel, the terms of a vector of outputs where one row of
// integers is multiplied, else unpacked codes, scales, zeros and sums.
inline int64_t int4_scratch(const Int4Rows& x) {
  const int64_t blocks = (x.columns + x.block - 1) / x.block, terms = (blocks + kInt4Groups) * kInt4Groups;
  const int64_t panel = kInt4Panel * (kInt4Chunk + 2 * kInt4Groups + x.rows), row = x.columns + kInt4Chunk;
  const int64_t most = x.limbs && x.rows == 1 ? terms : panel;
  return most > row ? most : row;
}

}  // namespace scrimp

// int4_pack packs one row of x, int4_panel multiplies all rows with a panel of the weight.
SCRIMP_DECLARE_VNNI_KERNEL(void int4_pack(const Int4Row& row); void int4_panel(const Int4Panel& panel))
