// vq_logits on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// Tokens [first, last) for all rows; scores, bias and logits are fp32, or bf16 when `bf16` is set.
struct VqScatter {
  int64_t rows, first, last;
  int64_t codebook, levels, tokens;  // K, G, V
  const void* scores;                // [rows, K]
  const int32_t* codes;              // [G, V], below K
  const void* bias;                  // [V], or null
  void* logits;                      // [rows, V]
  bool bf16;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void vq_logits(const VqScatter& part))
