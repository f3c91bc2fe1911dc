// sparse_attention on the CPU: checks, work split, registration.
#include "cpu/sparse_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/sparse_attention.h"
#include "common/tensors.h"

namespace scrimp {

using torch::headeronly::ScalarType;

// A plan tensor [B|1, H|1, ...], read as if it were expanded to B and H.
struct PlanTensor {
  Tensor tensor;
  const int32_t* data;
  int64_t strides[2];

  explicit PlanTensor(const Tensor& any)
      : tensor(torch::stable::contiguous(any)), data(static_cast<const int32_t*>(tensor.data_ptr())) {
    for (int i = 0; i < 2; ++i) strides[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
  }

  const int32_t* head(int64_t b, int64_t h) const { return data + b * strides[0] + h * strides[1]; }
};

// [B|1, n_q], or nothing.
struct RowStart {
  std::optional<Tensor> tensor;
  const int32_t* data = nullptr;
  int64_t batches = 1, stride = 0;

  explicit RowStart(const std::optional<Tensor>& any) {
    if (!any) return;
    tensor = torch::stable::contiguous(*any);
    data = static_cast<const int32_t*>(tensor->data_ptr());
    batches = tensor->size(0);
    stride = batches == 1 ? 0 : tensor->size(1);
  }
};

struct Plan {
  PlanTensor ranges, range_slice, columns, column_slice;
  RowStart row_start;
  int64_t q_block, q_offset, tiles;
  bool causal;
};

// Dtypes, devices and the values of row_start.
static void check_for_cpu(std::initializer_list<std::pair<const char*, const Tensor*>> heads,
                          std::initializer_list<std::pair<const char*, const Tensor*>> plan,
                          const std::optional<Tensor>& row_start, int64_t n_k) {
  for (const auto& [name, tensor] : heads) {
    const auto dtype = tensor->scalar_type();
    SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "sparse_attention: ", name,
                 " must be float32 or bfloat16 on the CPU");
    SCRIMP_CHECK(tensor->is_cpu(), "sparse_attention: ", name, " must be on the CPU");
  }
  for (const auto& [name, tensor] : plan)
    SCRIMP_CHECK(tensor->is_cpu(), "sparse_attention: ", name, " must be on the CPU");
  if (!row_start) return;
  SCRIMP_CHECK(row_start->is_cpu(), "sparse_attention: row_start must be on the CPU");
  const Tensor whole = torch::stable::contiguous(*row_start);
  const auto* start = static_cast<const int32_t*>(whole.data_ptr());
  for (int64_t i = 0, n = whole.numel(); i < n; ++i)
    SCRIMP_CHECK(start[i] >= 0 && start[i] <= n_k, "sparse_attention: row_start ", start[i],
                 " is outside [0, n_k=", n_k, "]");
}

static void check_slice(const char* name, const int32_t* slice, int64_t capacity) {
  SCRIMP_CHECK(slice[0] >= 0 && slice[1] >= 0 && int64_t{slice[0]} + slice[1] <= capacity, "sparse_attention: ", name,
               " (", slice[0], ", ", slice[1], ") leaves its buffer of ", capacity);
}

static void check_ranges(const int32_t* range, int64_t count, int64_t n_k) {
  for (int64_t i = 0, done = 0; i < count; ++i, range += 2) {
    SCRIMP_CHECK(range[0] <= range[1], "sparse_attention: range [", range[0], ", ", range[1],
                 ") ends before it starts");
    SCRIMP_CHECK(range[0] >= done, "sparse_attention: range [", range[0], ", ", range[1], ") starts before ", done,
                 ", where the one before it ends");
    SCRIMP_CHECK(range[1] <= n_k, "sparse_attention: range [", range[0], ", ", range[1], ") ends after n_k=", n_k);
    done = range[1];
  }
}

static void check_columns(const int32_t* column, int64_t count, int64_t n_k) {
  for (int64_t i = 0, last = -1; i < count; last = column[i++])
    SCRIMP_CHECK(last < column[i] && column[i] < n_k, "sparse_attention: column ", column[i], " after ", last,
                 " with n_k=", n_k, ": columns must increase from 0 to below n_k");
}

// Checks the plan of one head and counts the keys that each of its tiles looks at.
static std::vector<int64_t> count_keys(const Plan& plan, int64_t b, int64_t h, int64_t n_q, int64_t n_k) {
  const int32_t* range_slice = plan.range_slice.head(b, h);
  const int32_t* column_slice = plan.column_slice.head(b, h);
  std::vector<int64_t> keys(plan.tiles);
  for (int64_t t = 0; t < plan.tiles; ++t, range_slice += 2, column_slice += 2) {
    // Tiles that share one list need one check.
    const auto is_new = [&](const int32_t* slice) { return t == 0 || slice[0] != slice[-2] || slice[1] != slice[-1]; };
    if (is_new(range_slice)) {
      check_slice("range_slice", range_slice, plan.ranges.tensor.size(2));
      check_ranges(plan.ranges.head(b, h) + 2 * range_slice[0], range_slice[1], n_k);
    }
    const int32_t* columns = plan.columns.head(b, h) + column_slice[0];
    if (is_new(column_slice)) {
      check_slice("column_slice", column_slice, plan.columns.tensor.size(2));
      check_columns(columns, column_slice[1], n_k);
    }
    const int64_t causal_end = std::clamp<int64_t>(std::min((t + 1) * plan.q_block, n_q) + plan.q_offset, 0, n_k);
    const int64_t end = plan.causal ? causal_end : n_k;
    const int32_t* row = plan.row_start.data ? plan.row_start.data + b * plan.row_start.stride : nullptr;
    const int64_t first_row = t * plan.q_block, last_row = std::min(first_row + plan.q_block, n_q);
    const int64_t begin = row ? *std::min_element(row + first_row, row + last_row) : 0;
    const int32_t* columns_end = columns + column_slice[1];
    keys[t] = std::lower_bound(columns, columns_end, end) - std::lower_bound(columns, columns_end, begin);
    const int32_t* range = plan.ranges.head(b, h) + 2 * range_slice[0];
    for (const int32_t* last = range + 2 * range_slice[1]; range < last; range += 2)
      keys[t] += std::max<int64_t>(std::min<int64_t>(range[1], end) - std::max<int64_t>(range[0], begin), 0);
  }
  return keys;
}

// All tiles: the heads of a key/value head together (they share its cache), the most work first (so that threads
// finish together).
static std::vector<QueryTile> split_work(const Plan& plan, int64_t B, int64_t H, int64_t G, int64_t n_q, int64_t n_k) {
  const auto plan_size = [&](int dim) {
    int64_t size = 1;
    for (const auto* part : {&plan.ranges, &plan.range_slice, &plan.columns, &plan.column_slice})
      size = std::max(size, part->tensor.size(dim));
    return size;
  };
  const int64_t plan_batches = std::max(plan_size(0), plan.row_start.batches), plan_heads = plan_size(1);
  std::vector<std::vector<int64_t>> keys;
  for (int64_t b = 0; b < plan_batches; ++b)
    for (int64_t h = 0; h < plan_heads; ++h) keys.push_back(count_keys(plan, b, h, n_q, n_k));

  std::vector<QueryTile> all;
  std::vector<std::pair<int64_t, QueryTile>> group;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < G; ++g) {
      group.clear();
      for (int64_t t = 0; t < plan.tiles; ++t)
        for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h) {
          const int64_t cost = keys[(plan_batches == 1 ? 0 : b) * plan_heads + (plan_heads == 1 ? 0 : h)][t];
          const int64_t end = std::min((t + 1) * plan.q_block, n_q);
          for (int64_t i = t * plan.q_block; i < end; i += kQueryLanes)
            group.push_back({cost, {b, h, i, std::min(kQueryLanes, end - i)}});
        }
      std::stable_sort(group.begin(), group.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
      for (const auto& [cost, tile] : group) all.push_back(tile);
    }
  return all;
}

static std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                                   const Tensor& ranges, const Tensor& range_slice,
                                                   const Tensor& columns, const Tensor& column_slice,
                                                   const std::optional<Tensor>& row_start, int64_t q_block,
                                                   int64_t q_offset, bool causal, double scale) {
  check_sparse_attention(q_any, k_any, v_any, ranges, range_slice, columns, column_slice, row_start, q_block, q_offset,
                         scale);
  const int64_t B = q_any.size(0), H = q_any.size(1), n_q = q_any.size(2), D = q_any.size(3);
  const int64_t G = k_any.size(1), n_k = k_any.size(2), tiles = (n_q + q_block - 1) / q_block;
  check_for_cpu(
      {{"q", &q_any}, {"k", &k_any}, {"v", &v_any}},
      {{"ranges", &ranges}, {"range_slice", &range_slice}, {"columns", &columns}, {"column_slice", &column_slice}},
      row_start, n_k);
  const Plan plan{.ranges = PlanTensor(ranges),
                  .range_slice = PlanTensor(range_slice),
                  .columns = PlanTensor(columns),
                  .column_slice = PlanTensor(column_slice),
                  .row_start = RowStart(row_start),
                  .q_block = q_block,
                  .q_offset = q_offset,
                  .tiles = tiles,
                  .causal = causal};
  const Tensor q = unit_last_stride(q_any), k = unit_last_stride(k_any), v = unit_last_stride(v_any);
  const Tensor out = cpu_heads(q, B, H, n_q, D);
  const Tensor lse = cpu_empty(q, {B, H, n_q}, ScalarType::Float);
  if (B * H * n_q == 0) return {out, lse};
  const std::vector<QueryTile> work = split_work(plan, B, H, G, n_q, n_k);

  const SparseAttention call{.q = q.data_ptr(),
                             .k = k.data_ptr(),
                             .v = v.data_ptr(),
                             .out = out.data_ptr(),
                             .lse = static_cast<float*>(lse.data_ptr()),
                             .q_strides = {q.stride(0), q.stride(1), q.stride(2)},
                             .k_strides = {k.stride(0), k.stride(1), k.stride(2)},
                             .v_strides = {v.stride(0), v.stride(1), v.stride(2)},
                             .out_strides = {out.stride(0), out.stride(1), out.stride(2)},
                             .ranges = plan.ranges.data,
                             .range_slice = plan.range_slice.data,
                             .columns = plan.columns.data,
                             .column_slice = plan.column_slice.data,
                             .ranges_strides = {plan.ranges.strides[0], plan.ranges.strides[1]},
                             .range_slice_strides = {plan.range_slice.strides[0], plan.range_slice.strides[1]},
                             .columns_strides = {plan.columns.strides[0], plan.columns.strides[1]},
                             .column_slice_strides = {plan.column_slice.strides[0], plan.column_slice.strides[1]},
                             .row_start = plan.row_start.data,
                             .row_start_stride = plan.row_start.stride,
                             .n_heads = H,
                             .n_groups = G,
                             .n_q = n_q,
                             .n_k = n_k,
                             .head_dim = D,
                             .q_block = q_block,
                             .q_offset = q_offset,
                             .scale = static_cast<float>(scale),
                             .causal = causal,
                             .bf16 = q.scalar_type() == ScalarType::BFloat16};
  const auto items = static_cast<int64_t>(work.size());
  const int64_t floats = (SCRIMP_KERNEL(sparse_attention_scratch)(call) + 15) / 16 * 16;  // whole cache lines
  const Tensor scratch = cpu_empty(lse, {worker_count(items), floats});
  const auto kernel = SCRIMP_KERNEL(sparse_attention_tile);
  for_each_item(items, [&](int64_t item, int64_t worker) {
    kernel(call, work[item], static_cast<float*>(scratch.data_ptr()) + worker * floats);
  });
  return {out, lse};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("sparse_attention", TORCH_BOX(&scrimp::sparse_attention)); }
