// linear on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

constexpr int64_t kLinearRows = 64;     // rows of one pass over the weights
constexpr int64_t kLinearOutputs = 32;  // outputs of one block
constexpr int64_t kLinearPad = 32;      // packed rows are this much wider than K at most

// The rows of x, to be packed for `linear`: fp32, or bf16 when `bf16` is set.
struct LinearRows {
  int64_t rows, inputs;
  const void* const* x;  // [rows]
  float* packed;         // rows * (inputs + kLinearPad)
  bool bf16;
};

// Outputs of one weight, at most kLinearOutputs for `linear`, for all rows; bias, residual and out are of its dtype.
struct LinearBlock {
  int64_t rows, inputs, outputs;
  const float* packed;
  const void* weight;
  int64_t weight_stride;        // elements from output to output
  const int32_t* index;         // [outputs]: which rows of the weight, or null for the first ones
  const void* bias;             // [outputs], or null
  const void* const* residual;  // [rows], or null
  int64_t residual_offset;      // of the block's first output
  void* out;
  int64_t out_stride;
  bool bf16;
};

}  // namespace scrimp

// linear_pack packs x, linear computes a block from that, linear_add adds bias and residual to products in `out`.
SCRIMP_DECLARE_KERNEL(void linear_pack(const LinearRows& rows); void linear(const LinearBlock& block);
                      void linear_add(const LinearBlock& block))
