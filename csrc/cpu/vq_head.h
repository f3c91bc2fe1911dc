// What the drivers of a VQ head's ops share: the checks of its tensors, and the scores of its codes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/vq_head.h"
#include "cpu/ops.h"

namespace scrimp {

// Whether all codes are rows of a codebook of K rows.
inline bool all_inside(const int32_t* codes, int64_t count, int64_t K) {
  constexpr int64_t kBlock = 16384;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::atomic<bool> inside{true};
  for_each_item(blocks, worker_count(blocks, 16 * count), [&](int64_t block, int64_t) {
    uint32_t outside = 0;  // the sign bit tells of a code below 0 or above K - 1
    for (int64_t i = block * kBlock, end = std::min(i + kBlock, count); i < end; ++i) {
      const auto code = static_cast<uint32_t>(codes[i]);
      outside |= code | (static_cast<uint32_t>(K) - 1 - code);
    }
    if (outside >> 31) inside.store(false, std::memory_order_relaxed);
  });
  return inside.load();
}

// The codes and the bias of V tokens, of which each has G codes; contiguous, checked but for the values of the codes.
struct VqTokens {
  const char* op;
  int64_t G, V, K;
  Tensor codes_tensor;
  std::optional<Tensor> bias_tensor;
  const int32_t* codes;        // [G, V]
  const void* bias = nullptr;  // [V], or null

  VqTokens(const char* op_name, const Tensor& h, const Tensor& codebook, const Tensor& codes_any,
           const std::optional<Tensor>& bias_any)
      : op(op_name), codes_tensor(codes_any) {
    using torch::headeronly::ScalarType;
    const auto dtype = h.scalar_type();
    SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                 ": h must be float32 or bfloat16 on the CPU");
    SCRIMP_CHECK(h.is_cpu() && codebook.is_cpu() && codes_any.is_cpu() && (!bias_any || bias_any->is_cpu()), op,
                 ": h, codebook, codes and bias must be on the CPU");
    check_vq_head(op, h, codebook, codes_any, bias_any);
    const int64_t dims = codes_any.dim();
    G = dims == 2 ? codes_any.size(0) : 1;
    V = codes_any.size(dims - 1);
    codes_tensor = as_contiguous(codes_any);
    codes = static_cast<const int32_t*>(codes_tensor.data_ptr());
    K = codebook.size(0);
    if (!bias_any) return;
    bias_tensor = as_contiguous(*bias_any);
    bias = bias_tensor->data_ptr();
  }

  // Fails where a code is not a row of the codebook.
  void check_codes() const {
    if (!all_inside(codes, G * V, K)) fail_outside();
  }

  // Names the first such code.
  [[noreturn]] void fail_outside() const {
    int64_t i = 0;
    while (codes[i] >= 0 && codes[i] < K) ++i;
    fail(op, ": codes[", codes_tensor.dim() == 2 ? text_of(i / V) + ", " : "", i % V, "]=", codes[i],
         " is not one of the ", K, " rows of the codebook");
  }
};

// h codebook^T [.., K] by the op `linear`, with all that it promises.
inline Tensor code_scores(const Tensor& h, const Tensor& codebook) { return linear(h, {codebook}, {}, std::nullopt); }

}  // namespace scrimp
