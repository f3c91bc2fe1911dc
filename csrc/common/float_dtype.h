// Which float the elements of a tensor are.
#pragma once

#include <optional>

#include "common/check.h"
#include "common/float_type.h"

namespace scrimp {

inline std::optional<FloatType> float_type(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::fp32;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    case ScalarType::Half:
      return FloatType::fp16;
    default:
      return std::nullopt;
  }
}

}  // namespace scrimp
