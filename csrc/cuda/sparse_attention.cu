// sparse_attention on CUDA: checks, launches, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/sparse_attention.h"
#include "cuda/sparse_attention.order.cuh"

namespace scrimp::cuda::sparse_attention {

using torch::headeronly::ScalarType;

constexpr int64_t kFullGrid = 512;  // blocks that keep a large GPU busy

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// Whether every row of `tensor` starts at a multiple of 16 bytes and is contiguous.
static bool aligned(const Tensor& tensor) {
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(3) == 1;
  for (int i = 0; i < 3; ++i) fits &= tensor.size(i) == 1 || tensor.stride(i) % 8 == 0;
  return fits;
}

// A plan tensor, contiguous and at a multiple of 8 bytes.
static Tensor placed(const Tensor& tensor) {
  if (tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 8 == 0) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  return torch::stable::copy_(copy, tensor);
}

static List list_of(const Tensor& values, const Tensor& slices) {
  const auto stride = [](const Tensor& tensor, int i) { return tensor.size(i) == 1 ? 0 : tensor.stride(i); };
  return {.values = static_cast<const int32_t*>(values.data_ptr()),
          .slices = static_cast<const int32_t*>(slices.data_ptr()),
          .values_b = stride(values, 0),
          .values_h = stride(values, 1),
          .slices_b = stride(slices, 0),
          .slices_h = stride(slices, 1),
          .capacity = std::min<int64_t>(values.size(2), INT32_MAX)};
}

static void check_launch(cudaError_t status) {
  SCRIMP_CHECK(status == cudaSuccess, "sparse_attention: the launch failed: ", cudaGetErrorString(status));
}

static int64_t blocks_of(const Arguments& p, int64_t rows) {
  return p.n_rows / (int64_t{p.group} * p.n_q) * divide_up(p.n_q, p.q_block) *
         divide_up(int64_t{p.q_block} * p.group, rows);
}

// Twice the rows share a load of keys, unless a tile's last block would be half empty.
static int64_t rows_of_block(const Arguments& p) {
  const int64_t left = int64_t{p.q_block} * p.group % 128;
  return left == 0 || left > 64 ? 128 : 64;
}

// Few blocks share their keys with others, so that a large GPU has work for all its multiprocessors.
static int64_t splits_of(const Arguments& p, int64_t D) {
  const int64_t steps = divide_up(p.n_k + std::min<int64_t>(p.columns.capacity, p.n_k), 4096 / D);
  const int64_t wanted = kFullGrid / blocks_of(p, rows_of_block(p));
  return std::clamp<int64_t>(std::min(wanted, steps / kLeastSteps), 1, kMostSplits);
}

// Splits are alike, beyond a dozen rounds of a large GPU the last blocks hardly matter (docs/gpu-evidence.md has
// figures), and blocks of few keys would be over before they are sorted.
static bool sorted(const Arguments& p, int64_t blocks) {
  return p.splits == 1 && p.n_k >= 1024 && blocks > kFullGrid / 2 && blocks <= 8 * kFullGrid;
}

static void sort(const Arguments& p, int64_t rows, cudaStream_t stream) {
  const int blocks = static_cast<int>(blocks_of(p, rows));
  sparse_attention_steps_kernel<<<divide_up(blocks, kWarps), kThreads, 0, stream>>>(p, rows, blocks);
  check_launch(cudaGetLastError());
  sparse_attention_order_kernel<<<1, 32 * kOrderWarps, 0, stream>>>(p.steps, p.order, blocks);
  check_launch(cudaGetLastError());
}

template <class T, int D, int kTiles>
static void attend(const Arguments& p, cudaStream_t stream) {
  using Size = Sizes<D, kTiles>;
  const int64_t blocks = blocks_of(p, Size::kRows);
  SCRIMP_CHECK(blocks <= INT32_MAX, "sparse_attention: ", blocks, " blocks are too many for one launch");
  const auto kernel = sparse_attention_kernel<T, D, kTiles>;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Size::kBytes));
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(p.splits));
  kernel<<<grid, kThreads, Size::kBytes, stream>>>(p);
  check_launch(cudaGetLastError());
}

template <class T, int D>
static void run_as(const Arguments& p, cudaStream_t stream) {
  if (p.order) sort(p, rows_of_block(p), stream);
  (rows_of_block(p) == 128 ? attend<T, D, 2> : attend<T, D, 1>)(p, stream);
  if (p.splits == 1) return;
  const int64_t blocks = divide_up(p.n_rows, kWarps);
  sparse_attention_merge_kernel<T, D><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(p);
  check_launch(cudaGetLastError());
}

// Slices, indices and row starts out of range are clamped.
static std::tuple<Tensor, Tensor> run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges_any,
                                      const Tensor& range_slice_any, const Tensor& columns_any,
                                      const Tensor& column_slice_any, const std::optional<Tensor>& row_start_any,
                                      int64_t q_block, int64_t q_offset, bool causal, double scale) {
  check_sparse_attention(q, k, v, ranges_any, range_slice_any, columns_any, column_slice_any, row_start_any, q_block,
                         q_offset, scale);
  const auto dtype = q.scalar_type();
  const int64_t B = q.size(0), H = q.size(1), n_q = q.size(2), D = q.size(3), G = k.size(1), n_k = k.size(2);
  SCRIMP_CHECK((dtype == ScalarType::Half || dtype == ScalarType::BFloat16) && (D == 64 || D == 128),
               "sparse_attention: CUDA C++ serves float16 and bfloat16, head sizes 64 and 128; Triton the rest");
  const auto device = q.get_device_index();
  for (const Tensor* tensor : {&q, &k, &v, &ranges_any, &range_slice_any, &columns_any, &column_slice_any,
                               row_start_any ? &*row_start_any : &q})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "sparse_attention: all tensors must be on one CUDA device");
  SCRIMP_CHECK(B * H * n_q == 0 || (aligned(q) && aligned(k) && aligned(v)),
               "sparse_attention: CUDA C++ needs rows of q, k and v at multiples of 16 bytes");
  SCRIMP_CHECK((n_q + n_k) * std::max<int64_t>(H, 1) <= INT32_MAX, "sparse_attention: ", H, " heads of n_q=", n_q,
               " and n_k=", n_k, " tokens are too many for 32 bits");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor out = torch::stable::new_empty(q, {B, n_q, H, D});
  const Tensor lse = torch::stable::new_empty(q, {B, H, n_q}, ScalarType::Float);
  if (B * H * n_q > 0) {
    const Tensor ranges = placed(ranges_any), range_slice = placed(range_slice_any), columns = placed(columns_any),
                 column_slice = placed(column_slice_any);
    std::optional<Tensor> row_start;
    if (row_start_any) row_start = as_contiguous(*row_start_any);
    bool shared = true;  // whether all heads have one plan
    for (const Tensor* tensor : {&ranges, &range_slice, &columns, &column_slice}) shared &= tensor->size(1) == 1;
    const int64_t group = shared ? H / G : 1;
    Arguments p = {
        .q = q.data_ptr(),
        .k = k.data_ptr(),
        .v = v.data_ptr(),
        .ranges = list_of(ranges, range_slice),
        .columns = list_of(columns, column_slice),
        .row_start = row_start ? static_cast<const int32_t*>(row_start->data_ptr()) : nullptr,
        .out = out.data_ptr(),
        .lse = static_cast<float*>(lse.data_ptr()),
        .partial = nullptr,
        .partial_lse = nullptr,
        .steps = nullptr,
        .order = nullptr,
        .q_strides = strides_of(q),
        .k_strides = strides_of(k),
        .v_strides = strides_of(v),
        .row_start_b = row_start && row_start->size(0) > 1 ? n_q : 0,
        .n_rows = B * H * n_q,
        .H = static_cast<int32_t>(H),
        .group = static_cast<int32_t>(group),
        .shared_by = static_cast<int32_t>(H / G),
        .n_q = static_cast<int32_t>(n_q),
        .n_k = static_cast<int32_t>(n_k),
        .q_block = static_cast<int32_t>(std::min(q_block, n_q)),
        // Without causality every query stands behind the last key.
        .q_offset = static_cast<int32_t>(causal ? std::clamp(q_offset, -n_q, n_k) : n_k),
        .splits = 1,
        .scale = static_cast<float>(std::max(std::abs(scale) * 1.4426950408889634, 1e-30)),  // hidden scores are -inf
        .negative = scale < 0};
    p.splits = static_cast<int32_t>(splits_of(p, D));
    const int64_t several = p.splits > 1 ? p.splits : 0;
    const Tensor partial = torch::stable::new_empty(lse, {several, p.n_rows, D});
    const Tensor partial_lse = torch::stable::new_empty(lse, {several, p.n_rows});
    if (several) {
      p.partial = static_cast<float*>(partial.data_ptr());
      p.partial_lse = static_cast<float*>(partial_lse.data_ptr());
    }
    const int64_t blocks = blocks_of(p, rows_of_block(p)), in_order = sorted(p, blocks) ? blocks : 0;
    const Tensor steps = torch::stable::new_empty(ranges, {in_order});
    const Tensor order = torch::stable::new_empty(ranges, {in_order});
    if (in_order) {
      p.steps = static_cast<int32_t*>(steps.data_ptr());
      p.order = static_cast<int32_t*>(order.data_ptr());
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const bool half = dtype == ScalarType::Half;
    const auto run_typed = D == 64 ? (half ? run_as<__half, 64> : run_as<__nv_bfloat16, 64>)
                                   : (half ? run_as<__half, 128> : run_as<__nv_bfloat16, 128>);
    run_typed(p, static_cast<cudaStream_t>(stream));
  }
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace scrimp::cuda::sparse_attention

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&scrimp::cuda::sparse_attention::run));
}
