// codebook_topk: what the launchers of every device check before they touch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/check.h"

namespace scrimp {

constexpr int64_t kCodebookMost = 64;  // codes of a row

// Devices and the dtype of x are the launcher's own.
inline void check_codebook_topk(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& bias, int64_t k) {
  SCRIMP_CHECK(x.scalar_type() == codebook.scalar_type(), "codebook_topk: x and codebook differ in dtype");
  const int64_t dims = codebook.dim();
  SCRIMP_CHECK(dims == 2 || (dims == 3 && codebook.size(0) > 0), "codebook_topk: codebook has shape ",
               shape_text(codebook), ", expected [C, D] or [G, C, D]");
  const int64_t G = dims == 3 ? codebook.size(0) : 1, C = codebook.size(dims - 2), D = codebook.size(dims - 1);
  SCRIMP_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == G * D, "codebook_topk: codebook ", shape_text(codebook),
               " does not fit x ", shape_text(x));
  SCRIMP_CHECK(D <= 1 || codebook.stride(dims - 1) == 1,
               "codebook_topk: the elements of a code must be adjacent in codebook");
  SCRIMP_CHECK(k >= 1 && k <= std::min(C, kCodebookMost), "codebook_topk: k=", k, " must be from 1 to the ", C,
               " codes of a codebook, and at most ", kCodebookMost);
  SCRIMP_CHECK(C <= INT32_MAX, "codebook_topk: ", C, " codes are more than int32 can number");
  if (!bias) return;
  bool same = bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->dim() == dims - 1;
  for (int64_t i = 0; same && i + 1 < dims; ++i) same = bias->size(i) == codebook.size(i);
  SCRIMP_CHECK(same, "codebook_topk: bias ", shape_text(*bias), " must be float32, a number for each code of ",
               shape_text(codebook));
}

}  // namespace scrimp
