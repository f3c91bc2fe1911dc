// rotary_append on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// The heads of one token: rows of `head_dim` elements from `from` to `to`; strides count elements.
struct TokenHeads {
  const void* from;
  void* to;
  int64_t heads, from_stride, to_stride;
};

// One token; cos and sin hold `rotary` numbers, everything else is fp32, or bf16 when `bf16` is set.
struct RotaryToken {
  TokenHeads q, k, v;
  const float *cos, *sin;
  int64_t head_dim, rotary;
  bool bf16;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void rotary_append(const RotaryToken& token))
