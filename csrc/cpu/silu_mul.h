// silu_mul on the CPU: what the driver hands to the kernels.
#pragma once

#include "common/dispatch.h"
#include "common/gate.h"

SCRIMP_DECLARE_KERNEL(void silu_mul(const GateRow& row))
