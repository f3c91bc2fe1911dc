// vq_logits on the CPU: the scores of the codes, then blocks of tokens that take them.
#include "cpu/vq_logits.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/vq_head.h"

namespace scrimp {

constexpr int64_t kTokens = 4096;  // of a block: their codes stay in the first-level cache for all rows

static Tensor vq_logits(const Tensor& h, const Tensor& codebook, const Tensor& codes,
                        const std::optional<Tensor>& bias) {
  const VqTokens tokens("vq_logits", h, codebook, codes, bias);
  tokens.check_codes();
  std::vector<int64_t> shape(h.sizes().begin(), h.sizes().end());
  shape.back() = tokens.V;
  const Tensor logits = cpu_empty(h, shape);
  if (logits.numel() == 0) return logits;

  const Tensor scores = code_scores(h, codebook);
  const int64_t blocks = (tokens.V + kTokens - 1) / kTokens, rows = logits.numel() / tokens.V;
  const auto kernel = SCRIMP_KERNEL(vq_logits);
  for_each_item(blocks, worker_count(blocks, rows * tokens.V * tokens.G), [&](int64_t item, int64_t) {
    kernel({.rows = rows,
            .first = item * kTokens,
            .last = std::min(tokens.V, (item + 1) * kTokens),
            .codebook = codebook.size(0),
            .levels = tokens.G,
            .tokens = tokens.V,
            .scores = scores.data_ptr(),
            .codes = tokens.codes,
            .bias = tokens.bias,
            .logits = logits.data_ptr(),
            .bf16 = h.scalar_type() == torch::headeronly::ScalarType::BFloat16});
  });
  return logits;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("vq_logits", TORCH_BOX(&scrimp::vq_logits)); }
