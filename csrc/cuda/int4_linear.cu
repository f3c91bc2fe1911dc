// int4_linear on CUDA: checks, choice of the tile, launch, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/int4_linear.h"
#include "cuda/int4_linear.cuh"

namespace scrimp::cuda::int4_linear {

using torch::headeronly::ScalarType;

constexpr int kWide = 8192;  // from so many outputs on, tiles of more of them keep a GPU busy, too

template <class T, class Form, class Tile>
static void launch(Arguments p, cudaStream_t stream) {
  const int64_t blocks = (p.K + kBlock - 1) / kBlock, all = (blocks + kWarps - 1) / kWarps * kWarps;
  p.chunk = static_cast<int>(p.groups_of_block ? std::min<int64_t>(Tile::kGroups / p.groups_of_block, all) : all);
  p.chunk_groups = p.groups_of_block ? static_cast<uint32_t>(p.chunk * p.groups_of_block) : 1;
  p.tiles = (p.M + 8 * Tile::kTokens - 1) / (8 * Tile::kTokens);
  constexpr int64_t kEach = kOutputs<Form, Tile>;
  const int64_t grid = (p.N + kEach - 1) / kEach * p.tiles;
  SCRIMP_CHECK(grid <= INT32_MAX, "int4_linear: ", p.M, " rows and ", p.N, " outputs are ", grid,
               " tiles; one launch has at most ", INT32_MAX);
  constexpr int kBytes = kShared<Form, Tile>;
  const auto kernel = int4_linear_kernel<T, Form, Tile>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  kernel<<<static_cast<uint32_t>(grid), kThreads, kBytes, stream>>>(p);
}

template <class T>
static void launch_as(const Arguments& p, bool byte_zeros, cudaStream_t stream) {
  const auto launch_tile = [&]<class Form>(Form) {
    const bool wide = p.N >= kWide;
    if (p.M <= 4 && !wide) return launch<T, Form, Few>(p, stream);
    if constexpr (!std::is_same_v<Form, Codebook>) {  // looking up costs more than reading x again
      if (p.M > 16 || (p.M > 8 && wide)) return launch<T, Form, Many>(p, stream);
    }
    launch<T, Form, Some>(p, stream);
  };
  if (p.codebook) return launch_tile(Codebook());
  if (!p.zeros) return launch_tile(Plain());
  byte_zeros ? launch_tile(ByteZeros()) : launch_tile(Zeros());
}

static bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

// `x` itself if its rows are equally far apart and start at multiples of 16 bytes, else a copy.
static Tensor aligned_rows(const Tensor& x) {
  const bool rows = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) % 8 == 0;
  if ((rows || x.is_contiguous()) && aligned(x)) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

// Columns of x as `order` names them.
static Tensor permuted(const Tensor& x, const Tensor& order) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(x), from(int64_t{-1}), from(order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

static const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// The op's `cuda_takes` sends only such calls here.
static void check_is_taken(const Int4Problem& p) {
  const auto dtype = p.x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "int4_linear: x must be float16 or bfloat16 in CUDA C++");
  SCRIMP_CHECK(!p.int8, "int4_linear: there is no int8 mode in CUDA C++");
  SCRIMP_CHECK(!p.codebook || p.codebook->scalar_type() == ScalarType::Char,
               "int4_linear: a codebook must be int8 in CUDA C++");
  SCRIMP_CHECK(p.K % 32 == 0 && p.group % 32 == 0, "int4_linear: K=", p.K, " and group_size=", p.group,
               " must be multiples of 32 in CUDA C++");
  SCRIMP_CHECK(aligned(p.qweight), "int4_linear: qweight must start at a multiple of 16 bytes in CUDA C++");
}

static Tensor run(const Tensor& x_in, const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                  const std::optional<Tensor>& codebook, const std::optional<Tensor>& permutation,
                  const std::optional<Tensor>& bias, int64_t group_size, int64_t zero_kind, int64_t mode) {
  const Int4Problem problem =
      int4_problem(x_in, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode);
  const auto device = x_in.get_device_index();
  SCRIMP_CHECK(
      problem.all([&](const Tensor& tensor) { return tensor.is_cuda() && tensor.get_device_index() == device; }),
      "int4_linear: the tensors must be on one CUDA device");
  problem.check();
  check_is_taken(problem);
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x_in.sizes().begin(), x_in.sizes().end());
  shape.back() = problem.N;
  const Tensor out = torch::stable::new_empty(x_in, shape);
  if (!out.numel()) return out;
  const Tensor x = aligned_rows(problem.permutation ? permuted(x_in, *problem.permutation) : x_in);
  const int64_t M = out.numel() / problem.N;
  SCRIMP_CHECK(std::max({M, problem.N, problem.K}) <= INT32_MAX / 2, "int4_linear: M=", M, ", N=", problem.N,
               " and K=", problem.K, " must be at most ", INT32_MAX / 2);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int last_word = group_size == 32 ? 0 : group_size == 64 ? 1 : 3;
  const bool grouped = group_size == 32 || group_size == 64 || group_size == 128;
  const Arguments p = {.x = x.data_ptr(),
                       .codes = static_cast<const uint8_t*>(problem.qweight.data_ptr()),
                       .scales = problem.scales.data_ptr(),
                       .zeros = data(problem.zeros),
                       .codebook = static_cast<const int8_t*>(data(problem.codebook)),
                       .bias = data(problem.bias),
                       .out = out.data_ptr(),
                       .x_stride = x.dim() == 2 ? x.stride(0) : problem.K,
                       .M = static_cast<int>(M),
                       .N = static_cast<int>(problem.N),
                       .K = static_cast<int>(problem.K),
                       .groups = static_cast<int>(problem.scales.size(1)),
                       .last_word = last_word,
                       .groups_of_block = grouped ? 4 / (last_word + 1) : 0,
                       .scale_type = *float_type(problem.scales),
                       .kind = problem.kind};
  const auto launch_dtype = x.scalar_type() == ScalarType::Half ? launch_as<__half> : launch_as<__nv_bfloat16>;
  launch_dtype(p, problem.byte_zeros, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "int4_linear: the launch failed: ", cudaGetErrorString(status));
  return out;
}

}  // namespace scrimp::cuda::int4_linear

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("int4_linear", TORCH_BOX(&scrimp::cuda::int4_linear::run)); }
