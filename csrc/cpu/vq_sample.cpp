// vq_sample on the CPU: checks, the scores of the codes, one row after the other.
#include "cpu/vq_sample.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/gumbel.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "common/vq_sample.h"
#include "cpu/vq_head.h"

namespace scrimp {

using torch::headeronly::ScalarType;

// The numbers of a tensor with one for each row of h.
template <class Number>
static const Number* one_each(const char* name, Tensor& numbers) {
  SCRIMP_CHECK(numbers.is_cpu(), "vq_sample: ", name, " is not on the CPU");
  numbers = as_contiguous(numbers);
  return static_cast<const Number*>(numbers.data_ptr());
}

static Tensor vq_sample(const Tensor& h, const Tensor& codebook, const Tensor& codes, const std::optional<Tensor>& bias,
                        Tensor temperatures, Tensor seeds, Tensor positions, int64_t top_k, double top_p,
                        double min_p) {
  const VqTokens tokens("vq_sample", h, codebook, codes, bias);
  check_vq_sample(h, codes, temperatures, seeds, positions, top_k, top_p, min_p);
  const auto* temperature = one_each<float>("temperature", temperatures);
  const auto* seed = one_each<int64_t>("seed", seeds);
  const auto* position = one_each<int64_t>("position", positions);
  const int64_t rows = seeds.numel(), K = codebook.size(0);
  for (int64_t i = 0; i < rows; ++i)
    SCRIMP_CHECK(temperature[i] >= 0 && std::isfinite(temperature[i]), "vq_sample: temperature of row ", i, " is ",
                 temperature[i], "; it must be finite and not negative");
  const Tensor chosen = cpu_empty(seeds, seeds.sizes());
  if (rows == 0) return chosen;

  const Tensor scores = code_scores(h, codebook);
  const bool filters = top_k > 0 || top_p < 1;
  std::vector<int32_t> counts(filters && tokens.G == 1 && !bias ? K : 0);
  for (int64_t v = 0; !counts.empty() && v < tokens.V; ++v) ++counts[tokens.codes[v]];
  auto* token = static_cast<int64_t*>(chosen.data_ptr());
  const auto* score = static_cast<const char*>(scores.data_ptr());
  const auto kernel = SCRIMP_KERNEL(vq_sample);
  for_each_item(rows, worker_count(rows, 10 * rows * tokens.V * tokens.G), [&](int64_t i, int64_t) {
    token[i] = kernel({.codebook = K,
                       .levels = tokens.G,
                       .tokens = tokens.V,
                       .scores = score + i * K * scores.element_size(),
                       .codes = tokens.codes,
                       .bias = tokens.bias,
                       .counts = counts.empty() ? nullptr : counts.data(),
                       .temperature = temperature[i],
                       .top_k = top_k,
                       .top_p = top_p,
                       .log_min_p = static_cast<float>(std::log(min_p)),
                       .key = noise_key(seed[i], static_cast<uint64_t>(position[i])),
                       .bf16 = h.scalar_type() == ScalarType::BFloat16});
  });
  return chosen;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("vq_sample", TORCH_BOX(&scrimp::vq_sample)); }
