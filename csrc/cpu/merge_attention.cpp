// merge_attention on the CPU: checks, work split, registration.
#include "cpu/merge_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "common/merge_attention.h"
#include "common/parallel.h"
#include "common/tensors.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static std::tuple<Tensor, Tensor> merge_attention(const Tensor& out_a_in, const Tensor& lse_a, const Tensor& out_b_in,
                                                  const Tensor& lse_b) {
  const auto dtype = out_a_in.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "merge_attention: out_a must be float32 or bfloat16 on the CPU");
  check_merge_side("a", out_a_in, lse_a, out_a_in);
  check_merge_side("b", out_b_in, lse_b, out_a_in);
  for (const Tensor* tensor : {&out_a_in, &lse_a, &out_b_in, &lse_b})
    SCRIMP_CHECK(tensor->is_cpu(), "merge_attention: out_a, lse_a, out_b and lse_b must be on the CPU");
  const Tensor out_a = unit_last_stride(out_a_in), out_b = unit_last_stride(out_b_in);
  const int64_t B = out_a.size(0), H = out_a.size(1), N = out_a.size(2), D = out_a.size(3);
  const Tensor out = cpu_heads(out_a, B, H, N, D);
  const Tensor lse = cpu_empty(lse_a, {B, H, N});

  const bool bf16 = dtype == ScalarType::BFloat16;
  const int64_t block = 256;  // rows of one work item
  const int64_t blocks = (N + block - 1) / block;
  const auto at = [&](const Tensor& tensor, int64_t b, int64_t h, int64_t n, int64_t size) {
    return static_cast<char*>(tensor.data_ptr()) +
           size * (b * tensor.stride(0) + h * tensor.stride(1) + n * tensor.stride(2));
  };
  const auto kernel = SCRIMP_KERNEL(merge_attention);
  for_each_item(B * H * blocks, [&](int64_t item, int64_t) {
    const int64_t n = item % blocks * block, h = item / blocks % H, b = item / blocks / H;
    const int64_t size = bf16 ? 2 : 4;
    kernel({.rows = std::min(block, N - n),
            .head_dim = D,
            .out_a = at(out_a, b, h, n, size),
            .out_b = at(out_b, b, h, n, size),
            .lse_a = reinterpret_cast<const float*>(at(lse_a, b, h, n, 4)),
            .lse_b = reinterpret_cast<const float*>(at(lse_b, b, h, n, 4)),
            .out = at(out, b, h, n, size),
            .lse = reinterpret_cast<float*>(at(lse, b, h, n, 4)),
            .out_a_stride = out_a.stride(2),
            .out_b_stride = out_b.stride(2),
            .out_stride = out.stride(2),
            .lse_a_stride = lse_a.stride(2),
            .lse_b_stride = lse_b.stride(2),
            .bf16 = bf16});
  });
  return {out, lse};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("merge_attention", TORCH_BOX(&scrimp::merge_attention)); }
