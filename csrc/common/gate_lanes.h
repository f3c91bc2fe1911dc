// The loop of a gated activation, and the exponential it needs.
#pragma once

#include "common/gate.h"
#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// x / (1 + exp(-t)): x times the logistic function of t; relative error 1e-6 where exp(-t) is finite.
SCRIMP_INLINE Vec times_logistic(Vec x, Vec t) {
  const Vec near = t > 88.0f ? broadcast(88.0f) : t < -88.0f ? broadcast(-88.0f) : t;
  const Vec high = near * -kLog2E;
  const Vec low = fma(near, broadcast(-1.92596303e-8f), fma(near, broadcast(-kLog2E), -high));  // what high rounded off
  const Vec power = exp2(high);
  return x / (1.0f + (t < -88.0f ? broadcast(__builtin_inff()) : fma(power, low * 0.693147181f, power)));
}

// out = round(activation(gate)) * up
template <class T, class Activation>
SCRIMP_INLINE void gate_loop(const GateRow& row, Activation activation) {
  const T* gate = static_cast<const T*>(row.gate);
  const T* up = static_cast<const T*>(row.up);
  T* out = static_cast<T*>(row.out);
  const int64_t whole = row.columns / kLanes * kLanes, left = row.columns - whole;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, round_to<T>(activation(load(gate + i))) * load(up + i));
  if (left) {
    const Vec last = round_to<T>(activation(load_first(gate + whole, left))) * load_first(up + whole, left);
    store_first(out + whole, last, left);
  }
}

template <class Activation>
SCRIMP_INLINE void gate_row(const GateRow& row, Activation activation) {
  row.bf16 ? gate_loop<BFloat16>(row, activation) : gate_loop<float>(row, activation);
}

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
