// vq_logits on CUDA: checks, the scores of the codes by the op linear, launch, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/call_linear.h"
#include "common/vq_head.h"
#include "cuda/vq_logits.cuh"

namespace scrimp::cuda::vq_logits {

using torch::headeronly::ScalarType;

// Whether codes, bias and logits can be read and written by vectors of four.
static bool aligned(const Arguments& p) {
  const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return p.tokens.V % 4 == 0 && fits(p.tokens.codes) && fits(p.tokens.bias) && fits(p.logits);
}

template <class T, int kWidth>
static void launch(Arguments p, cudaStream_t stream) {
  constexpr int64_t tokens = int64_t{kThreads} * kWidth;
  const int64_t blocks = (p.tokens.V + tokens - 1) / tokens, all = blocks * ((p.M + p.rows - 1) / p.rows);
  SCRIMP_CHECK(all <= INT32_MAX, "vq_logits: ", p.M, " rows of ", p.tokens.V, " logits are ", all,
               " blocks; one launch has at most ", INT32_MAX);
  p.blocks = static_cast<uint32_t>(blocks);
  vq_logits_kernel<T, kWidth><<<static_cast<uint32_t>(all), kThreads, 0, stream>>>(p);
}

template <class T>
static void launch_as(Arguments p, cudaStream_t stream) {
  const int64_t fit = kVqShared / static_cast<int64_t>(p.tokens.K * sizeof(T));
  const bool wide = aligned(p) && fit;
  p.rows = wide ? std::min<int64_t>(fit, kRows) : kRows;
  wide ? launch<T, 4>(p, stream) : launch<T, 1>(p, stream);
}

static Tensor run(const Tensor& h, const Tensor& codebook, const Tensor& codes_any,
                  const std::optional<Tensor>& bias_any) {
  const auto dtype = h.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "vq_logits: h must be float32, float16 or bfloat16 on CUDA");
  check_vq_head("vq_logits", h, codebook, codes_any, bias_any);
  const auto device = h.get_device_index();
  for (const Tensor* tensor : {&h, &codebook, &codes_any, bias_any ? &*bias_any : &h})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "vq_logits: h, codebook, codes and bias must be on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor codes = as_contiguous(codes_any), bias = as_contiguous(bias_any.value_or(codes));
  const int64_t V = codes.size(codes.dim() - 1);
  std::vector<int64_t> shape(h.sizes().begin(), h.sizes().end());
  shape.back() = V;
  const Tensor logits = torch::stable::new_empty(h, shape);
  if (logits.numel() == 0) return logits;
  if (codebook.size(0) == 0) return torch::stable::fill_(logits, NAN);
  const Tensor scores = call_linear(h, codebook);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const Arguments p = {.tokens = {.codes = static_cast<const int32_t*>(codes.data_ptr()),
                                  .bias = bias_any ? bias.data_ptr() : nullptr,
                                  .K = codebook.size(0),
                                  .V = V,
                                  .levels = codes.dim() == 2 ? codes.size(0) : 1},
                       .scores = scores.data_ptr(),
                       .logits = logits.data_ptr(),
                       .M = logits.numel() / V};
  const auto launch_dtype = dtype == ScalarType::Half       ? launch_as<__half>
                            : dtype == ScalarType::BFloat16 ? launch_as<__nv_bfloat16>
                                                            : launch_as<float>;
  launch_dtype(p, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "vq_logits: the launch failed: ", cudaGetErrorString(status));
  return logits;
}

}  // namespace scrimp::cuda::vq_logits

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("vq_logits", TORCH_BOX(&scrimp::cuda::vq_logits::run)); }
