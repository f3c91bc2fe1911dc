// tree_accept on the CPU: checks, the walk, registration.
#include "cpu/tree_accept.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "common/check.h"
#include "common/gumbel.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "common/tree_accept.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_values(const int32_t* parent, const float* temperature, int64_t B, int64_t T) {
  for (int64_t i = 0; i < B * T; ++i)
    SCRIMP_CHECK(parent[i] >= -1 && parent[i] < i % T, "tree_accept: parents[", i / T, ", ", i % T, "]=", parent[i],
                 " is not an earlier row, and not -1");
  for (int64_t b = 0; b < B; ++b)
    SCRIMP_CHECK(temperature[b] >= 0 && std::isfinite(temperature[b]), "tree_accept: temperature[", b,
                 "]=", temperature[b], " must be finite and not negative");
}

static std::tuple<Tensor, Tensor> tree_accept(const Tensor& logits_any, const Tensor& tokens_any,
                                              const Tensor& parents_any, const Tensor& temperature_any,
                                              const Tensor& seed_any, const Tensor& position_any) {
  const auto dtype = logits_any.scalar_type();
  SCRIMP_CHECK(logits_any.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
               "tree_accept: logits must be float32 or bfloat16 on the CPU");
  for (const Tensor* tensor : {&tokens_any, &parents_any, &temperature_any, &seed_any, &position_any})
    SCRIMP_CHECK(tensor->is_cpu(), "tree_accept: all tensors must be on the CPU");
  check_tree(logits_any, tokens_any, parents_any, temperature_any, seed_any, position_any);
  const int64_t B = logits_any.size(0), T = logits_any.size(1), V = logits_any.size(2);

  const Tensor logits = unit_last_stride(logits_any);
  const Tensor tokens = as_contiguous(tokens_any), parents = as_contiguous(parents_any);
  const Tensor temperatures = as_contiguous(temperature_any);
  const Tensor seeds = as_contiguous(seed_any), positions = as_contiguous(position_any);
  const auto* token = static_cast<const int64_t*>(tokens.data_ptr());
  const auto* parent = static_cast<const int32_t*>(parents.data_ptr());
  const auto* temperature = static_cast<const float*>(temperatures.data_ptr());
  const auto* seed = static_cast<const int64_t*>(seeds.data_ptr());
  const auto* position = static_cast<const int64_t*>(positions.data_ptr());
  check_values(parent, temperature, B, T);

  const Tensor paths = cpu_empty(parents, {B, T}), choices = cpu_empty(tokens, {B, T});
  auto* path = static_cast<int32_t*>(paths.data_ptr());
  auto* chosen = static_cast<int64_t*>(choices.data_ptr());
  const int64_t size = dtype == ScalarType::BFloat16 ? 2 : 4;
  const auto* data = static_cast<const char*>(logits.data_ptr());
  const auto choose = SCRIMP_KERNEL(choose_token);
  for_each_item(B, [&](int64_t b, int64_t) {
    int64_t depth = 0, node = T ? 0 : -1;
    while (node >= 0) {
      const uint64_t at = static_cast<uint64_t>(position[b]) + static_cast<uint64_t>(depth);
      const int64_t found = choose({.logits = data + size * (b * logits.stride(0) + node * logits.stride(1)),
                                    .count = V,
                                    .temperature = temperature[b],
                                    .key = noise_key(seed[b], at),
                                    .bf16 = dtype == ScalarType::BFloat16});
      path[b * T + depth] = static_cast<int32_t>(node);
      chosen[b * T + depth] = found;
      ++depth;
      int64_t child = node + 1;
      while (child < T && !(parent[b * T + child] == node && token[b * T + child] == found)) ++child;
      node = child < T ? child : -1;
    }
    for (; depth < T; ++depth) path[b * T + depth] = -1, chosen[b * T + depth] = -1;
  });
  return {paths, choices};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("tree_accept", TORCH_BOX(&scrimp::tree_accept)); }
