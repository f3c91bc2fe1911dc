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
  const int32_t* counts;  // [K]: tokens of each code; null without filters, or where tokens have more than their code
  float temperature;
  int64_t top_k;  // from 0 (off) on
  double top_p;
  float log_min_p;  // -inf is off
  uint64_t key;     // of (seed, position)
  bool bf16;
};

// How a row chooses among tokens that have nothing but the score of a code.
struct VqChoice {
  float low;       // filters keep scores above it,
  int64_t last;    // and those at it of tokens up to this one
  float bar;       // scores + noise are above it; 0 at temperature 0
  float* weights;  // [K]: exp(score - bar); -1 where no token is kept
};

// The best of some tokens: its score + noise (0 at temperature 0), and its number.
struct VqBest {
  double value;
  int64_t token;
};

}  // namespace scrimp

// vq_sample: the token of a row, or -1 where a logit is NaN or all are -inf.
// vq_sample_start: fills a choice where the scores of the codes say all that it takes, if the best code has a token.
// vq_sample_add: adds tokens [first, last) to the best so far; false where a code is not below K, before it is used.
SCRIMP_DECLARE_KERNEL(int64_t vq_sample(const VqRow& row); bool vq_sample_start(const VqRow& row, VqChoice& choice);
                      bool vq_sample_add(const VqRow& row, const VqChoice& choice, int64_t first, int64_t last,
                                         VqBest& best))
