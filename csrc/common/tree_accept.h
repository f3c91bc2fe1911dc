// tree_accept: what the launchers of every device check before they touch memory.
#pragma once

#include "common/check.h"

namespace scrimp {

// The inputs beside logits; devices and the dtype of logits are the launcher's own.
inline void check_tree(const Tensor& logits, const Tensor& tokens, const Tensor& parents, const Tensor& temperature,
                       const Tensor& seed, const Tensor& position) {
  using torch::headeronly::ScalarType;
  SCRIMP_CHECK(logits.dim() == 3, "tree_accept: logits must be [B, T, V], got ", shape_text(logits));
  const int64_t B = logits.size(0), T = logits.size(1);
  SCRIMP_CHECK(logits.size(2) > 0 || B * T == 0, "tree_accept: logits of shape ", shape_text(logits),
               " offer no token");
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType dtype, int64_t dims) {
    SCRIMP_CHECK(tensor.scalar_type() == dtype, "tree_accept: ", name, " is of the wrong dtype");
    SCRIMP_CHECK(tensor.dim() == dims && tensor.size(0) == B && (dims == 1 || tensor.size(1) == T),
                 "tree_accept: ", name, " has shape ", shape_text(tensor), ", which does not fit logits");
  };
  check("tokens", tokens, ScalarType::Long, 2);
  check("parents", parents, ScalarType::Int, 2);
  check("temperature", temperature, ScalarType::Float, 1);
  check("seed", seed, ScalarType::Long, 1);
  check("position", position, ScalarType::Long, 1);
}

}  // namespace scrimp
