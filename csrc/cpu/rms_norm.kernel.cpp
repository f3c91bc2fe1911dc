// rms_norm, the loops: out = weight * round(x / sqrt(mean(x^2) + eps)), one row at a time.
#include "cpu/rms_norm.h"

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kChains = 4;  // sums that hide the latency of an addition; lane and chain of an element are fixed

template <class T>
float sum_of_squares(const T* x, int64_t columns) {
  Vec sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= columns; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Vec part = load(x + i + c * kLanes);
      sum[c] = fma(part, part, sum[c]);
    }
  }
  for (int c = 0; i < columns; i += kLanes, ++c) {
    const Vec part = load_first(x + i, columns - i);
    sum[c] = fma(part, part, sum[c]);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void normalize(const RmsNormRow& row) {
  const T* x = static_cast<const T*>(row.x);
  const T* weight = static_cast<const T*>(row.weight);
  T* out = static_cast<T*>(row.out);
  const float mean = sum_of_squares(x, row.columns) / static_cast<float>(row.columns);
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(mean + row.eps));
  const int64_t whole = row.columns / kLanes * kLanes, left = row.columns - whole;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(weight + i) * round_to<T>(load(x + i) * scale));
  if (left) {
    store_first(out + whole, load_first(weight + whole, left) * round_to<T>(load_first(x + whole, left) * scale), left);
  }
}

}  // namespace

void rms_norm(const RmsNormRow& row) { row.bf16 ? normalize<BFloat16>(row) : normalize<float>(row); }

}  // namespace scrimp::SCRIMP_ISA
