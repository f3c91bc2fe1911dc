// vertical_slash_index on the CPU: checks, work split, registration.
#include "cpu/vertical_slash_index.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensors.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_tensors(const Tensor& q, const Tensor& k) {
  for (const auto& [name, tensor] : {std::pair{"q", &q}, {"k", &k}}) {
    SCRIMP_CHECK(tensor->dim() == 4, "vertical_slash_index: ", name, " must be [B, H, N, D], got ",
                 shape_text(*tensor));
    const auto dtype = tensor->scalar_type();
    SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "vertical_slash_index: ", name,
                 " must be float32 or bfloat16 on the CPU");
    SCRIMP_CHECK(dtype == q.scalar_type(), "vertical_slash_index: ", name, " and q differ in dtype");
    SCRIMP_CHECK(tensor->is_cpu(), "vertical_slash_index: ", name, " must be on the CPU");
  }
  SCRIMP_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3), "vertical_slash_index: shapes q ", shape_text(q),
               " and k ", shape_text(k), " do not fit together");
  const int64_t H = q.size(1), G = k.size(1);
  SCRIMP_CHECK(G == 0 ? H == 0 : H % G == 0, "vertical_slash_index: ", H, " query heads are not a multiple of ", G,
               " key/value heads");
  SCRIMP_CHECK(q.size(3) <= 256, "vertical_slash_index: head size D=", q.size(3), " is above 256");
}

// One number a head, contiguous.
static Tensor check_budget(const char* name, const Tensor& budget, int64_t H) {
  SCRIMP_CHECK(budget.scalar_type() == ScalarType::Int && budget.is_cpu(), "vertical_slash_index: ", name,
               " must be int32 on the CPU");
  SCRIMP_CHECK(budget.dim() == 1 && budget.size(0) == H, "vertical_slash_index: ", name, " must be [H=", H,
               "], one number a head, got ", shape_text(budget));
  const Tensor flat = torch::stable::contiguous(budget);
  const auto* values = static_cast<const int32_t*>(flat.data_ptr());
  for (int64_t h = 0; h < H; ++h)
    SCRIMP_CHECK(values[h] >= 0, "vertical_slash_index: ", name, "[", h, "]=", values[h], " must not be negative");
  return flat;
}

static void check_numbers(int64_t max_columns, int64_t sinks, int64_t segment, int64_t samples, int64_t q_block,
                          int64_t q_offset, double scale, int64_t n_q, int64_t n_k) {
  constexpr int64_t far = int64_t{1} << 31;
  SCRIMP_CHECK(n_q < far && n_k < far, "vertical_slash_index: n_q=", n_q, " or n_k=", n_k, " does not fit int32");
  SCRIMP_CHECK(-far < q_offset && q_offset < far, "vertical_slash_index: q_offset=", q_offset, " does not fit int32");
  SCRIMP_CHECK(sinks >= 0, "vertical_slash_index: sinks=", sinks, " must be at least 0");
  SCRIMP_CHECK(q_block >= 1 && segment >= 1 && segment < far && segment % q_block == 0,
               "vertical_slash_index: segment=", segment, " must be a positive multiple of q_block=", q_block);
  SCRIMP_CHECK(samples >= 1 && segment % samples == 0, "vertical_slash_index: segment=", segment,
               " must be a multiple of samples=", samples);
  SCRIMP_CHECK(max_columns >= 0 && max_columns < far, "vertical_slash_index: max_columns=", max_columns,
               " must be at least 0 and fit int32");
  const int64_t tiles = (n_q + q_block - 1) / q_block, segments = (n_q + segment - 1) / segment;
  SCRIMP_CHECK(2 * tiles < far, "vertical_slash_index: ", tiles, " tiles of q_block=", q_block, " are too many");
  SCRIMP_CHECK(segments * max_columns < far, "vertical_slash_index: max_columns=", max_columns, " for each of ",
               segments, " segments does not fit int32");
  SCRIMP_CHECK(std::isfinite(scale), "vertical_slash_index: scale=", scale, " must be finite");
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> vertical_slash_index(
    const Tensor& q_any, const Tensor& k_any, const Tensor& window_any, const Tensor& columns_any, int64_t max_columns,
    int64_t sinks, int64_t segment, int64_t samples, int64_t q_block, int64_t q_offset, double scale) {
  check_tensors(q_any, k_any);
  const int64_t B = q_any.size(0), H = q_any.size(1), n_q = q_any.size(2), D = q_any.size(3);
  const int64_t G = k_any.size(1), n_k = k_any.size(2);
  check_numbers(max_columns, sinks, segment, samples, q_block, q_offset, scale, n_q, n_k);
  const Tensor window = check_budget("window", window_any, H), columns = check_budget("columns", columns_any, H);

  const Tensor q = unit_last_stride(q_any), k = unit_last_stride(k_any);
  const int64_t T = (n_q + q_block - 1) / q_block, S = (n_q + segment - 1) / segment;
  const Tensor ranges = cpu_empty(window, {B, H, 2 * T, 2});
  const Tensor range_slice = cpu_empty(window, {B, H, T, 2});
  const Tensor chosen = cpu_empty(window, {B, H, S * max_columns});
  const Tensor column_slice = cpu_empty(window, {B, H, T, 2});
  if (B * H * n_q == 0) return {ranges, range_slice, chosen, column_slice};

  const VerticalSlashIndex call{.q = q.data_ptr(),
                                .k = k.data_ptr(),
                                .q_strides = {q.stride(0), q.stride(1), q.stride(2)},
                                .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
                                .window = static_cast<const int32_t*>(window.data_ptr()),
                                .columns = static_cast<const int32_t*>(columns.data_ptr()),
                                .ranges = static_cast<int32_t*>(ranges.data_ptr()),
                                .range_slice = static_cast<int32_t*>(range_slice.data_ptr()),
                                .chosen = static_cast<int32_t*>(chosen.data_ptr()),
                                .column_slice = static_cast<int32_t*>(column_slice.data_ptr()),
                                .n_heads = H,
                                .n_groups = G,
                                .n_q = n_q,
                                .n_k = n_k,
                                .head_dim = D,
                                .tiles = T,
                                .segments = S,
                                .max_columns = max_columns,
                                .sinks = sinks,
                                .segment = segment,
                                .samples = samples,
                                .q_block = q_block,
                                .q_offset = q_offset,
                                .segment_lanes = std::min((samples + 15) / 16 * 16, kSampleLanes),
                                .scale = static_cast<float>(scale),
                                .bf16 = q.scalar_type() == ScalarType::BFloat16};
  const int64_t segments = kSampleLanes / call.segment_lanes, groups = (S + segments - 1) / segments;
  const int64_t items = B * H * groups;
  const int64_t floats = (SCRIMP_KERNEL(vertical_slash_index_scratch)(call) + 15) / 16 * 16;  // whole cache lines
  const Tensor scratch = cpu_empty(q, {worker_count(items), floats}, ScalarType::Float);
  const auto kernel = SCRIMP_KERNEL(vertical_slash_index_group);
  // The heads of a key/value head together (they share its cache), their last segments (the most work) first.
  for_each_item(items, [&](int64_t item, int64_t worker) {
    const int64_t heads = H / G, block = item / heads, first = (groups - 1 - block % groups) * segments;
    kernel(call,
           {.batch = block / groups / G,
            .head = block / groups % G * heads + item % heads,
            .first_segment = first,
            .segments = std::min(segments, S - first)},
           static_cast<float*>(scratch.data_ptr()) + worker * floats);
  });
  return {ranges, range_slice, chosen, column_slice};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("vertical_slash_index", TORCH_BOX(&scrimp::vertical_slash_index)); }
