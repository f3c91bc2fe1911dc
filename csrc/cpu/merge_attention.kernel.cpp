// merge_attention, the loops: out = w_a out_a + w_b out_b with w = exp(lse_side - lse), kLanes rows at a time.
#include "cpu/merge_attention.h"

#include <math.h>

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

// Weights of both sides and the merged lse of `rows` <= kLanes rows from row n on.
void merge_weights(const MergeRows& r, int64_t n, int64_t rows, float* weight_a, float* weight_b) {
  float a[kLanes] = {}, b[kLanes] = {}, total[kLanes], highest[kLanes];
  for (int64_t i = 0; i < rows; ++i) {
    a[i] = r.lse_a[(n + i) * r.lse_a_stride];
    b[i] = r.lse_b[(n + i) * r.lse_b_stride];
  }
  const Vec high = max(load(a), load(b));
  const Vec base = high == -INFINITY ? Vec{} : high;  // a row without keys: 2^(-inf - 0) = 0 on both sides
  const Vec raw_a = exp2((load(a) - base) * kLog2E), raw_b = exp2((load(b) - base) * kLog2E);
  const Vec sum = raw_a + raw_b;
  const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
  store(weight_a, raw_a * inverse);
  store(weight_b, raw_b * inverse);
  store(total, sum);
  store(highest, high);
  for (int64_t i = 0; i < rows; ++i) r.lse[n + i] = highest[i] + logf(total[i]);
}

template <class T>
void merge_rows(const MergeRows& r) {
  float weight_a[kLanes], weight_b[kLanes];
  const int64_t whole = r.head_dim / kLanes * kLanes, left = r.head_dim - whole;
  for (int64_t n = 0; n < r.rows; ++n) {
    const int64_t lane = n % kLanes;
    if (lane == 0) merge_weights(r, n, r.rows - n < kLanes ? r.rows - n : kLanes, weight_a, weight_b);
    const Vec a = broadcast(weight_a[lane]), b = broadcast(weight_b[lane]);
    const T* x = static_cast<const T*>(r.out_a) + n * r.out_a_stride;
    const T* y = static_cast<const T*>(r.out_b) + n * r.out_b_stride;
    T* out = static_cast<T*>(r.out) + n * r.out_stride;
    for (int64_t d = 0; d < whole; d += kLanes) store(out + d, a * load(x + d) + b * load(y + d));
    if (left) {
      store_first(out + whole, a * load_first(x + whole, left) + b * load_first(y + whole, left), left);
    }
  }
}

}  // namespace

void merge_attention(const MergeRows& rows) { rows.bf16 ? merge_rows<BFloat16>(rows) : merge_rows<float>(rows); }

}  // namespace scrimp::SCRIMP_ISA
