// exact_head: what the launchers of every device check before they touch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "common/check.h"

namespace scrimp {

constexpr int64_t kHeadGroup = 64;   // coordinates that share a step of the hidden state, and a bound
constexpr int64_t kHeadTile = 16;    // rows of the head that lie interleaved
constexpr int64_t kMostLogits = 64;  // of k

// Devices and the dtype of x are the launcher's own.
inline void check_exact_head(const Tensor& x, const Tensor& weight, const Tensor& codes, const Tensor& scales,
                             const std::optional<Tensor>& basis, const Tensor& error, const Tensor& norm, double slack,
                             int64_t wide, int64_t k) {
  using torch::headeronly::ScalarType;
  SCRIMP_CHECK(x.dim() >= 1, "exact_head: x must be [.., K], got a scalar");
  const int64_t K = x.size(x.dim() - 1), G = (K + kHeadGroup - 1) / kHeadGroup;
  SCRIMP_CHECK(weight.dim() == 2 && weight.size(1) == K && weight.scalar_type() == x.scalar_type(),
               "exact_head: weight has shape ", shape_text(weight), ", expected [V, ", K, "] in the dtype of x");
  SCRIMP_CHECK(K <= 1 || weight.stride(1) == 1, "exact_head: the elements of a row of weight must be adjacent");
  const int64_t V = weight.size(0), T = (V + kHeadTile - 1) / kHeadTile;
  SCRIMP_CHECK(k >= 1 && k <= std::min(kMostLogits, V), "exact_head: k=", k, " must be from 1 to ", kMostLogits,
               " and at most the ", V, " rows of the head");
  SCRIMP_CHECK(V <= std::numeric_limits<int32_t>::max(), "exact_head: ", V, " rows are too many");
  SCRIMP_CHECK(wide >= 0 && wide <= G, "exact_head: wide=", wide, " must be from 0 to ", G);
  SCRIMP_CHECK(std::isfinite(slack) && slack >= 0, "exact_head: slack=", slack, " must be finite");
  const int64_t bytes = kHeadTile * kHeadGroup * (G + wide) / 2;
  SCRIMP_CHECK(
      codes.dim() == 2 && codes.size(0) == T && codes.size(1) == bytes && codes.scalar_type() == ScalarType::Byte,
      "exact_head: codes has shape ", shape_text(codes), ", expected uint8 [", T, ", ", bytes, "]");
  for (const auto& [name, tensor, size] :
       {std::tuple{"scales", &scales, T * kHeadTile}, {"error", &error, G}, {"norm", &norm, G}})
    SCRIMP_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->scalar_type() == ScalarType::Float,
                 "exact_head: ", name, " has shape ", shape_text(*tensor), ", expected float32 [", size, "]");
  for (const Tensor* tensor : {&codes, &scales, &error, &norm})
    SCRIMP_CHECK(tensor->is_contiguous(), "exact_head: the screen's tensors must be contiguous");
  if (basis)
    SCRIMP_CHECK(basis->dim() == 2 && basis->size(0) == kHeadGroup * G && basis->size(1) == K &&
                     basis->scalar_type() == ScalarType::Float && basis->is_contiguous(),
                 "exact_head: basis has shape ", shape_text(*basis), ", expected contiguous float32 [", kHeadGroup * G,
                 ", ", K, "]");
}

}  // namespace scrimp
