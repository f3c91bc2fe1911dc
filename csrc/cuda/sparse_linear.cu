// sparse_linear on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/blocks.h"
#include "common/channel_list.h"
#include "common/sparse_linear.h"
#include "cuda/sparse_linear.cuh"

namespace scrimp::cuda::sparse_linear {

using torch::headeronly::ScalarType;

template <class T, int kRows>
static void launch(Arguments p, cudaStream_t stream) {
  p.row_tiles = static_cast<uint32_t>((p.M + kRows - 1) / kRows);
  p.tiles = static_cast<uint32_t>((p.ends.N + kOutputs<T> - 1) / kOutputs<T>);
  const uint32_t blocks = blocks_of("sparse_linear", static_cast<int64_t>(p.row_tiles) * p.tiles * p.chunks);
  sparse_linear_kernel<T, kRows><<<blocks, kThreads, 0, stream>>>(p);
  if (p.sums)
    sparse_linear_sums_kernel<T>
        <<<blocks_of("sparse_linear", (p.M * p.ends.N + kThreads - 1) / kThreads), kThreads, 0, stream>>>(p);
}

template <class T>
static void launch_as(const Arguments& p, cudaStream_t stream) {
  p.M == 1 ? launch<T, 1>(p, stream) : p.M <= 4 ? launch<T, 4>(p, stream) : launch<T, 8>(p, stream);
}

// `tensor` if it is a matrix, else with its elements in rows.
static Tensor as_rows(const Tensor& tensor) { return tensor.dim() == 2 ? tensor : as_contiguous(tensor); }

// The op's `cuda_takes` sends only such calls here.
static void check_is_taken(const Tensor& x, const Tensor& weight) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "sparse_linear: x must be float32, float16 or bfloat16 on CUDA");
  const int64_t size = static_cast<int64_t>(weight.element_size());
  SCRIMP_CHECK(reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0 && weight.stride(0) * size % 16 == 0 &&
                   weight.size(1) * size % 16 == 0,
               "sparse_linear: the outputs of each channel must be whole vectors of 16 bytes in CUDA C++");
}

static Tensor run(const Tensor& x, const Tensor& weight, const Tensor& index, const Tensor& count,
                  const std::optional<Tensor>& bias_any, const std::optional<Tensor>& residual_any) {
  SCRIMP_CHECK(x.dim() > 0, "sparse_linear: x must be [.., K], got a scalar");
  const int64_t K = x.size(x.dim() - 1);
  check_sparse_linear(x, weight, bias_any, residual_any);
  check_list_form("sparse_linear", index, count, K);
  check_is_taken(x, weight);
  const auto device = x.get_device_index();
  for (const Tensor* tensor :
       {&x, &weight, &index, &count, bias_any ? &*bias_any : &x, residual_any ? &*residual_any : &x})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "sparse_linear: the tensors must be on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t N = weight.size(1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  const Tensor out = torch::stable::new_empty(x, shape);
  if (!out.numel()) return out;

  const int64_t M = out.numel() / N, chunks = std::max<int64_t>((K + kChunk - 1) / kChunk, 1);
  SCRIMP_CHECK(std::max({M, N, K}) <= INT32_MAX, "sparse_linear: M=", M, ", N=", N, " and K=", K, " must be at most ",
               INT32_MAX);
  const Tensor rows = as_rows(x), bias = as_contiguous(bias_any.value_or(count));
  const Tensor residual = as_rows(unit_last_stride(residual_any.value_or(count)));
  const Tensor sums = torch::stable::new_empty(x, {chunks > 1 ? chunks * M * N : 0}, ScalarType::Float);
  const Arguments p = {.x = rows.data_ptr(),
                       .weight = weight.data_ptr(),
                       .list = {.index = static_cast<const int32_t*>(index.data_ptr()),
                                .count = static_cast<const int32_t*>(count.data_ptr()),
                                .stride = index.stride(0),
                                .capacity = index.size(0)},
                       .ends = {.bias = bias_any ? bias.data_ptr() : nullptr,
                                .residual = residual_any ? residual.data_ptr() : nullptr,
                                .out = out.data_ptr(),
                                .residual_m = residual.dim() == 2 ? residual.stride(0) : N,
                                .N = N},
                       .sums = chunks > 1 ? static_cast<float*>(sums.data_ptr()) : nullptr,
                       .x_m = rows.dim() == 2 ? rows.stride(0) : K,
                       .x_k = rows.stride(rows.dim() - 1),
                       .weight_k = weight.stride(0),
                       .M = M,
                       .K = K,
                       .chunks = chunks};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto dtype = x.scalar_type();
  const auto launch_dtype = dtype == ScalarType::Half       ? launch_as<__half>
                            : dtype == ScalarType::BFloat16 ? launch_as<__nv_bfloat16>
                                                            : launch_as<float>;
  launch_dtype(p, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "sparse_linear: the launch failed: ", cudaGetErrorString(status));
  return out;
}

}  // namespace scrimp::cuda::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("sparse_linear", TORCH_BOX(&scrimp::cuda::sparse_linear::run)); }
