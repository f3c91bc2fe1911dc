// silu_mul, the loops: out = gate / (1 + exp(-gate)) * up.
#include "cpu/silu_mul.h"

#include "common/gate_lanes.h"

namespace scrimp::SCRIMP_ISA {

void silu_mul(const GateRow& row) {
  gate_row(row, [](Vec x) { return times_logistic(x, x); });
}

}  // namespace scrimp::SCRIMP_ISA
