// merge_attention on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// Rows [0, rows) of one (batch, head); out_a, out_b and out are fp32, or bf16 when `bf16` is set.
struct MergeRows {
  int64_t rows, head_dim;
  const void *out_a, *out_b;
  const float *lse_a, *lse_b;
  void* out;
  float* lse;
  int64_t out_a_stride, out_b_stride, out_stride;  // elements from row to row
  int64_t lse_a_stride, lse_b_stride;
  bool bf16;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void merge_attention(const MergeRows& rows))
