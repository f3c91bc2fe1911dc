// sparse_linear on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/float_type.h"

namespace scrimp {

constexpr int64_t kSparseRows = 64;  // rows of one pass over the weights

// The listed inputs of some rows, to be packed for `sparse_linear`.
struct SparseLinearRows {
  int64_t rows, listed;
  const void* const* x;  // [rows]
  const int32_t* index;  // [listed]
  float* packed;         // [listed * rows]
  FloatType type;
};

// Some outputs for all rows; weight, bias, residual and out are of `type`.
struct SparseLinearBlock {
  int64_t rows, listed, outputs;
  const float* packed;
  const int32_t* index;
  const void* weight;           // of channel 0 and the block's first output
  int64_t weight_stride;        // elements from channel to channel
  const void* bias;             // [outputs], or null
  const void* const* residual;  // [rows], or null
  int64_t residual_offset;      // of the block's first output
  void* out;
  int64_t out_stride;
  float *part, *total;  // [rows * outputs] of memory each
  FloatType type;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void sparse_linear_pack(const SparseLinearRows& rows);
                      void sparse_linear(const SparseLinearBlock& block))
