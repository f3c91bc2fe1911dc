// vq_sample: what the launchers of every device check before they touch memory, beside the head (vq_head.h).
#pragma once

#include "common/check.h"

namespace scrimp {

// Devices and the values of tensors are the launcher's own.
inline void check_vq_sample(const Tensor& h, const Tensor& codes, const Tensor& temperature, const Tensor& seed,
                            const Tensor& position, int64_t top_k, double top_p, double min_p) {
  using torch::headeronly::ScalarType;
  const auto check = [&](const char* name, const Tensor& numbers, ScalarType dtype) {
    SCRIMP_CHECK(numbers.scalar_type() == dtype, "vq_sample: ", name, " is of the wrong dtype");
    bool same = numbers.dim() == h.dim() - 1;
    for (int64_t i = 0; same && i < numbers.dim(); ++i) same = numbers.size(i) == h.size(i);
    SCRIMP_CHECK(same, "vq_sample: ", name, " has shape ", shape_text(numbers), ", which does not fit h ",
                 shape_text(h));
  };
  check("temperature", temperature, ScalarType::Float);
  check("seed", seed, ScalarType::Long);
  check("position", position, ScalarType::Long);
  SCRIMP_CHECK(top_k >= 0, "vq_sample: top_k=", top_k, " must not be negative");
  SCRIMP_CHECK(top_p > 0 && top_p <= 1, "vq_sample: top_p=", top_p, " must be above 0 and at most 1");
  SCRIMP_CHECK(min_p >= 0 && min_p <= 1, "vq_sample: min_p=", min_p, " must be from 0 to 1");
  SCRIMP_CHECK(codes.size(codes.dim() - 1) > 0 || seed.numel() == 0, "vq_sample: codes of shape ", shape_text(codes),
               " offer no token");
}

}  // namespace scrimp
