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

// The finaliser of splitmix64 and its step, as in ops/_noise.py.
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;
constexpr uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

}  // namespace scrimp

// The token, or -1 where a logit is NaN or all are -inf.
SCRIMP_DECLARE_KERNEL(int64_t choose_token(const TokenChoice& choice))
