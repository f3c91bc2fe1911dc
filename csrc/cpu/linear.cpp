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

namespace scrimp {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kAlone = 1 << 17;  // bytes of weights below which a second thread does not pay

// One weight with its bias, and where its outputs begin in y.
struct Layer {
  const char* weight;
  const char* bias;
  int64_t outputs, stride, first;

  int64_t blocks() const { return (outputs + kLinearOutputs - 1) / kLinearOutputs; }
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

// Addresses of rows [first, first + count) of a [.., K] tensor with any leading strides.
static void find_rows(const Tensor& tensor, int64_t size, int64_t first, int64_t count, const void** rows) {
  for (int64_t m = 0; m < count; ++m) {
    int64_t offset = 0, index = first + m;
    for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
      offset += index % tensor.size(dim) * tensor.stride(dim);
      index /= tensor.size(dim);
    }
    rows[m] = static_cast<const char*>(tensor.data_ptr()) + offset * size;
  }
}

static Tensor linear(const Tensor& x_in, const Tensors& weights, const OptionalTensors& biases,
                     const std::optional<Tensor>& residual_in) {
  check(x_in, weights, biases, residual_in);
  const Tensor x = unit_last_stride(x_in);
  const std::optional<Tensor> residual = residual_in ? std::optional(unit_last_stride(*residual_in)) : std::nullopt;
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t size = bf16 ? 2 : 4, K = x.size(x.dim() - 1);

  std::vector<Layer> layers;
  Tensors kept;  // contiguous biases
  int64_t N = 0, blocks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const char* bias = nullptr;
    if (!biases.empty() && biases[i]) {
      kept.push_back(unit_last_stride(*biases[i]));
      bias = static_cast<const char*>(kept.back().data_ptr());
    }
    layers.push_back({static_cast<const char*>(weight.data_ptr()), bias, weight.size(0), weight.stride(0), N});
    N += weight.size(0);
    blocks += layers.back().blocks();
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  const Tensor out = torch::stable::new_empty(x, shape);
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) M *= x.size(dim);
  if (M == 0 || N == 0) return out;

  const int64_t most = std::min(M, kLinearRows);
  const std::unique_ptr<float, void (*)(void*)> packed(
      static_cast<float*>(std::aligned_alloc(64, (most * (K + kLinearPad) * 4 + 63) / 64 * 64)), std::free);
  if (!packed) throw std::bad_alloc();
  const void* x_rows[kLinearRows];
  const void* residual_rows[kLinearRows];
  const auto kernel = SCRIMP_KERNEL(linear);
  const auto pack = SCRIMP_KERNEL(linear_pack);
  for (int64_t first = 0; first < M; first += kLinearRows) {
    const int64_t rows = std::min(M - first, kLinearRows);
    find_rows(x, size, first, rows, x_rows);
    if (residual) find_rows(*residual, size, first, rows, residual_rows);
    pack({.rows = rows, .inputs = K, .x = x_rows, .packed = packed.get(), .bf16 = bf16});
    char* y = static_cast<char*>(out.data_ptr()) + first * N * size;
    const auto work = [&](int64_t block, int64_t) {
      const Layer* layer = layers.data();
      for (; block >= layer->blocks(); ++layer) block -= layer->blocks();
      const int64_t n = block * kLinearOutputs;
      kernel({.rows = rows,
              .inputs = K,
              .outputs = std::min(kLinearOutputs, layer->outputs - n),
              .packed = packed.get(),
              .weight = layer->weight + n * layer->stride * size,
              .weight_stride = layer->stride,
              .bias = layer->bias ? layer->bias + n * size : nullptr,
              .residual = residual ? residual_rows : nullptr,
              .residual_offset = layer->first + n,
              .out = y + (layer->first + n) * size,
              .out_stride = N,
              .bf16 = bf16});
    };
    if (N * K * size < kAlone) {
      for (int64_t block = 0; block < blocks; ++block) work(block, 0);
    } else {
      for_each_item(blocks, work);
    }
  }
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("linear", TORCH_BOX(&scrimp::linear)); }
