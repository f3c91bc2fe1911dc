// tree_attention on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/tree_attention.h"
#include "cuda/tree_attention.cuh"

namespace scrimp::cuda::tree_attention {

using torch::headeronly::ScalarType;

static Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Whether every row of `tensor` starts at a multiple of 16 bytes and is contiguous.
static bool aligned(const Tensor& tensor) {
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(3) == 1;
  for (int i = 0; i < 3; ++i) fits &= tensor.size(i) == 1 || tensor.stride(i) % 8 == 0;
  return fits;
}

static void launch(void (*kernel)(Arguments), const Arguments& p, int64_t blocks, int bytes, cudaStream_t stream) {
  SCRIMP_CHECK(blocks <= INT32_MAX, "tree_attention: ", blocks, " blocks are too many for one launch");
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) {
    kernel<<<static_cast<uint32_t>(blocks), kThreads, bytes, stream>>>(p);
    status = cudaGetLastError();
  }
  SCRIMP_CHECK(status == cudaSuccess, "tree_attention: the launch failed: ", cudaGetErrorString(status));
}

template <class T, int D>
static void run_as(const Arguments& p, int64_t heads, cudaStream_t stream) {
  const int64_t parts = (p.rows + kRows - 1) / kRows, tiles = (p.group + kTile - 1) / kTile;
  launch(tree_attention_kernel<T, D>, p, heads * (p.splits + 1) * parts, Prefix<D>::kBytes, stream);
  launch(tree_attention_merge_kernel<T, D>, p, heads * p.T * tiles, Tail<D>::kBytes, stream);
}

// Prefixes and words out of range are clamped.
static std::tuple<Tensor, Tensor> run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_any,
                                      const std::optional<Tensor>& ancestors_any, int64_t window, double scale) {
  check_tree_attention(q, k, v, prefix_any, ancestors_any, window, scale);
  const auto dtype = q.scalar_type();
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), G = k.size(1), C = k.size(2);
  SCRIMP_CHECK(
      (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && (D == 64 || D == 128) && window == 0,
      "tree_attention: CUDA C++ serves float16 and bfloat16, head sizes 64 and 128, no window; Triton the rest");
  const auto device = q.get_device_index();
  const auto here = [&](const Tensor& tensor) { return tensor.is_cuda() && tensor.get_device_index() == device; };
  SCRIMP_CHECK(here(q) && here(k) && here(v) && here(prefix_any) && (!ancestors_any || here(*ancestors_any)),
               "tree_attention: all tensors must be on one CUDA device");
  SCRIMP_CHECK(T <= C || B * H * T == 0, "tree_attention: ", T, " new rows leave the cache's ", C, " slots");
  SCRIMP_CHECK(B * H * T == 0 || (aligned(q) && aligned(k) && aligned(v)),
               "tree_attention: CUDA C++ needs rows of q, k_cache and v_cache at multiples of 16 bytes");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = torch::stable::new_empty(q, {B, T, H, D});
  const Tensor lse = torch::stable::new_empty(q, {B, H, T}, ScalarType::Float);
  if (B * H * T > 0) {
    const Tensor prefix = as_contiguous(prefix_any);
    std::optional<Tensor> ancestors;
    if (ancestors_any) ancestors = as_contiguous(*ancestors_any);
    const int64_t splits = C / kSplit, slots = splits + kWarps;
    const Tensor stats = torch::stable::new_empty(lse, {B * H * T, slots, 2});
    const Tensor sums = torch::stable::new_empty(lse, {B * H * T, slots, D});
    const Arguments p = {.q = q.data_ptr(),
                         .k = k.data_ptr(),
                         .v = v.data_ptr(),
                         .prefix = static_cast<const int32_t*>(prefix.data_ptr()),
                         .ancestors = ancestors ? static_cast<const int64_t*>(ancestors->data_ptr()) : nullptr,
                         .stats = static_cast<float2*>(stats.data_ptr()),
                         .sums = static_cast<float*>(sums.data_ptr()),
                         .out = out.data_ptr(),
                         .lse = static_cast<float*>(lse.data_ptr()),
                         .q_strides = strides_of(q),
                         .k_strides = strides_of(k),
                         .v_strides = strides_of(v),
                         .ancestors_b = ancestors && ancestors->size(0) > 1 ? T : 0,
                         .C = C,
                         .splits = splits,
                         .T = static_cast<int32_t>(T),
                         .G = static_cast<int32_t>(G),
                         .group = static_cast<int32_t>(H / G),
                         .rows = static_cast<int32_t>(T * (H / G)),
                         .scale = static_cast<float>(scale * 1.4426950408889634)};
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const bool half = dtype == ScalarType::Half;
    const auto run_typed = D == 64 ? (half ? run_as<__half, 64> : run_as<__nv_bfloat16, 64>)
                                   : (half ? run_as<__half, 128> : run_as<__nv_bfloat16, 128>);
    run_typed(p, B * G, static_cast<cudaStream_t>(stream));
  }
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace scrimp::cuda::tree_attention

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("tree_attention", TORCH_BOX(&scrimp::cuda::tree_attention::run)); }
