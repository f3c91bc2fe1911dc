// gelu_mul on the CPU: registration.
#include "cpu/gelu_mul.h"

#include <torch/csrc/stable/library.h>

#include "common/gate_rows.h"
#include "cpu/ops.h"

namespace scrimp {

Tensor gelu_mul(const Tensor& gate, const Tensor& up, bool tanh) {
  return gate_rows("gelu_mul", gate, up, tanh ? SCRIMP_KERNEL(gelu_mul_tanh) : SCRIMP_KERNEL(gelu_mul_erf));
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("gelu_mul", TORCH_BOX(&scrimp::gelu_mul)); }
