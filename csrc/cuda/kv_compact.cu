// kv_compact on CUDA: checks, launch, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "common/kv_compact.h"
#include "cuda/kv_compact.cuh"

namespace scrimp::cuda::kv_compact {

using torch::headeronly::ScalarType;

// Rows outside the cache and behind a negative one stay where they are.
static void run(const Tensor& cache, const Tensor& start_any, const Tensor& path_any) {
  const auto dtype = cache.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "kv_compact: cache must be float32, float16 or bfloat16 on CUDA");
  check_compaction(cache, start_any, path_any);
  const auto device = cache.get_device_index();
  for (const Tensor* tensor : {&cache, &start_any, &path_any})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "kv_compact: cache, start and path must be on one CUDA device");
  if (cache.numel() == 0 || path_any.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor start = as_contiguous(start_any), path = as_contiguous(path_any);

  const int64_t size = static_cast<int64_t>(cache.element_size()), row = cache.size(4) * size;
  const int64_t items = cache.size(0) * cache.size(1) * cache.size(2), blocks = (items + kWarps - 1) / kWarps;
  SCRIMP_CHECK(blocks <= INT32_MAX, "kv_compact: ", items, " heads are ", blocks, " blocks; one launch has at most ",
               INT32_MAX);
  bool wide = row % 16 == 0 && reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0;
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    strides[i] = cache.size(i) > 1 ? cache.stride(i) * size : 0;
    wide &= strides[i] % 16 == 0;
  }
  const Arguments p = {.cache = static_cast<char*>(cache.data_ptr()),
                       .start = static_cast<const int32_t*>(start.data_ptr()),
                       .path = static_cast<const int32_t*>(path.data_ptr()),
                       .cache_l = strides[0],
                       .cache_b = strides[1],
                       .cache_g = strides[2],
                       .cache_c = strides[3],
                       .items = items,
                       .C = cache.size(3),
                       .T = path.size(1),
                       .B = static_cast<uint32_t>(cache.size(1)),
                       .G = static_cast<uint32_t>(cache.size(2)),
                       .vectors = static_cast<uint32_t>(row / (wide ? 16 : 2))};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto kernel = wide ? kv_compact_kernel<16> : kv_compact_kernel<2>;
  kernel<<<static_cast<uint32_t>(blocks), 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "kv_compact: the launch failed: ", cudaGetErrorString(status));
}

}  // namespace scrimp::cuda::kv_compact

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("kv_compact", TORCH_BOX(&scrimp::cuda::kv_compact::run)); }
