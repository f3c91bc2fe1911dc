// kv_compact on the CPU: checks, work split, registration. Moving rows needs no instruction set of its own.
#include "common/kv_compact.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "common/check.h"
#include "common/parallel.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_path(const int32_t* path, int64_t T, int64_t first, int64_t b, int64_t capacity) {
  int64_t before = -1;
  for (int64_t i = 0; i < T && path[i] != -1; before = path[i++])
    SCRIMP_CHECK(path[i] > before, "kv_compact: path[", b, ", ", i, "]=", path[i], " does not come after ", before);
  SCRIMP_CHECK(before < 0 || (first >= 0 && first + before < capacity), "kv_compact: start[", b, "]=", first,
               " and row ", before, " leave the cache's ", capacity, " slots");
}

static void kv_compact(const Tensor& cache, const Tensor& start_any, const Tensor& path_any) {
  SCRIMP_CHECK(cache.is_cpu() && start_any.is_cpu() && path_any.is_cpu(), "kv_compact: all tensors must be on the CPU");
  const auto dtype = cache.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
               "kv_compact: cache must be float32, bfloat16 or float16 on the CPU");
  check_compaction(cache, start_any, path_any);
  const int64_t L = cache.size(0), B = cache.size(1), G = cache.size(2), C = cache.size(3), D = cache.size(4);
  const int64_t T = path_any.size(1);
  const Tensor starts = as_contiguous(start_any), paths = as_contiguous(path_any);
  const auto* start = static_cast<const int32_t*>(starts.data_ptr());
  const auto* path = static_cast<const int32_t*>(paths.data_ptr());
  for (int64_t b = 0; b < B; ++b) check_path(path + b * T, T, start[b], b, C);

  if (cache.numel() == 0) return;
  const int64_t size = dtype == ScalarType::Float ? 4 : 2;
  auto* data = static_cast<char*>(cache.data_ptr());
  const auto move = [&](int64_t item) {
    const int64_t layer = item / B, b = item % B;
    for (int64_t i = 0; i < T && path[b * T + i] != -1; ++i) {
      if (path[b * T + i] == i) continue;
      for (int64_t g = 0; g < G; ++g) {
        char* base = data + size * (layer * cache.stride(0) + b * cache.stride(1) + g * cache.stride(2));
        memcpy(base + size * (start[b] + i) * cache.stride(3),
               base + size * (start[b] + path[b * T + i]) * cache.stride(3), size * D);
      }
    }
  };
  const int64_t items = L * B;
  for_each_item(items, worker_count(items, items * T * G * D), [&](int64_t item, int64_t) { move(item); });
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("kv_compact", TORCH_BOX(&scrimp::kv_compact)); }
