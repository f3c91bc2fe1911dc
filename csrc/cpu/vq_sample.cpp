// vq_sample on the CPU: checks, the scores of the codes, one row after the other.
#include "cpu/vq_sample.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/gumbel.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "common/vq_sample.h"
#include "cpu/vq_head.h"

namespace scrimp {

using torch::headeronly::ScalarType;

constexpr int64_t kTokens = 4096;  // of a block: their codes stay in the first-level cache for all rows

// The numbers of a tensor with one for each row of h.
template <class Number>
static const Number* one_each(const char* name, Tensor& numbers) {
  SCRIMP_CHECK(numbers.is_cpu(), "vq_sample: ", name, " is not on the CPU");
  numbers = as_contiguous(numbers);
  return static_cast<const Number*>(numbers.data_ptr());
}

// Rows of the op, and the kernels' view of each.
struct VqRows {
  const VqTokens& tokens;
  const Tensor& scores;
  int64_t count;
  const float* temperature;
  const int64_t *seed, *position;
  int64_t top_k;
  double top_p, min_p;
  std::vector<int32_t> counts;  // tokens of each code, where filters want them

  VqRow row(int64_t i) const {
    return {.codebook = tokens.K,
            .levels = tokens.G,
            .tokens = tokens.V,
            .scores = static_cast<const char*>(scores.data_ptr()) + i * tokens.K * scores.element_size(),
            .codes = tokens.codes,
            .bias = tokens.bias,
            .counts = counts.empty() ? nullptr : counts.data(),
            .temperature = temperature[i],
            .top_k = top_k,
            .top_p = top_p,
            .log_min_p = static_cast<float>(std::log(min_p)),
            .key = noise_key(seed[i], static_cast<uint64_t>(position[i])),
            .bf16 = scores.scalar_type() == ScalarType::BFloat16};
  }

  // Row by row.
  void choose(const std::vector<int64_t>& rows, int64_t* token) const {
    tokens.check_codes();
    const int64_t many = static_cast<int64_t>(rows.size());
    for_each_item(many, worker_count(many, 10 * many * tokens.V * tokens.G),
                  [&](int64_t item, int64_t) { token[rows[item]] = SCRIMP_KERNEL(vq_sample)(row(rows[item])); });
  }

  // All rows, blocks of tokens one after the other. Returns the rows whose token the scores of the codes do not tell.
  std::vector<int64_t> choose_by_code(int64_t* token) {
    if (tokens.K == 0) tokens.fail_outside();
    if (top_k > 0 || top_p < 1 || min_p > 0) {
      tokens.check_codes();
      counts.resize(tokens.K);
      for (int64_t v = 0; v < tokens.V; ++v) ++counts[tokens.codes[v]];
    }
    std::vector<float> weights(count * tokens.K);
    std::vector<VqChoice> choices(count);
    std::vector<char> known(count);
    for_each_item(count, worker_count(count, 8 * count * tokens.K), [&](int64_t i, int64_t) {
      choices[i].weights = weights.data() + i * tokens.K;
      known[i] = SCRIMP_KERNEL(vq_sample_start)(row(i), choices[i]);
    });

    const int64_t blocks = (tokens.V + kTokens - 1) / kTokens;
    const int64_t workers = worker_count(blocks, 16 * count * tokens.V);
    std::vector<VqBest> best(workers * count);
    for (int64_t i = 0; i < workers * count; ++i) best[i] = {choices[i % count].bar, tokens.V};
    std::atomic<bool> outside{false};
    for_each_item(blocks, workers, [&](int64_t block, int64_t worker) {
      const int64_t first = block * kTokens, last = std::min(first + kTokens, tokens.V);
      for (int64_t i = 0; i < count; ++i)
        if (known[i] && !SCRIMP_KERNEL(vq_sample_add)(row(i), choices[i], first, last, best[worker * count + i]))
          return outside.store(true, std::memory_order_relaxed);
    });
    if (outside) tokens.fail_outside();

    std::vector<int64_t> left;
    for (int64_t i = 0; i < count; ++i) {
      VqBest found = best[i];
      for (int64_t worker = 1; worker < workers; ++worker) {
        const VqBest& other = best[worker * count + i];
        if (other.value > found.value || (other.value == found.value && other.token < found.token)) found = other;
      }
      token[i] = found.token;
      if (!known[i] || found.token == tokens.V) left.push_back(i);
    }
    return left;
  }
};

static Tensor vq_sample(const Tensor& h, const Tensor& codebook, const Tensor& codes, const std::optional<Tensor>& bias,
                        Tensor temperatures, Tensor seeds, Tensor positions, int64_t top_k, double top_p,
                        double min_p) {
  const VqTokens tokens("vq_sample", h, codebook, codes, bias);
  check_vq_sample(h, codes, temperatures, seeds, positions, top_k, top_p, min_p);
  const auto* temperature = one_each<float>("temperature", temperatures);
  const auto* seed = one_each<int64_t>("seed", seeds);
  const auto* position = one_each<int64_t>("position", positions);
  const int64_t rows = seeds.numel();
  for (int64_t i = 0; i < rows; ++i)
    SCRIMP_CHECK(temperature[i] >= 0 && std::isfinite(temperature[i]), "vq_sample: temperature of row ", i, " is ",
                 temperature[i], "; it must be finite and not negative");
  const Tensor chosen = cpu_empty(seeds, seeds.sizes());
  if (rows == 0) return chosen;

  const Tensor scores = code_scores(h, codebook);
  VqRows all{tokens, scores, rows, temperature, seed, position, top_k, top_p, min_p, {}};
  auto* token = static_cast<int64_t*>(chosen.data_ptr());
  std::vector<int64_t> left;
  if (tokens.G == 1 && !tokens.bias) {
    left = all.choose_by_code(token);
  } else {
    left.resize(rows);
    std::iota(left.begin(), left.end(), 0);
  }
  if (!left.empty()) all.choose(left, token);
  return chosen;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("vq_sample", TORCH_BOX(&scrimp::vq_sample)); }
