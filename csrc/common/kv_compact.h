// kv_compact: what the launchers of every device check before they touch memory.
#pragma once

#include "common/check.h"

namespace scrimp {

// Devices and the dtype of the cache are the launcher's own.
inline void check_compaction(const Tensor& cache, const Tensor& start, const Tensor& path) {
  using torch::headeronly::ScalarType;
  SCRIMP_CHECK(start.scalar_type() == ScalarType::Int && path.scalar_type() == ScalarType::Int,
               "kv_compact: start and path must be int32");
  SCRIMP_CHECK(cache.dim() == 5, "kv_compact: cache must be [L, B, G, C, D], got ", shape_text(cache));
  const int64_t B = cache.size(1);
  SCRIMP_CHECK(start.dim() == 1 && start.size(0) == B && path.dim() == 2 && path.size(0) == B,
               "kv_compact: shapes start ", shape_text(start), " and path ", shape_text(path),
               " do not fit the cache's batch of ", B);
  for (int i = 0; i < 5; ++i)
    SCRIMP_CHECK(cache.size(i) <= 1 || (i == 4 ? cache.stride(i) == 1 : cache.stride(i) > 0),
                 "kv_compact: cache must have a contiguous last dimension and no expanded one, got stride ",
                 cache.stride(i), " in dimension ", i);
}

}  // namespace scrimp
