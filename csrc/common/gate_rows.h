// The driver of a gated activation: checks and the loop over rows.
#pragma once

#include "common/gate.h"
#include "common/rows.h"
#include "common/tensors.h"

namespace scrimp {

// act(gate) * up by `kernel`, one row at a time.
template <class Kernel>
Tensor gate_rows(const char* op, const Tensor& gate, const Tensor& up, const Kernel& kernel) {
  using torch::headeronly::ScalarType;
  const auto dtype = gate.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
               ": gate must be float32 or bfloat16 on the CPU");
  SCRIMP_CHECK(up.scalar_type() == dtype, op, ": gate and up differ in dtype");
  SCRIMP_CHECK(gate.is_cpu() && up.is_cpu(), op, ": gate and up must be on the CPU");
  const auto shape = gate.sizes(), other = up.sizes();
  SCRIMP_CHECK(gate.dim() > 0 && std::equal(shape.begin(), shape.end(), other.begin(), other.end()), op, ": gate ",
               shape_text(gate), " and up ", shape_text(up), " must be [..., N] of one shape");
  const Tensor out = cpu_empty(gate, shape);
  if (out.numel() == 0) return out;

  const Rows gates(gate), ups(up), outs(out);
  const int64_t columns = gate.size(gate.dim() - 1);
  for_each_row(out.numel() / columns, columns, [&](int64_t i) {
    kernel({.gate = gates.row(i),
            .up = ups.row(i),
            .out = outs.row(i),
            .columns = columns,
            .bf16 = dtype == ScalarType::BFloat16});
  });
  return out;
}

}  // namespace scrimp
