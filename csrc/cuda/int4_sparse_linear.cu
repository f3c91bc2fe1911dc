// int4_sparse_linear on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/blocks.h"
#include "common/channel_list.h"
#include "common/int4_sparse_linear.h"
#include "cuda/int4_sparse_linear.cuh"

namespace scrimp::cuda::int4_sparse_linear {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

template <class Form, int kRows>
static void launch(Arguments p, cudaStream_t stream) {
  p.row_tiles = static_cast<uint32_t>((p.M + kRows - 1) / kRows);
  p.tiles = static_cast<uint32_t>((p.ends.N + kOutputs - 1) / kOutputs);
  const auto kernel = int4_sparse_linear_kernel<Form, kRows>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared<Form>);
  const uint32_t blocks = blocks_of("int4_sparse_linear", static_cast<int64_t>(p.row_tiles) * p.tiles * p.chunks);
  kernel<<<blocks, kThreads, kShared<Form>, stream>>>(p);
  if (p.sums)
    int4_sparse_linear_sums_kernel<<<blocks_of("int4_sparse_linear", (p.M * p.ends.N + kThreads - 1) / kThreads),
                                     kThreads, 0, stream>>>(p);
}

template <class Form>
static void launch_as(const Arguments& p, cudaStream_t stream) {
  p.M == 1 ? launch<Form, 1>(p, stream) : launch<Form, 4>(p, stream);
}

static bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 16 == 0;
}

// The op's `cuda_takes` sends only such calls here.
static void check_is_taken(const Tensor& x, const Tensor& codes, bool permuted, int64_t group, int64_t mode) {
  SCRIMP_CHECK(float_type(x), "int4_sparse_linear: x must be float32, float16 or bfloat16 on CUDA");
  SCRIMP_CHECK(mode == 0 && !permuted, "int4_sparse_linear: there is neither int8 mode nor permutation in CUDA C++");
  SCRIMP_CHECK(group % 32 == 0 || group == codes.size(0), "int4_sparse_linear: group_size=", group,
               " must be a multiple of 32 in CUDA C++");
  SCRIMP_CHECK(codes.stride(1) == 1 && aligned(codes.data_ptr(), codes.stride(0)),
               "int4_sparse_linear: codes of a channel must begin at multiples of 16 bytes in CUDA C++");
}

static Tensor run(const Tensor& x, const Tensor& codes, const Tensor& scales_any, const OptionalTensor& zeros_any,
                  const OptionalTensor& codebook_any, const OptionalTensor& permutation, const Tensor& index,
                  const Tensor& count, const OptionalTensor& bias_any, int64_t group, int64_t zero_kind, int64_t mode) {
  SCRIMP_CHECK(0 <= zero_kind && zero_kind <= 3, "int4_sparse_linear: zero_kind=", zero_kind, " must be 0 to 3");
  SCRIMP_CHECK(mode == 0 || mode == 1, "int4_sparse_linear: mode=", mode, " must be 0 or 1");
  SCRIMP_CHECK(x.dim() > 0 && codes.dim() == 2 && scales_any.dim() == 2,
               "int4_sparse_linear: x must be [.., inputs], codes [K, bytes], scales [groups, N]");
  const Int4Zeros kinds[] = {Int4Zeros::none, Int4Zeros::shift, Int4Zeros::shift, Int4Zeros::offset};
  check_int4_channels(x, codes, scales_any, zeros_any, codebook_any, permutation, bias_any, group, kinds[zero_kind],
                      zero_kind == 1, mode == 1);
  const int64_t K = codes.size(0), N = scales_any.size(1);
  check_list_form("int4_sparse_linear", index, count, x.size(x.dim() - 1));
  check_is_taken(x, codes, permutation.has_value(), group, mode);
  const auto device = x.get_device_index();
  for (const OptionalTensor& tensor : {OptionalTensor(x), OptionalTensor(codes), OptionalTensor(scales_any), zeros_any,
                                       codebook_any, OptionalTensor(index), OptionalTensor(count), bias_any})
    SCRIMP_CHECK(!tensor || (tensor->is_cuda() && tensor->get_device_index() == device),
                 "int4_sparse_linear: the tensors must be on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  const Tensor out = torch::stable::new_empty(x, shape);
  if (!out.numel()) return out;

  const int64_t M = out.numel() / N, chunks = std::max<int64_t>((K + kChunk - 1) / kChunk, 1);
  SCRIMP_CHECK(std::max({M, N, K}) <= INT32_MAX, "int4_sparse_linear: M=", M, ", N=", N, " and K=", K,
               " must be at most ", INT32_MAX);
  const Tensor rows = x.dim() == 2 ? x : as_contiguous(x), scales = unit_last_stride(scales_any);
  const Tensor zeros = unit_last_stride(zeros_any.value_or(scales)), bias = as_contiguous(bias_any.value_or(count)),
               codebook = as_contiguous(codebook_any.value_or(count));
  const Tensor sums = torch::stable::new_empty(x, {chunks > 1 ? chunks * M * N : 0}, ScalarType::Float);
  const int64_t x_m = rows.dim() == 2 ? rows.stride(0) : K, x_k = rows.stride(rows.dim() - 1);
  const bool wide_x = x.element_size() == 2 && K % 8 == 0 && x_k == 1 && aligned(rows.data_ptr(), 2 * x_m);
  const bool wide = scales.element_size() == 2 && N % 8 == 0 && aligned(scales.data_ptr(), 2 * scales.stride(0));
  const Arguments p = {.x = rows.data_ptr(),
                       .codes = static_cast<const uint8_t*>(codes.data_ptr()),
                       .scales = scales.data_ptr(),
                       .zeros = zeros_any ? zeros.data_ptr() : nullptr,
                       .codebook = codebook_any ? codebook.data_ptr() : nullptr,
                       .list = {.index = static_cast<const int32_t*>(index.data_ptr()),
                                .count = static_cast<const int32_t*>(count.data_ptr()),
                                .stride = index.stride(0),
                                .capacity = index.size(0)},
                       .ends = {.bias = bias_any ? bias.data_ptr() : nullptr,
                                .residual = nullptr,
                                .out = out.data_ptr(),
                                .residual_m = 0,
                                .N = N},
                       .sums = chunks > 1 ? static_cast<float*>(sums.data_ptr()) : nullptr,
                       .x_m = x_m,
                       .x_k = x_k,
                       .codes_k = codes.stride(0),
                       .scales_g = scales.stride(0),
                       .zeros_g = zeros.stride(0),
                       .M = M,
                       .K = K,
                       .chunks = chunks,
                       .group = group == K ? 0 : group,
                       .row_bytes = codes.size(1),
                       .type = *float_type(x),
                       .scale_type = *float_type(scales),
                       .kind = kinds[zero_kind],
                       .byte_zeros = zero_kind == 1,
                       .byte_codebook = codebook_any && codebook.scalar_type() == ScalarType::Char,
                       .wide_x = wide_x,
                       .wide_scales = wide};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch_form = codebook_any ? launch_as<Codebook> : zeros_any ? launch_as<Zeros> : launch_as<Plain>;
  launch_form(p, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "int4_sparse_linear: the launch failed: ", cudaGetErrorString(status));
  return out;
}

}  // namespace scrimp::cuda::int4_sparse_linear

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) {
  m.impl("int4_sparse_linear", TORCH_BOX(&scrimp::cuda::int4_sparse_linear::run));
}
