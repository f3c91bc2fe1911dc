// vq_logits, vq_sample on CUDA: the scores of the codes by another op.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/check.h"

namespace scrimp::cuda {

// h codebook^T [.., K] by the op `linear`, with all that it promises.
inline Tensor code_scores(const Tensor& h, const Tensor& codebook) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(h), from(std::vector<Tensor>{codebook}), from(std::vector<std::optional<Tensor>>{}),
                          from(std::optional<Tensor>{})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("scrimp::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace scrimp::cuda
