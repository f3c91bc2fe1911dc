// silu_mul on the CPU: registration.
#include "cpu/silu_mul.h"

#include <torch/csrc/stable/library.h>

#include "common/gate_rows.h"
#include "cpu/ops.h"

namespace scrimp {

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  return gate_rows("silu_mul", gate, up, SCRIMP_KERNEL(silu_mul));
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("silu_mul", TORCH_BOX(&scrimp::silu_mul)); }
