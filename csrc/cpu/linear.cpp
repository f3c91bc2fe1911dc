// linear on the CPU: checks, work split, registration.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kAlone = 1 << 17;  // bytes of weights below which a second thread does not pay

// One weight with its bias, and where its outputs begin in y.
struct Layer {
  const Tensor* weight;
  const char* bias;
  int64_t outputs, first;
};

static void check(const Tensor& x, const Tensors& weights, const OptionalTensors& biases,
                  const std::optional<Tensor>& residual) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "linear: x must be float32 or bfloat16 on the CPU");
  SCRIMP_CHECK(x.dim() >= 1, "linear: x must be [.., K], got a scalar");
  SCRIMP_CHECK(!weights.empty(), "linear: there are no weights");
  SCRIMP_CHECK(biases.empty() || biases.size() == weights.size(), "linear: ", biases.size(), " biases for ",
               weights.size(), " weights");
  const auto fits = [&](const Tensor& tensor) { return tensor.scalar_type() == dtype && tensor.is_cpu(); };
  const int64_t K = x.size(x.dim() - 1);
  SCRIMP_CHECK(x.is_cpu(), "linear: x must be on the CPU");
  int64_t N = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    SCRIMP_CHECK(fits(weight), "linear: weights[", i, "] must be on the CPU and of the dtype of x");
    SCRIMP_CHECK(weight.dim() == 2 && weight.size(1) == K, "linear: weights[", i, "] has shape ", shape_text(weight),
                 ", expected [N, ", K, "]");
    SCRIMP_CHECK(K <= 1 || weight.stride(1) == 1, "linear: the elements of a row of weights[", i, "] must be adjacent");
    N += weight.size(0);
    if (biases.empty() || !biases[i]) continue;
    const Tensor& bias = *biases[i];
    SCRIMP_CHECK(fits(bias), "linear: biases[", i, "] must be on the CPU and of the dtype of x");
    SCRIMP_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), "linear: biases[", i, "] has shape ",
                 shape_text(bias), ", expected [", weight.size(0), "]");
  }
  if (!residual) return;
  SCRIMP_CHECK(fits(*residual), "linear: residual must be on the CPU and of the dtype of x");
  bool same = residual->dim() == x.dim() && residual->size(x.dim() - 1) == N;
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
  SCRIMP_CHECK(same, "linear: residual has shape ", shape_text(*residual), ", but x ", shape_text(x), " and N=", N);
}

// The op's arguments in the form that the kernels take.
struct Problem {
  Tensor x;  // unit last stride, as residual
  std::optional<Tensor> residual;
  Tensors biases;  // contiguous
  std::vector<Layer> layers;
  int64_t M = 1, K, N = 0, size;
  bool bf16;

  Problem(const Tensor& x_in, const Tensors& weights, const OptionalTensors& any_biases,
          const std::optional<Tensor>& any_residual)
      : x(unit_last_stride(x_in)), K(x.size(x.dim() - 1)), bf16(x.scalar_type() == ScalarType::BFloat16) {
    size = bf16 ? 2 : 4;
    if (any_residual) residual = unit_last_stride(*any_residual);
    layers.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      const char* bias = nullptr;
      if (!any_biases.empty() && any_biases[i]) {
        biases.push_back(unit_last_stride(*any_biases[i]));
        bias = static_cast<const char*>(biases.back().data_ptr());
      }
      const int64_t outputs = weights[i].size(0);
      if (outputs) layers.push_back({&weights[i], bias, outputs, N});
      N += outputs;
    }
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) M *= x.size(dim);
  }

  // Addresses of rows [first, first + count) of x or residual.
  void find_rows(const Tensor& tensor, int64_t first, int64_t count, const void** rows) const {
    for (int64_t m = 0; m < count; ++m) {
      int64_t offset = 0, index = first + m;
      for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
        offset += index % tensor.size(dim) * tensor.stride(dim);
        index /= tensor.size(dim);
      }
      rows[m] = static_cast<const char*>(tensor.data_ptr()) + offset * size;
    }
  }

  // Outputs [n, n + outputs) of a layer for `rows` rows from row `first` on.
  LinearBlock block(const Layer& layer, int64_t n, int64_t outputs, int64_t first, int64_t rows,
                    const void* const* residual_rows, const Tensor& out) const {
    const int64_t stride = layer.weight->stride(0), at = layer.first + n;
    return {.rows = rows,
            .inputs = K,
            .outputs = outputs,
            .packed = nullptr,
            .weight = static_cast<const char*>(layer.weight->data_ptr()) + n * stride * size,
            .weight_stride = stride,
            .index = nullptr,
            .bias = layer.bias ? layer.bias + n * size : nullptr,
            .residual = residual ? residual_rows : nullptr,
            .residual_offset = at,
            .out = static_cast<char*>(out.data_ptr()) + (first * N + at) * size,
            .out_stride = N,
            .bf16 = bf16};
  }
};

// Up to kLinearRows rows: every weight is read once, in blocks of outputs.
static void few_rows(const Problem& p, const Tensor& out) {
  const std::unique_ptr<float, void (*)(void*)> packed(
      static_cast<float*>(std::aligned_alloc(64, (p.M * (p.K + kLinearPad) * 4 + 63) / 64 * 64)), std::free);
  if (!packed) throw std::bad_alloc();
  const void* rows[kLinearRows];
  p.find_rows(p.x, 0, p.M, rows);
  SCRIMP_KERNEL(linear_pack)
  ({.rows = p.M, .inputs = p.K, .x = rows, .packed = packed.get(), .bf16 = p.bf16});
  if (p.residual) p.find_rows(*p.residual, 0, p.M, rows);

  int64_t blocks = 0;
  const auto blocks_of = [](const Layer& layer) { return (layer.outputs + kLinearOutputs - 1) / kLinearOutputs; };
  for (const Layer& layer : p.layers) blocks += blocks_of(layer);
  const auto kernel = SCRIMP_KERNEL(linear);
  const auto work = [&](int64_t item, int64_t) {
    const Layer* layer = p.layers.data();
    for (; item >= blocks_of(*layer); ++layer) item -= blocks_of(*layer);
    const int64_t n = item * kLinearOutputs;
    LinearBlock block = p.block(*layer, n, std::min(kLinearOutputs, layer->outputs - n), 0, p.M, rows, out);
    block.packed = packed.get();
    kernel(block);
  };
  if (p.N * p.K * p.size < kAlone) {
    for (int64_t item = 0; item < blocks; ++item) work(item, 0);
  } else {
    for_each_item(blocks, work);
  }
}

// More rows: torch's matrix product writes y, then biases and residual are added.
static void many_rows(const Problem& p, const Tensor& out) {
  using torch::stable::detail::from;
  const Tensor x = torch::stable::reshape(p.x, {p.M, p.K});
  Tensor y = torch::stable::view(out, {p.M, p.N});
  for (const Layer& layer : p.layers) {
    Tensor part = torch::stable::narrow(y, 1, layer.first, layer.outputs);
    StableIValue stack[] = {from(x), from(torch::stable::transpose(*layer.weight, 0, 1)), from(part)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
  if (p.biases.empty() && !p.residual) return;
  const auto add = SCRIMP_KERNEL(linear_add);
  for_each_item((p.M + kLinearRows - 1) / kLinearRows, [&](int64_t item, int64_t) {
    const int64_t first = item * kLinearRows, count = std::min(kLinearRows, p.M - first);
    const void* rows[kLinearRows];
    if (p.residual) p.find_rows(*p.residual, first, count, rows);
    for (const Layer& layer : p.layers) add(p.block(layer, 0, layer.outputs, first, count, rows, out));
  });
}

Tensor linear(const Tensor& x, const Tensors& weights, const OptionalTensors& biases,
              const std::optional<Tensor>& residual) {
  check(x, weights, biases, residual);
  const Problem problem(x, weights, biases, residual);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = problem.N;
  const Tensor out = cpu_empty(x, shape);
  if (problem.M == 0 || problem.N == 0) return out;
  problem.M <= kLinearRows ? few_rows(problem, out) : many_rows(problem, out);
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("linear", TORCH_BOX(&scrimp::linear)); }
