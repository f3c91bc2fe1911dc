// codebook_topk on CUDA: checks, the ranges of codes, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/codebook_topk.h"
#include "cuda/codebook_topk.cuh"

namespace scrimp::cuda::codebook_topk {

using torch::headeronly::ScalarType;

constexpr int64_t kPrograms = 512;  // keep a GPU busy
constexpr int64_t kWalk = 2;        // tiles of codes of a block at the least

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static bool aligned(const void* data, int64_t elements) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && elements % 8 == 0;
}

// `x` itself if it is contiguous and begins at a multiple of 16 bytes.
static Tensor aligned_copy(const Tensor& x) {
  if (x.is_contiguous() && aligned(x.data_ptr(), 0)) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

template <class T, int kKept>
static void search(const Arguments& p, int64_t blocks, cudaStream_t stream) {
  const auto kernel = codebook_topk_kernel<T, kKept>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  kernel<<<static_cast<uint32_t>(blocks), kThreads, kShared, stream>>>(p);
}

template <class T>
static void launch(const Arguments& p, bool euclidean, cudaStream_t stream) {
  const int64_t codes = divide_up(int64_t{p.G} * p.C, kWarps), blocks = p.blocks * p.G * p.parts,
                rows = divide_up(p.M * p.G, kWarps);
  SCRIMP_CHECK(std::max({codes, blocks, rows}) <= INT32_MAX, "codebook_topk: ", p.M, " rows of ", p.G,
               " codebooks are too many blocks; one launch has at most ", INT32_MAX);
  if (euclidean) codebook_topk_norm_kernel<T><<<static_cast<uint32_t>(codes), kThreads, 0, stream>>>(p);
  p.k <= 8 ? search<T, 8>(p, blocks, stream) : search<T, 64>(p, blocks, stream);
  codebook_topk_gather_kernel<T><<<static_cast<uint32_t>(rows), kThreads, 0, stream>>>(p);
}

static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& codebook,
                                              const std::optional<Tensor>& any_bias, int64_t k, bool euclidean,
                                              bool mean) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "codebook_topk: x must be float16 or bfloat16 in CUDA C++");
  check_codebook_topk(x, codebook, any_bias, k);
  const auto device = x.get_device_index();
  for (const Tensor* tensor : {&x, &codebook, any_bias ? &*any_bias : &x})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "codebook_topk: x, codebook and bias must be on one CUDA device");
  const int64_t dims = codebook.dim(), G = dims == 3 ? codebook.size(0) : 1, C = codebook.size(dims - 2),
                D = codebook.size(dims - 1), book = dims == 3 ? codebook.stride(0) : 0,
                stride = codebook.stride(dims - 2);
  SCRIMP_CHECK(D > 0 && D % 8 == 0 && aligned(codebook.data_ptr(), stride) && book % 8 == 0,
               "codebook_topk: codes must begin at multiples of 16 bytes in CUDA C++");
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor out = torch::stable::new_empty(x, shape);
  shape.back() = k;
  if (dims == 3) shape.insert(shape.end() - 1, G);
  const Tensor index = torch::stable::new_empty(x, shape, ScalarType::Int);
  const Tensor scores = torch::stable::new_empty(x, shape, ScalarType::Float);
  if (!out.numel()) return {out, index, scores};

  const Tensor rows = aligned_copy(x);
  const Tensor bias = as_contiguous(any_bias.value_or(codebook));
  const int64_t M = out.numel() / (G * D), blocks = divide_up(M, kRows), tiles = divide_up(C, kCodes);
  const int64_t most = std::min({divide_up(kPrograms, blocks * G), divide_up(tiles, kWalk), kMostKeys / k});
  const int64_t walk = divide_up(tiles, most), parts = divide_up(tiles, walk);
  const Tensor keys = torch::stable::new_empty(x, {M, G, parts, k}, ScalarType::Long);
  const Tensor norms = torch::stable::new_empty(x, {euclidean ? G * C : 0}, ScalarType::Float);
  float* given = any_bias ? static_cast<float*>(bias.data_ptr()) : nullptr;
  const Arguments p = {.x = rows.data_ptr(),
                       .codebook = codebook.data_ptr(),
                       .bias = given,
                       .added = euclidean ? static_cast<float*>(norms.data_ptr()) : given,
                       .keys = static_cast<int64_t*>(keys.data_ptr()),
                       .out = out.data_ptr(),
                       .index = static_cast<int32_t*>(index.data_ptr()),
                       .scores = static_cast<float*>(scores.data_ptr()),
                       .x_m = G * D,
                       .codebook_g = book,
                       .codebook_c = stride,
                       .M = M,
                       .blocks = blocks,
                       .G = static_cast<int32_t>(G),
                       .C = static_cast<int32_t>(C),
                       .D = static_cast<int32_t>(D),
                       .k = static_cast<int32_t>(k),
                       .parts = static_cast<int32_t>(parts),
                       .walk = static_cast<int32_t>(walk),
                       .mean = mean};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch_dtype = dtype == ScalarType::Half ? launch<__half> : launch<__nv_bfloat16>;
  launch_dtype(p, euclidean, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "codebook_topk: the launch failed: ", cudaGetErrorString(status));
  return {out, index, scores};
}

}  // namespace scrimp::cuda::codebook_topk

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("codebook_topk", TORCH_BOX(&scrimp::cuda::codebook_topk::run)); }
