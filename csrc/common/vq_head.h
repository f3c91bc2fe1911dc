// vq_logits, vq_sample: what the launchers of every device check of a VQ head before they touch memory.
#pragma once

#include <optional>

#include "common/check.h"

namespace scrimp {

// Devices, the dtype of h and the values of codes are the launcher's own.
inline void check_vq_head(const char* op, const Tensor& h, const Tensor& codebook, const Tensor& codes,
                          const std::optional<Tensor>& bias) {
  SCRIMP_CHECK(codebook.scalar_type() == h.scalar_type(), op, ": h and codebook differ in dtype");
  SCRIMP_CHECK(codes.scalar_type() == torch::headeronly::ScalarType::Int, op, ": codes must be int32");
  SCRIMP_CHECK(h.dim() >= 1 && codebook.dim() == 2 && codebook.size(1) == h.size(h.dim() - 1), op, ": codebook ",
               shape_text(codebook), " does not fit h ", shape_text(h));
  const int64_t dims = codes.dim();
  SCRIMP_CHECK(dims == 1 || (dims == 2 && codes.size(0) > 0), op, ": codes has shape ", shape_text(codes),
               ", expected [V] or [G, V]");
  if (!bias) return;
  SCRIMP_CHECK(bias->scalar_type() == h.scalar_type(), op, ": h and bias differ in dtype");
  SCRIMP_CHECK(bias->dim() == 1 && bias->size(0) == codes.size(dims - 1), op, ": bias has shape ", shape_text(*bias),
               ", expected [", codes.size(dims - 1), "]");
}

}  // namespace scrimp
