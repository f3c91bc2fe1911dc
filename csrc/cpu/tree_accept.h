// tree_accept on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One choice among `count` logits (fp32, or bf16 when `bf16` is set); `key` is the hash of (seed, position).
struct TokenChoice {
  const void* logits;
  int64_t count;
  float temperature;
  uint64_t key;
  bool bf16;
};

}  // namespace scrimp

// The token, or -1 where a logit is NaN or all are -inf.
SCRIMP_DECLARE_KERNEL(int64_t choose_token(const TokenChoice& choice))
