// codebook_topk on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/float_type.h"

namespace scrimp {

constexpr int64_t kCodebookPanel = 32;  // the codes that an instruction set scores at once are a divisor of it

// Finds the best k of some codes of one codebook, for some rows.
struct CodebookSearch {
  int64_t rows, width, k;  // D is the width
  FloatType type;          // of x and codebook
  bool euclidean;
  const void* const* x;     // [rows]
  const void* codebook;     // of code 0
  int64_t codebook_stride;  // elements from code to code
  const float* bias;        // of code 0, or null
  int64_t first, last;      // codes to look at
  int64_t block;            // codes packed at a time, a multiple of kCodebookPanel
  float* packed_rows;       // rows * width
  float* packed_codes;      // block * (width + 1), aligned to 64 bytes
  float* scores;            // [rows, k], descending; -inf and -1 where there is no code, NaN and -1 in broken rows
  int32_t* index;
  int64_t found_stride;  // elements from row to row of both
};

// Adds up the codes of some rows, whose best are found in `parts` ranges of codes.
struct CodebookGather {
  int64_t rows, width, k;
  FloatType type;
  bool mean;
  const void* codebook;
  int64_t codebook_stride;
  float* scores;  // those of the first range, which become those of all
  int32_t* index;
  int64_t found_stride;
  int64_t parts;             // ranges behind the first
  const float* more_scores;  // [parts, .., k]
  const int32_t* more_index;
  int64_t part_stride;  // elements from range to range; rows lie k apart
  void* out;
  int64_t out_stride;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void codebook_topk(const CodebookSearch& search);
                      void codebook_topk_gather(const CodebookGather& gather))
