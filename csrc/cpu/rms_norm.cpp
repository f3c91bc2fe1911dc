// rms_norm on the CPU: checks, work split, registration.
#include "cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/check.h"
#include "common/rows.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;

Tensor rms_norm(const Tensor& x, const Tensor& weight_any, double eps) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "rms_norm: x must be float32 or bfloat16 on the CPU");
  SCRIMP_CHECK(weight_any.scalar_type() == dtype, "rms_norm: x and weight differ in dtype");
  SCRIMP_CHECK(x.is_cpu() && weight_any.is_cpu(), "rms_norm: x and weight must be on the CPU");
  SCRIMP_CHECK(x.dim() > 0 && weight_any.dim() == 1 && weight_any.size(0) == x.size(x.dim() - 1), "rms_norm: weight ",
               shape_text(weight_any), " does not fit x ", shape_text(x));
  SCRIMP_CHECK(std::isfinite(eps) && eps >= 0, "rms_norm: eps=", eps, " must be finite and not negative");
  const Tensor weight = unit_last_stride(weight_any);
  const Tensor out = cpu_empty(x, x.sizes());
  const int64_t columns = weight.size(0);
  if (out.numel() == 0) return out;

  const Rows from(x), to(out);
  const auto kernel = SCRIMP_KERNEL(rms_norm);
  for_each_row(out.numel() / columns, columns, [&](int64_t i) {
    kernel({.x = from.row(i),
            .weight = weight.data_ptr(),
            .out = to.row(i),
            .columns = columns,
            .eps = static_cast<float>(eps),
            .bf16 = dtype == ScalarType::BFloat16});
  });
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("rms_norm", TORCH_BOX(&scrimp::rms_norm)); }
