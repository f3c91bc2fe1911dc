// channel_select on the CPU: checks, work split, registration.
#include "cpu/channel_select.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/channel_select.h"
#include "common/float_dtype.h"
#include "common/memory.h"
#include "common/rows.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

static void check(const Tensor& x, const Tensor& level, const OptionalTensor& scale, const OptionalTensor& center,
                  const OptionalTensor& whole, int64_t rule) {
  SCRIMP_CHECK(float_type(x), "channel_select: x must be float32, bfloat16 or float16 on the CPU");
  for (const OptionalTensor& tensor : {OptionalTensor(level), scale, center, whole})
    SCRIMP_CHECK(!tensor || tensor->is_cpu(), "channel_select: level, scale, center and whole must be on the CPU");
  check_channel_select(x, level, scale, center, whole, rule);
}

int64_t channel_select_to(const Tensor& kept, int32_t* index, float* energy, const Tensor& x, const Tensor& level,
                          const OptionalTensor& scale_any, const OptionalTensor& center_any,
                          const OptionalTensor& whole_any, int64_t rule, bool common) {
  check(x, level, scale_any, center_any, whole_any, rule);
  const FloatType type = *float_type(x);
  const int64_t K = x.size(x.dim() - 1);
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) M *= x.size(dim);
  const auto list_kernel = SCRIMP_KERNEL(channel_select_list);
  if (M == 0 || K == 0) {
    std::vector<int8_t> none(K);
    std::fill_n(energy, 2 * M, 0.0f);
    return list_kernel(none.data(), 1, K, index);
  }

  const auto vector_of = [](const OptionalTensor& any) -> OptionalTensor {
    return any ? OptionalTensor(as_contiguous(*any)) : std::nullopt;
  };
  const OptionalTensor scale = vector_of(scale_any), center = vector_of(center_any), whole = vector_of(whole_any);
  const auto numbers = [](const OptionalTensor& tensor) {
    return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
  };
  const bool* is_whole = whole ? static_cast<const bool*>(whole->data_ptr()) : nullptr;
  const float at = *static_cast<const float*>(level.data_ptr());
  const SelectRule how = static_cast<SelectRule>(rule);
  const Rows from(x), to(kept);
  // One row of scores, and one of masks, for every row of x; behind them the mean score of a common choice.
  Memory memory;
  const int64_t scores_at = memory.reserve<float>((M + common) * K), masks_at = memory.reserve<int8_t>(M * K);
  memory.allocate();
  float* const scores = memory.at<float>(scores_at);
  int8_t* const masks = memory.at<int8_t>(masks_at);
  const auto score = SCRIMP_KERNEL(channel_select_score);
  const auto keep = SCRIMP_KERNEL(channel_select_keep);
  const auto cut_of = SCRIMP_KERNEL(channel_select_cut);
  float* mean = scores + M * K;
  const auto row = [&](int64_t m) -> SelectRow {
    return {.channels = K,
            .x = from.row(m),
            .scale = numbers(scale),
            .center = numbers(center),
            .score = scores + m * K,
            .judged = common ? mean : scores + m * K,
            .mask = masks + m * K,
            .kept = to.row(m),
            .energy = energy + 2 * m,
            .type = type};
  };
  const auto finish = [&](int64_t m, SelectCut cut) { keep(row(m), is_whole && is_whole[m] ? kSelectAll : cut); };
  if (common) {
    for_each_row(M, K, [&](int64_t m) { score(row(m)); });
    SCRIMP_KERNEL(channel_select_mean)(mean, scores, M, K);
    const SelectCut cut = cut_of(mean, K, how, at);
    for_each_row(M, K, [&](int64_t m) { finish(m, cut); });
  } else {
    for_each_row(M, K, [&](int64_t m) {
      score(row(m));
      finish(m, cut_of(scores + m * K, K, how, at));
    });
  }
  return list_kernel(masks, M, K, index);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> channel_select(const Tensor& x, const Tensor& level,
                                                                 const OptionalTensor& scale,
                                                                 const OptionalTensor& center,
                                                                 const OptionalTensor& whole, int64_t rule,
                                                                 bool common) {
  SCRIMP_CHECK(x.is_cpu() && x.dim() > 0, "channel_select: x must be [.., K] on the CPU");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor kept = cpu_empty(x, shape), index = cpu_empty(x, {shape.back()}, ScalarType::Int);
  const Tensor count = cpu_empty(x, {1}, ScalarType::Int);
  shape.back() = 2;
  const Tensor energy = cpu_empty(x, shape, ScalarType::Float);
  *static_cast<int32_t*>(count.data_ptr()) = static_cast<int32_t>(
      channel_select_to(kept, static_cast<int32_t*>(index.data_ptr()), static_cast<float*>(energy.data_ptr()), x, level,
                        scale, center, whole, rule, common));
  return {kept, index, count, energy};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("channel_select", TORCH_BOX(&scrimp::channel_select)); }
