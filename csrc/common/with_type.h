// Untyped memory of a FloatType as typed pointers, and single numbers of it.
#pragma once

#include "common/float_type.h"
#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// Calls body(p as a pointer to its type).
template <class Body>
SCRIMP_INLINE auto with_type(FloatType type, const void* p, Body body) {
  if (type == FloatType::fp32) return body(static_cast<const float*>(p));
  if (type == FloatType::bf16) return body(static_cast<const BFloat16*>(p));
  return body(static_cast<const Float16*>(p));
}

// One number.
SCRIMP_INLINE float one(const float* p) { return *p; }
SCRIMP_INLINE float one(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
SCRIMP_INLINE float one(const Float16* p) { return load_first(p, 1)[0]; }

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
