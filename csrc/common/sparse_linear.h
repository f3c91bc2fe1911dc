// sparse_linear: what the launchers of every device check before they touch memory.
#pragma once

#include <optional>

#include "common/check.h"

namespace scrimp {

// Devices, the dtype of x and the list are the launcher's own.
inline void check_sparse_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& residual) {
  const auto fits = [&](const Tensor& tensor) { return tensor.scalar_type() == x.scalar_type(); };
  const int64_t K = x.size(x.dim() - 1);
  SCRIMP_CHECK(fits(weight) && weight.dim() == 2 && weight.size(0) == K,
               "sparse_linear: weight must be of the dtype of x and [", K, ", N], got ", shape_text(weight));
  const int64_t N = weight.size(1);
  SCRIMP_CHECK(N <= 1 || weight.stride(1) == 1, "sparse_linear: the outputs of a channel must be adjacent");
  SCRIMP_CHECK(!bias || (fits(*bias) && bias->dim() == 1 && bias->size(0) == N),
               "sparse_linear: bias must be of the dtype of x and [", N, "]");
  if (!residual) return;
  bool same = fits(*residual) && residual->dim() == x.dim() && residual->size(x.dim() - 1) == N;
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
  SCRIMP_CHECK(same, "sparse_linear: residual has shape ", shape_text(*residual), ", but x ", shape_text(x),
               " and N=", N, ", or another dtype");
}

}  // namespace scrimp
