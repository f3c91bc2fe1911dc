// Scales and zeros of int4_linear with outputs in the lanes.
#pragma once

#include "cpu/int4_linear.codes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// Exact mode's products are of q - 8: (q - z) s = (q - 8) s + (8 - z) s and q s + z = (q - 8) s + (z + 8 s).
SCRIMP_INLINE Vec centered(Int4Zeros kind, Vec scale, Vec zero) {
  return kind == Int4Zeros::shift ? (8.0f - zero) * scale : fma(broadcast(8.0f), scale, zero);
}

// The scales and zeros of a panel for some groups, with outputs in the lanes.
struct Groups {
  const Int4Panel& p;
  const int64_t count;
  float* const scales;
  float* const zeros;
  int64_t first = -kInt4Groups;

  Groups(const Int4Panel& panel, float* to)
      : p(panel),
        count((panel.x->columns + panel.group - 1) / panel.group),
        scales(to),
        zeros(to + kPanel * kInt4Groups) {}

  template <class T>
  void transposed(const T* from, const void* end, float* to) const {
    for (int n = 0; n < kPanel && n < p.outputs; n += kLanes) {
      for (int64_t group = 0; group < kInt4Groups && first + group < count; group += kLanes) {
        Vec values[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const T* at = from + (n + i < p.outputs ? n + i : p.outputs - 1) * count + first + group;
          values[i] = load_first(at, static_cast<const T*>(end) - at);
        }
        transpose(values);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (group + i) * kPanel + n, values[i]);
      }
    }
  }

  // Where the scales of a group lie, after its neighbours were brought in where needed.
  int64_t find(int64_t group) {
    if (group >= first + kInt4Groups) {
      first = group;
      with_type(p.scale_type, p.scales, [&](auto* from) { transposed(from, p.scales_end, scales); });
      if (p.zeros && p.byte_zeros) transposed(static_cast<const uint8_t*>(p.zeros), p.zeros_end, zeros);
      if (p.zeros && !p.byte_zeros) {
        with_type(p.scale_type, p.zeros, [&](auto* from) { transposed(from, p.zeros_end, zeros); });
      }
      if (p.zeros && p.x->limbs != 1) center();
    }
    return (group - first) * kPanel;
  }

  void center() {
    for (int64_t i = 0; i < kInt4Groups * kPanel; i += kLanes) {
      store(zeros + i, centered(p.kind, load(scales + i), load(zeros + i)));
    }
  }
};

}  // namespace
}  // namespace scrimp::SCRIMP_ISA
