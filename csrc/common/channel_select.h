// channel_select: what the launchers of every device check before they touch memory.
#pragma once

#include <optional>

#include "common/check.h"
#include "common/select_rule.h"

namespace scrimp {

// Devices and the dtype of x are the launcher's own.
inline void check_channel_select(const Tensor& x, const Tensor& level, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& center, const std::optional<Tensor>& whole,
                                 int64_t rule) {
  using torch::headeronly::ScalarType;
  SCRIMP_CHECK(rule >= 0 && rule <= static_cast<int64_t>(SelectRule::top_p), "channel_select: rule=", rule);
  const auto is_numbers = [](const Tensor& tensor, int64_t count) {
    return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == count;
  };
  const int64_t K = x.size(x.dim() - 1);
  SCRIMP_CHECK(is_numbers(level, 1), "channel_select: level must be float32 [1]");
  for (const auto* tensor : {&scale, &center})
    SCRIMP_CHECK(!*tensor || is_numbers(**tensor, K), "channel_select: scale and center must be float32 [", K, "]");
  if (!whole) return;
  bool same = whole->scalar_type() == ScalarType::Bool && whole->dim() + 1 == x.dim();
  for (int64_t i = 0; same && i < whole->dim(); ++i) same = whole->size(i) == x.size(i);
  SCRIMP_CHECK(same, "channel_select: whole must be bool, a number for each row of x ", shape_text(x));
}

}  // namespace scrimp
