// merge_attention: what the launchers of every device check before they touch memory.
#pragma once

#include "common/check.h"

namespace scrimp {

// One side against side a; the dtype and the device of side a are the launcher's own.
inline void check_merge_side(const char* side, const Tensor& out, const Tensor& lse, const Tensor& out_a) {
  SCRIMP_CHECK(out.scalar_type() == out_a.scalar_type(), "merge_attention: out_a and out_b differ in dtype");
  SCRIMP_CHECK(lse.scalar_type() == torch::headeronly::ScalarType::Float, "merge_attention: lse_", side,
               " must be float32");
  SCRIMP_CHECK(out.dim() == 4 && lse.dim() == 3, "merge_attention: out_", side, " must be [B, H, N, D] and lse_", side,
               " [B, H, N], got ", shape_text(out), " and ", shape_text(lse));
  for (int i = 0; i < 4; ++i)
    SCRIMP_CHECK(out.size(i) == out_a.size(i) && (i == 3 || lse.size(i) == out.size(i)), "merge_attention: shape ",
                 shape_text(out), " of out_", side, " or ", shape_text(lse), " of lse_", side, " does not fit out_a ",
                 shape_text(out_a));
}

}  // namespace scrimp
