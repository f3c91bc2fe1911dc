// merge_attention, the loops: out = (w_a out_a + w_b out_b) with w = exp(lse_side - lse).
#include "cpu/merge_attention.h"

#include <math.h>

#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

template <class T>
void merge_rows(const MergeRows& r) {
  for (int64_t n = 0; n < r.rows; ++n) {
    const float a = r.lse_a[n * r.lse_a_stride], b = r.lse_b[n * r.lse_b_stride];
    const float high = a > b ? a : b;
    const bool empty = high == -INFINITY;
    const float raw_a = empty ? 0.0f : expf(a - high), raw_b = empty ? 0.0f : expf(b - high);
    const float sum = raw_a + raw_b;
    r.lse[n] = empty ? -INFINITY : high + logf(sum);
    const float weight_a = empty ? 0.0f : raw_a / sum, weight_b = empty ? 0.0f : raw_b / sum;
    const T* x = static_cast<const T*>(r.out_a) + n * r.out_a_stride;
    const T* y = static_cast<const T*>(r.out_b) + n * r.out_b_stride;
    T* out = static_cast<T*>(r.out) + n * r.out_stride;
    for (int64_t d = 0; d < r.head_dim; d += kLanes) {
      const int64_t left = r.head_dim - d;
      store_first(out + d, weight_a * load_first(x + d, left) + weight_b * load_first(y + d, left), left);
    }
  }
}

}  // namespace

void merge_attention(const MergeRows& rows) { rows.bf16 ? merge_rows<BFloat16>(rows) : merge_rows<float>(rows); }

}  // namespace scrimp::SCRIMP_ISA
