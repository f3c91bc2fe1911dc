// channel_select on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/channel_select.h"
#include "cuda/channel_select.cuh"

namespace scrimp::cuda::channel_select {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

constexpr int kCutBytes = kMostScores * 4;

template <class T, bool kWide>
static void launch(const Arguments& p, cudaStream_t stream) {
  constexpr int64_t tiles = kCommonThreads / 32 * kTile;
  const uint32_t rows = static_cast<uint32_t>(p.M);
  if (p.judged)
    channel_select_common_kernel<T, kWide>
        <<<static_cast<uint32_t>((p.K + tiles - 1) / tiles), kCommonThreads, 0, stream>>>(p);
  if (p.cuts) {
    const auto kernel = channel_select_cut_kernel<T, kWide>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kCutBytes);
    kernel<<<p.judged ? 1 : rows, kThreads, kCutBytes, stream>>>(p);
  }
  channel_select_kernel<T, kWide><<<rows, kThreads, 0, stream>>>(p);
  channel_select_list_kernel<<<1, kThreads, 0, stream>>>(p);
}

// Whether x, scale, center and results can be read and written by vectors.
template <class T>
static void launch_as(const Arguments& p, cudaStream_t stream) {
  const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool rows = p.M == 1 || p.x_m * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const bool wide = p.K % 8 == 0 && rows && fits(p.x) && fits(p.scale) && fits(p.center);
  wide ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

// [.., K] as rows that are equally far apart, their numbers adjacent.
static Tensor as_rows(const Tensor& x) { return x.dim() == 2 ? unit_last_stride(x) : as_contiguous(x); }

static std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& level,
                                                      const OptionalTensor& scale_any, const OptionalTensor& center_any,
                                                      const OptionalTensor& whole_any, int64_t rule, bool common) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "channel_select: x must be float32, float16 or bfloat16 on CUDA");
  SCRIMP_CHECK(x.dim() > 0, "channel_select: x must be [.., K], got a scalar");
  check_channel_select(x, level, scale_any, center_any, whole_any, rule);
  const auto device = x.get_device_index();
  for (const OptionalTensor& tensor : {OptionalTensor(x), OptionalTensor(level), scale_any, center_any, whole_any})
    SCRIMP_CHECK(!tensor || (tensor->is_cuda() && tensor->get_device_index() == device),
                 "channel_select: the tensors must be on one CUDA device");
  const SelectRule how = static_cast<SelectRule>(rule);
  const bool searched = how == SelectRule::top_k || how == SelectRule::top_p;
  const int64_t K = x.size(x.dim() - 1), most = searched ? kMostScores : INT32_MAX;
  SCRIMP_CHECK(K <= most, "channel_select: x has ", K, " channels; in CUDA C++ rule=", rule, " takes at most ", most);
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor kept = torch::stable::new_empty(x, shape), index = torch::stable::new_empty(x, {K}, ScalarType::Int);
  const Tensor count = torch::stable::new_empty(x, {1}, ScalarType::Int);
  shape.back() = 2;
  const Tensor energy = torch::stable::new_empty(x, shape, ScalarType::Float);
  const int64_t M = energy.numel() / 2, words = (K + 31) / 32;
  if (!kept.numel()) {
    torch::stable::fill_(index, -1);
    torch::stable::fill_(count, 0);
    torch::stable::fill_(energy, 0);
    return {kept, index, count, energy};
  }
  SCRIMP_CHECK(M <= INT32_MAX, "channel_select: ", M, " rows; one launch has at most ", INT32_MAX, " blocks");

  const Tensor rows = as_rows(x), scale = as_contiguous(scale_any.value_or(level)),
               center = as_contiguous(center_any.value_or(level)), whole = as_contiguous(whole_any.value_or(level));
  const Tensor masks = torch::stable::new_empty(x, {M, words}, ScalarType::Int);
  const Tensor judged = torch::stable::new_empty(x, {common ? K : 0}, ScalarType::Float);
  const Tensor cuts = torch::stable::new_empty(x, {searched ? (common ? 1 : M) : 0}, ScalarType::Long);
  const auto numbers = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  const Arguments p = {.x = rows.data_ptr(),
                       .level = numbers(level),
                       .scale = scale_any ? numbers(scale) : nullptr,
                       .center = center_any ? numbers(center) : nullptr,
                       .whole = whole_any ? static_cast<const bool*>(whole.data_ptr()) : nullptr,
                       .judged = common ? numbers(judged) : nullptr,
                       .cuts = searched ? static_cast<Cut*>(cuts.data_ptr()) : nullptr,
                       .kept = kept.data_ptr(),
                       .masks = static_cast<uint32_t*>(masks.data_ptr()),
                       .index = static_cast<int32_t*>(index.data_ptr()),
                       .count = static_cast<int32_t*>(count.data_ptr()),
                       .energy = numbers(energy),
                       .x_m = rows.dim() == 2 ? rows.stride(0) : K,
                       .M = M,
                       .K = K,
                       .words = words,
                       .rule = how};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch_dtype = dtype == ScalarType::Half       ? launch_as<__half>
                            : dtype == ScalarType::BFloat16 ? launch_as<__nv_bfloat16>
                                                            : launch_as<float>;
  launch_dtype(p, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "channel_select: the launch failed: ", cudaGetErrorString(status));
  return {kept, index, count, energy};
}

}  // namespace scrimp::cuda::channel_select

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("channel_select", TORCH_BOX(&scrimp::cuda::channel_select::run)); }
