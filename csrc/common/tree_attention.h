// tree_attention: what the launchers of every device check before they touch memory.
#pragma once

#include <cmath>
#include <optional>
#include <utility>

#include "common/check.h"

namespace scrimp {

// Devices and dtypes of q, k and v are the launcher's own.
inline void check_tree_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix,
                                 const std::optional<Tensor>& ancestors, int64_t window, double scale) {
  using torch::headeronly::ScalarType;
  for (const auto& [name, tensor] : {std::pair{"q", &q}, {"k_cache", &k}, {"v_cache", &v}}) {
    SCRIMP_CHECK(tensor->dim() == 4, "tree_attention: ", name, " must be [B, H, N, D], got ", shape_text(*tensor));
    SCRIMP_CHECK(tensor->scalar_type() == q.scalar_type(), "tree_attention: ", name, " and q differ in dtype");
  }
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), G = k.size(1);
  for (int i = 0; i < 4; ++i)
    SCRIMP_CHECK(k.size(i) == v.size(i) && (i == 1 || i == 2 || k.size(i) == q.size(i)), "tree_attention: shapes q ",
                 shape_text(q), ", k_cache ", shape_text(k), ", v_cache ", shape_text(v), " do not fit together");
  SCRIMP_CHECK(G == 0 ? H == 0 : H % G == 0, "tree_attention: ", H, " query heads are not a multiple of ", G,
               " key/value heads");
  SCRIMP_CHECK(T <= 64, "tree_attention: T=", T, " new rows are more than 64");
  SCRIMP_CHECK(prefix.scalar_type() == ScalarType::Int && prefix.dim() == 1 && prefix.size(0) == B,
               "tree_attention: prefix must be int32 [", B, "], got ", shape_text(prefix));
  if (ancestors)
    SCRIMP_CHECK(ancestors->scalar_type() == ScalarType::Long && ancestors->dim() == 2 &&
                     (ancestors->size(0) == 1 || ancestors->size(0) == B) && ancestors->size(1) == T,
                 "tree_attention: ancestors must be int64 [1 or ", B, ", ", T, "], got ", shape_text(*ancestors));
  SCRIMP_CHECK(window >= 0, "tree_attention: window=", window, " must not be negative");
  SCRIMP_CHECK(window == 0 || !ancestors, "tree_attention: window=", window,
               " goes with the chain only, not with ancestors");
  SCRIMP_CHECK(std::isfinite(scale), "tree_attention: scale=", scale, " must be finite");
}

}  // namespace scrimp
