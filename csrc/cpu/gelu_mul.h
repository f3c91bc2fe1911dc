// gelu_mul on the CPU: what the driver hands to the kernels.
#pragma once

#include "common/dispatch.h"
#include "common/gate.h"

SCRIMP_DECLARE_KERNEL(void gelu_mul_tanh(const GateRow& row))
SCRIMP_DECLARE_KERNEL(void gelu_mul_erf(const GateRow& row))
