// rms_norm on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One row; x, weight and out are fp32, or bf16 when `bf16` is set.
struct RmsNormRow {
  const void *x, *weight;
  void* out;
  int64_t columns;
  float eps;
  bool bf16;
};

}  // namespace scrimp

SCRIMP_DECLARE_KERNEL(void rms_norm(const RmsNormRow& row))
