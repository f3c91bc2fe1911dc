// sparse_linear on the CPU: checks, work split, registration.
#include "cpu/sparse_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/channel_list.h"
#include "common/float_dtype.h"
#include "common/memory.h"
#include "common/rows.h"
#include "common/sparse_linear.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRun = 16384;      // outputs of a channel that a thread reads in one go, where rows are few
constexpr int64_t kSums = 4 * kRun;  // outputs times rows that are in the cache at once
constexpr int64_t kAlone = 1 << 17;  // bytes of weights below which a second thread does not pay

static void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual) {
  SCRIMP_CHECK(float_type(x), "sparse_linear: x must be float32, bfloat16 or float16 on the CPU");
  SCRIMP_CHECK(weight.is_cpu() && (!bias || bias->is_cpu()) && (!residual || residual->is_cpu()),
               "sparse_linear: weight, bias and residual must be on the CPU");
  check_sparse_linear(x, weight, bias, residual);
}

void sparse_linear_to(const Tensor& out, const Tensor& x, const Tensor& weight, ChannelList channels,
                      const OptionalTensor& bias_any, const OptionalTensor& residual) {
  check(x, weight, bias_any, residual);
  const FloatType type = *float_type(x);
  const int64_t N = weight.size(1), size = x.element_size(), listed = channels.count;
  if (out.numel() == 0) return;
  const int64_t M = out.numel() / N, stride = out.dim() > 1 ? out.stride(out.dim() - 2) : N;
  const OptionalTensor bias = bias_any ? OptionalTensor(as_contiguous(*bias_any)) : std::nullopt;
  const Rows from(x);
  const std::optional<Rows> beside = residual ? std::optional<Rows>(*residual) : std::nullopt;

  // Outputs of an item: long runs, as many items for each thread, whole lines.
  const int64_t rows_most = std::min(M, kSparseRows);
  const int64_t workers = listed * N * size < kAlone ? 1 : worker_count((N + 63) / 64);
  const int64_t run = std::min(kRun, kSums / rows_most);
  const int64_t turns = (N + workers * run - 1) / (workers * run);
  const int64_t share = (N + workers * turns - 1) / (workers * turns);
  const int64_t width = (share + 31) / 32 * 32, items = (N + width - 1) / width;
  Memory memory;
  const int64_t packed_at = memory.reserve<float>(rows_most * listed);
  const int64_t sums_at = memory.reserve<float>(2 * workers * rows_most * width);
  memory.allocate();
  float *packed = memory.at<float>(packed_at), *sums = memory.at<float>(sums_at);
  const auto kernel = SCRIMP_KERNEL(sparse_linear);
  for (int64_t first = 0; first < M; first += kSparseRows) {
    const int64_t rows = std::min(kSparseRows, M - first);
    const void *inputs[kSparseRows], *added[kSparseRows];
    for (int64_t m = 0; m < rows; ++m) {
      inputs[m] = from.row(first + m);
      if (beside) added[m] = beside->row(first + m);
    }
    SCRIMP_KERNEL(sparse_linear_pack)
    ({.rows = rows, .listed = listed, .x = inputs, .index = channels.index, .packed = packed, .type = type});
    for_each_item(items, workers, [&](int64_t item, int64_t worker) {
      const int64_t n = item * width;
      kernel({.rows = rows,
              .listed = listed,
              .outputs = std::min(width, N - n),
              .packed = packed,
              .index = channels.index,
              .weight = static_cast<const char*>(weight.data_ptr()) + n * size,
              .weight_stride = weight.stride(0),
              .bias = bias ? static_cast<const char*>(bias->data_ptr()) + n * size : nullptr,
              .residual = beside ? added : nullptr,
              .residual_offset = n,
              .out = static_cast<char*>(out.data_ptr()) + (first * stride + n) * size,
              .out_stride = stride,
              .part = sums + 2 * worker * rows_most * width,
              .total = sums + (2 * worker + 1) * rows_most * width,
              .type = type});
    });
  }
}

static Tensor sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& index_any, const Tensor& count,
                            const OptionalTensor& bias, const OptionalTensor& residual) {
  SCRIMP_CHECK(x.is_cpu() && x.dim() > 0, "sparse_linear: x must be [.., K] on the CPU");
  SCRIMP_CHECK(weight.dim() == 2, "sparse_linear: weight must be [K, N], got ", shape_text(weight));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(1);
  const Tensor index = as_contiguous(index_any), out = cpu_empty(x, shape);
  const int64_t listed = check_list("sparse_linear", index, count, x.size(x.dim() - 1));
  sparse_linear_to(out, x, weight, {static_cast<const int32_t*>(index.data_ptr()), listed}, bias, residual);
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("sparse_linear", TORCH_BOX(&scrimp::sparse_linear)); }
