// vq_sample on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One row; scores and bias are fp32, or bf16 when `bf16` is set.
struct VqRow {
  int64_t codebook, levels, tokens;  // K, G, V > 0
  const void* scores;                // [K]
  const int32_t* codes;              // [G, V], below K
  const void* bias;                  // [V], or null
  const int32_t* counts;  // [K]: tokens of each code; null without filters, or where G > 1 or there is a bias
  float temperature;
  int64_t top_k;  // from 0 (off) on
  double top_p;
  float log_min_p;  // -inf is off
  uint64_t key;     // of (seed, position)
  bool bf16;
};

}  // namespace scrimp

// The token, or -1 where a logit is NaN or all are -inf.
SCRIMP_DECLARE_KERNEL(int64_t vq_sample(const VqRow& row))
