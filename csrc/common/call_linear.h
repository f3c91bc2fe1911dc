// The op `linear`, called by launchers of other ops.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/check.h"

namespace scrimp::cuda {

// x weight^T by the op `linear`, with all that it promises.
inline Tensor call_linear(const Tensor& x, const Tensor& weight) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(std::vector<Tensor>{weight}), from(std::vector<std::optional<Tensor>>{}),
                          from(std::optional<Tensor>{})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("scrimp::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace scrimp::cuda
