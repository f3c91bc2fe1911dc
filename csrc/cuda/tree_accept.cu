// tree_accept on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "common/tree_accept.h"
#include "cuda/tree_accept.cuh"

namespace scrimp::cuda::tree_accept {

using torch::headeronly::ScalarType;

static void check_launch() {
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "tree_accept: the launch failed: ", cudaGetErrorString(status));
}

template <class T>
static void choose(const Choice& p, bool wide, uint32_t blocks, cudaStream_t stream) {
  const auto kernel = wide ? tree_accept_choose_kernel<T, 16 / sizeof(T)> : tree_accept_choose_kernel<T, 1>;
  kernel<<<blocks, kThreads, 0, stream>>>(p);
  check_launch();
}

// Rows whose parent is no earlier row are no part of the tree; a temperature that is not positive is 0.
static std::tuple<Tensor, Tensor> run(const Tensor& logits_any, const Tensor& tokens_any, const Tensor& parents_any,
                                      const Tensor& temperature_any, const Tensor& seed_any,
                                      const Tensor& position_any) {
  const auto dtype = logits_any.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "tree_accept: logits must be float32, float16 or bfloat16 on CUDA");
  check_tree(logits_any, tokens_any, parents_any, temperature_any, seed_any, position_any);
  const auto device = logits_any.get_device_index();
  for (const Tensor* tensor : {&logits_any, &tokens_any, &parents_any, &temperature_any, &seed_any, &position_any})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "tree_accept: all tensors must be on one CUDA device");
  const int64_t B = logits_any.size(0), T = logits_any.size(1), V = logits_any.size(2);
  const int64_t chunks = (V + kSpan - 1) / kSpan, blocks = B * T * chunks;
  SCRIMP_CHECK(blocks <= INT32_MAX, "tree_accept: logits of shape ", shape_text(logits_any),
               " are too many for one launch");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor paths = torch::stable::new_empty(parents_any, {B, T});
  const Tensor choices = torch::stable::new_empty(tokens_any, {B, T});
  if (B * T == 0) return {paths, choices};

  const Tensor logits = unit_last_stride(logits_any);
  const Tensor tokens = as_contiguous(tokens_any), parents = as_contiguous(parents_any);
  const Tensor temperature = as_contiguous(temperature_any);
  const Tensor seed = as_contiguous(seed_any), position = as_contiguous(position_any);
  const Tensor best = torch::stable::new_empty(temperature, {blocks, int64_t{sizeof(Best) / 4}});
  const int64_t size = static_cast<int64_t>(logits.element_size());
  bool wide = reinterpret_cast<uintptr_t>(logits.data_ptr()) % 16 == 0;
  for (int i = 0; i < 2; ++i) wide &= logits.size(i) == 1 || logits.stride(i) * size % 16 == 0;
  const Choice choice = {.logits = logits.data_ptr(),
                         .parents = static_cast<const int32_t*>(parents.data_ptr()),
                         .temperature = static_cast<const float*>(temperature.data_ptr()),
                         .seed = static_cast<const int64_t*>(seed.data_ptr()),
                         .position = static_cast<const int64_t*>(position.data_ptr()),
                         .best = static_cast<Best*>(best.data_ptr()),
                         .logits_b = logits.stride(0),
                         .logits_t = logits.stride(1),
                         .T = T,
                         .V = V,
                         .chunks = static_cast<uint32_t>(chunks)};
  void* stream_of = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_of));
  const auto stream = static_cast<cudaStream_t>(stream_of);
  const auto choose_as = dtype == ScalarType::Half       ? choose<__half>
                         : dtype == ScalarType::BFloat16 ? choose<__nv_bfloat16>
                                                         : choose<float>;
  choose_as(choice, wide, static_cast<uint32_t>(blocks), stream);
  const Walk walk = {.best = choice.best,
                     .parents = choice.parents,
                     .tokens = static_cast<const int64_t*>(tokens.data_ptr()),
                     .path = static_cast<int32_t*>(paths.data_ptr()),
                     .chosen = static_cast<int64_t*>(choices.data_ptr()),
                     .T = T,
                     .chunks = chunks};
  tree_accept_walk_kernel<<<static_cast<uint32_t>(B), 32, 0, stream>>>(walk);
  check_launch();
  return {paths, choices};
}

}  // namespace scrimp::cuda::tree_accept

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("tree_accept", TORCH_BOX(&scrimp::cuda::tree_accept::run)); }
