// The list of channels that a sparse product takes.
#pragma once

#include "common/check.h"

namespace scrimp {

// Shapes and types of a list of at most K channels.
inline void check_list_form(const char* op, const Tensor& index, const Tensor& count, int64_t K) {
  const auto is_list = [](const Tensor& tensor) {
    return tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.dim() == 1;
  };
  SCRIMP_CHECK(is_list(index) && index.size(0) <= K, op, ": index must be int32 [at most ", K, "], got ",
               shape_text(index));
  SCRIMP_CHECK(is_list(count) && count.size(0) == 1, op, ": count must be int32 [1], got ", shape_text(count));
}

// How many channels `index` lists, a contiguous one on the CPU; one that does not ascend within K is an error of `op`.
inline int64_t check_list(const char* op, const Tensor& index, const Tensor& count, int64_t K) {
  check_list_form(op, index, count, K);
  SCRIMP_CHECK(index.is_cpu() && count.is_cpu(), op, ": index and count must be on the CPU");
  const int64_t listed = *static_cast<const int32_t*>(count.data_ptr());
  SCRIMP_CHECK(listed >= 0 && listed <= index.size(0), op, ": count=", listed, " is not within a list of ",
               index.size(0));
  const int32_t* list = static_cast<const int32_t*>(index.data_ptr());
  if (listed == 0) return 0;
  bool ascends = list[0] >= 0 && list[listed - 1] < K;
  for (int64_t j = 1; j < listed; ++j) ascends &= list[j - 1] < list[j];
  SCRIMP_CHECK(ascends, op, ": index does not ascend within [0, ", K, ")");
  return listed;
}

}  // namespace scrimp
