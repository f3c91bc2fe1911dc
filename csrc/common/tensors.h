// Tensors made and viewed without the dispatcher, which takes longer than a small kernel. On the CPU only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace scrimp {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// Not filled, of the dtype of `like` where none is named.
inline Tensor cpu_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                          std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  to<int32_t>(from(dtype.value_or(like.scalar_type()))),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// The same, contiguous.
inline Tensor cpu_empty(const Tensor& like, IntHeaderOnlyArrayRef sizes,
                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int64_t strides[64];  // torch allows no more dimensions
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return cpu_strided(like, sizes, {strides, sizes.size()}, dtype);
}

// [B, H, N, D], the heads of a token side by side in memory.
inline Tensor cpu_heads(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  return cpu_strided(like, {B, H, N, D}, {N * H * D, D, H * D, 1});
}

// Elements of `of`, `offset` behind its first one, in sizes and strides of the caller's.
inline Tensor as_strided(const Tensor& of, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, int64_t offset) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), sizes.size(), sizes.data(), strides.data(),
                                                        of.storage_offset() + offset, &made));
  return Tensor(made);
}

}  // namespace scrimp
