// exact_head on CUDA: checks, coordinates by the op linear, launches for at most 64 states at a time, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/call_linear.h"
#include "common/exact_head.h"
#include "cuda/exact_head.cuh"

namespace scrimp::cuda::exact_head {

using torch::headeronly::ScalarType;

// Tensor cores truncate what they align: at most 17/8 of the error of rounded sums, which the screen's slack is.
constexpr double kSlack = 4 * (1 + 0x1p-20);

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static bool aligned(const Tensor& tensor, int64_t stride) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && stride % 8 == 0;
}

// [M, K] with rows that begin at multiples of 16 bytes; K is a multiple of 8.
static Tensor aligned_rows(const Tensor& x, int64_t M, int64_t K) {
  const Tensor rows = torch::stable::view(as_contiguous(x), {M, K});
  if (aligned(rows, K)) return rows;
  Tensor copy = torch::stable::new_empty(x, {M, K});
  return torch::stable::copy_(copy, rows);
}

template <class T, int kColumns>
static void launch(const Arguments& p, cudaStream_t stream) {
  const auto blocks = [](int64_t count, int64_t of) { return static_cast<uint32_t>(divide_up(count, of)); };
  const auto states = static_cast<uint32_t>(p.M);
  constexpr int kShared = kStages * kStageNumbers<kColumns> * static_cast<int>(sizeof(T));
  cudaFuncSetAttribute(exact_head_rerank_kernel<T, kColumns>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  exact_head_state_kernel<T><<<static_cast<uint32_t>(p.padded), kThreads, 0, stream>>>(p);
  exact_head_screen_kernel<kColumns><<<blocks(p.T, 2 * kWarps), kThreads, 0, stream>>>(p);
  exact_head_select_kernel<<<states, kThreads, 0, stream>>>(p);
  for (const bool last : {false, true}) {
    exact_head_list_kernel<<<blocks(int64_t{kTile} * p.T, 4 * kThreads), kThreads, 0, stream>>>(p, last);
    exact_head_rerank_kernel<T, kColumns><<<blocks(p.V, kListed), kRerankThreads, kShared, stream>>>(p, last);
    exact_head_top_kernel<T><<<states, kThreads, 0, stream>>>(p, last);
  }
}

static std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Tensor& weight, const Tensor& codes,
                                              const Tensor& scales, const std::optional<Tensor>& basis,
                                              const Tensor& error, const Tensor& norm, double slack, int64_t wide,
                                              int64_t k) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "exact_head: x must be float16 or bfloat16 in CUDA C++");
  check_exact_head(x, weight, codes, scales, basis, error, norm, slack, wide, k);
  const auto device = x.get_device_index();
  for (const Tensor* tensor : {&x, &weight, &codes, &scales, basis ? &*basis : &x, &error, &norm})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "exact_head: all tensors must be on one CUDA device");
  const int64_t K = x.size(x.dim() - 1), V = weight.size(0), T = codes.size(0), G = error.size(0);
  SCRIMP_CHECK(K > 0 && K % 8 == 0 && aligned(weight, weight.stride(0)),
               "exact_head: rows of weight must begin at multiples of 16 bytes in CUDA C++");
  SCRIMP_CHECK(aligned(codes, 0) && aligned(scales, 0), "exact_head: the screen must begin at a multiple of 16 bytes");
  SCRIMP_CHECK(V <= INT32_MAX - 32 * kTile && K <= INT32_MAX - 2 * kDepth, "exact_head: a weight of shape ",
               shape_text(weight), " is too large");
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.pop_back();
  const Tensor scored = torch::stable::new_empty(x, shape, ScalarType::Int);
  const int64_t M = scored.numel();
  shape.push_back(k);
  const Tensor values = torch::stable::new_empty(x, shape);
  const Tensor ids = torch::stable::new_empty(x, shape, ScalarType::Long);
  if (M == 0) return {values, ids, scored};

  const Tensor rows = aligned_rows(x, M, K);
  const int64_t most = std::min<int64_t>(M, kStates), padded = most <= 8 ? 8 : kStates;
  const int64_t pitch = kListed * divide_up(V, kListed);
  const auto floats = [&](int64_t count) { return torch::stable::new_empty(x, {count}, ScalarType::Float); };
  const Tensor pieces = torch::stable::new_empty(x, {2 * padded * G * kGroup}, ScalarType::Byte);
  const Tensor steps = floats(2 * G * padded), numbers = floats(3 * most);
  const Tensor centre = floats(most * kTile * T), best = floats(most * T);
  const Tensor listed = torch::stable::new_empty(x, {V}, ScalarType::Int);
  const Tensor needs = torch::stable::new_empty(x, {V}, ScalarType::Long);
  const Tensor logits = torch::stable::new_empty(x, {most, pitch});
  const auto pointer = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  void* stream_of = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_of));
  const auto stream = static_cast<cudaStream_t>(stream_of);
  const int64_t size = static_cast<int64_t>(x.element_size());
  for (int64_t first = 0; first < M; first += kStates) {
    const int64_t count = std::min<int64_t>(M - first, kStates);
    Tensor states = torch::stable::narrow(const_cast<Tensor&>(rows), 0, first, count);
    Tensor coordinates = states;
    if (basis) {
      Tensor wider = torch::stable::new_empty(x, {count, K}, ScalarType::Float);
      coordinates = call_linear(torch::stable::copy_(wider, states), *basis);
    }
    const Tensor counts = torch::stable::new_zeros(x, {2 * (1 + count)}, ScalarType::Int);
    const Arguments p = {
        .x = states.data_ptr(),
        .coordinates = basis ? pointer(coordinates) : nullptr,
        .weight = weight.data_ptr(),
        .codes = static_cast<const uint8_t*>(codes.data_ptr()),
        .scales = pointer(scales),
        .error = pointer(error),
        .norm = pointer(norm),
        .pieces = static_cast<uint8_t*>(pieces.data_ptr()),
        .steps = reinterpret_cast<Step*>(pointer(steps)),
        .bound = pointer(numbers),
        .cut = pointer(numbers) + most,
        .threshold = pointer(numbers) + 2 * most,
        .centre = pointer(centre),
        .best = pointer(best),
        .counts = static_cast<int32_t*>(counts.data_ptr()),
        .listed = static_cast<int32_t*>(listed.data_ptr()),
        .needs = static_cast<uint64_t*>(needs.data_ptr()),
        .logits = logits.data_ptr(),
        .values = static_cast<char*>(values.data_ptr()) + first * k * size,
        .ids = static_cast<int64_t*>(ids.data_ptr()) + first * k,
        .scored = static_cast<int32_t*>(scored.data_ptr()) + first,
        .x_m = K,
        .weight_n = weight.stride(0),
        .tile_bytes = codes.size(1),
        .pitch = pitch,
        .slack = slack * kSlack,
        .relative = dtype == ScalarType::Half ? 0x1p-10f : 0x1p-7f,
        .least = dtype == ScalarType::Half ? 0x1p-24f : 0x1p-126f,
        .M = static_cast<int32_t>(count),
        .padded = static_cast<int32_t>(count <= 8 ? 8 : kStates),
        .K = static_cast<int32_t>(K),
        .D = static_cast<int32_t>(basis ? kGroup * G : K),
        .G = static_cast<int32_t>(G),
        .wide = static_cast<int32_t>(wide),
        .V = static_cast<int32_t>(V),
        .T = static_cast<int32_t>(T),
        .k = static_cast<int32_t>(k),
    };
    const bool half = dtype == ScalarType::Half;
    const auto launch_as = count <= 8 ? half ? launch<__half, 1> : launch<__nv_bfloat16, 1>
                           : half     ? launch<__half, 8>
                                      : launch<__nv_bfloat16, 8>;
    launch_as(p, stream);
    const cudaError_t status = cudaGetLastError();
    SCRIMP_CHECK(status == cudaSuccess, "exact_head: the launch failed: ", cudaGetErrorString(status));
  }
  return {values, ids, scored};
}

}  // namespace scrimp::cuda::exact_head

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("exact_head", TORCH_BOX(&scrimp::cuda::exact_head::run)); }
