// channel_select on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/float_type.h"
#include "common/select_rule.h"

namespace scrimp {

// One row: from x its scores, from a cut of them its mask, kept values and energies.
struct SelectRow {
  int64_t channels;
  const void* x;
  const float *scale, *center;  // [channels], or null
  float* score;                 // [channels]
  const float* judged;          // [channels], what the cut is compared with: `score`, or one choice for all rows
  int8_t* mask;                 // [channels], -1 where kept
  void* kept;                   // of x's type
  float* energy;                // [2]: dropped, all
  FloatType type;
};

// Kept are the scores above `score`, those equal to it up to channel `last`, and NaN.
struct SelectCut {
  float score;
  int32_t last;
};

constexpr SelectCut kSelectAll{-1.0f, -1};

}  // namespace scrimp

// The scores of a row; the root of the mean square of several rows' scores; the cut that a rule makes in scores; what
// the cut keeps; the channels that any of `rows` masks keeps.
SCRIMP_DECLARE_KERNEL(void channel_select_score(const SelectRow& row);
                      SelectCut channel_select_cut(const float* score, int64_t channels, SelectRule rule, float level);
                      void channel_select_mean(float* score, const float* scores, int64_t rows, int64_t channels);
                      void channel_select_keep(const SelectRow& row, SelectCut cut);
                      int32_t channel_select_list(int8_t* masks, int64_t rows, int64_t channels, int32_t* index))
