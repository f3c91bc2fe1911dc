// Which float the elements of a tensor are.
#pragma once

#include "common/check.h"
#include "common/float_kind.h"

namespace scrimp {

// `what` names the tensor in the error.
inline FloatKind float_kind(const char* what, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const auto dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return FloatKind::fp32;
  if (dtype == ScalarType::BFloat16) return FloatKind::bf16;
  SCRIMP_CHECK(dtype == ScalarType::Half, what, " must be float32, bfloat16 or float16 on the CPU");
  return FloatKind::fp16;
}

}  // namespace scrimp
