// gelu_mul, the loops: out = gelu(gate) * up, with tanh or with erf.
#include "cpu/gelu_mul.h"

#include "common/gate_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// (1 + tanh u) / 2 is the logistic function of 2 u.
SCRIMP_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(x * x, broadcast(0.044715f), broadcast(1.0f));
  return times_logistic(x, x * 1.5957691216f * cubic);
}

// erfc(z) for z >= 0, relative error 1.2e-7: Numerical Recipes, section 6.2.2.
SCRIMP_INLINE Vec erfc(Vec z) {
  const float coefficients[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const Vec t = 1.0f / fma(z, broadcast(0.5f), broadcast(1.0f));
  Vec p = broadcast(coefficients[0]);
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = fma(p, t, broadcast(coefficients[i]));
  return t * exp2(fma(-z, z, p) * kLog2E);
}

SCRIMP_INLINE Vec gelu_erf(Vec x) {
  const Vec z = x * 0.70710678f;
  const Vec far = erfc(z < 0.0f ? -z : z) * 0.5f;  // the weight of the tail behind |x|
  return x * (x < 0.0f ? far : 1.0f - far);
}

}  // namespace

void gelu_mul_tanh(const GateRow& row) {
  gate_row(row, [](Vec x) { return gelu_tanh(x); });
}

void gelu_mul_erf(const GateRow& row) {
  gate_row(row, [](Vec x) { return gelu_erf(x); });
}

}  // namespace scrimp::SCRIMP_ISA
