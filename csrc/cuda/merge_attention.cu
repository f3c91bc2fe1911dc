// merge_attention on CUDA: checks, launch, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "common/merge_attention.h"
#include "cuda/merge_attention.cuh"

namespace scrimp::cuda::merge_attention {

using torch::headeronly::ScalarType;

static Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Whether every row of `tensor` starts at a multiple of 16 bytes.
static bool aligned(const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits &= tensor.size(i) == 1 || tensor.stride(i) * size % 16 == 0;
  return fits;
}

template <class T, int kWidth>
static void launch(Arguments p, int64_t heads, int64_t D, cudaStream_t stream) {
  p.vectors = static_cast<uint32_t>(D / kWidth);
  const uint32_t columns = std::clamp<uint32_t>(p.vectors, 1, kThreads);
  const uint32_t lines = static_cast<uint32_t>(std::min<int64_t>(kThreads / columns, (p.N + kRows - 1) / kRows));
  const int64_t tile = lines * kRows, tiles = (p.N + tile - 1) / tile, blocks = heads * tiles;
  SCRIMP_CHECK(blocks <= INT32_MAX, "merge_attention: ", heads, " heads of ", p.N, " rows are ", blocks,
               " blocks; one launch has at most ", INT32_MAX);
  p.tiles = static_cast<uint32_t>(tiles);
  merge_attention_kernel<T, kWidth><<<static_cast<uint32_t>(blocks), dim3(columns, lines), 0, stream>>>(p);
}

template <class T>
static void launch_as(const Arguments& p, int64_t heads, int64_t D, bool wide, cudaStream_t stream) {
  wide ? launch<T, 16 / sizeof(T)>(p, heads, D, stream) : launch<T, 1>(p, heads, D, stream);
}

static std::tuple<Tensor, Tensor> run(const Tensor& out_a_in, const Tensor& lse_a, const Tensor& out_b_in,
                                      const Tensor& lse_b) {
  const auto dtype = out_a_in.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "merge_attention: out_a must be float32, float16 or bfloat16 on CUDA");
  check_merge_side("a", out_a_in, lse_a, out_a_in);
  check_merge_side("b", out_b_in, lse_b, out_a_in);
  const auto device = out_a_in.get_device_index();
  for (const Tensor* tensor : {&out_a_in, &lse_a, &out_b_in, &lse_b})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "merge_attention: out_a, lse_a, out_b and lse_b must be on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out_a = unit_last_stride(out_a_in), out_b = unit_last_stride(out_b_in);
  const int64_t B = out_a.size(0), H = out_a.size(1), N = out_a.size(2), D = out_a.size(3);
  const Tensor out = torch::stable::new_empty(out_a, {B, N, H, D});
  const Tensor lse = torch::stable::new_empty(lse_a, {B, H, N});
  if (lse.numel()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const Arguments p = {.out_a = out_a.data_ptr(),
                         .out_b = out_b.data_ptr(),
                         .lse_a = static_cast<const float*>(lse_a.data_ptr()),
                         .lse_b = static_cast<const float*>(lse_b.data_ptr()),
                         .out = out.data_ptr(),
                         .lse = static_cast<float*>(lse.data_ptr()),
                         .out_a_strides = strides_of(out_a),
                         .out_b_strides = strides_of(out_b),
                         .lse_a_strides = strides_of(lse_a),
                         .lse_b_strides = strides_of(lse_b),
                         .N = N,
                         .H = static_cast<uint32_t>(H)};
    const bool wide = D * static_cast<int64_t>(out_a.element_size()) % 16 == 0 && aligned(out_a) && aligned(out_b);
    const auto launch_dtype = dtype == ScalarType::Half       ? launch_as<__half>
                              : dtype == ScalarType::BFloat16 ? launch_as<__nv_bfloat16>
                                                              : launch_as<float>;
    launch_dtype(p, B * H, D, wide, static_cast<cudaStream_t>(stream));
    const cudaError_t status = cudaGetLastError();
    SCRIMP_CHECK(status == cudaSuccess, "merge_attention: the launch failed: ", cudaGetErrorString(status));
  }
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace scrimp::cuda::merge_attention

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) {
  m.impl("merge_attention", TORCH_BOX(&scrimp::cuda::merge_attention::run));
}
