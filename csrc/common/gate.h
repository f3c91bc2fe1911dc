// What the drivers of the gated activations share: one row, the checks and the loop over rows.
#pragma once

#include <cstdint>

namespace scrimp {

// One row; gate, up and out are fp32, or bf16 when `bf16` is set.
struct GateRow {
  const void *gate, *up;
  void* out;
  int64_t columns;
  bool bf16;
};

}  // namespace scrimp
