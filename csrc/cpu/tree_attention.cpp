// tree_attention on the CPU: checks, work split, registration.
#include "cpu/tree_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "common/tree_attention.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix,
                      const std::optional<Tensor>& ancestors) {
  for (const Tensor* tensor : {&q, &k, &v, &prefix, ancestors ? &*ancestors : &q})
    SCRIMP_CHECK(tensor->is_cpu(), "tree_attention: all tensors must be on the CPU");
  const auto dtype = q.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "tree_attention: q must be float32 or bfloat16 on the CPU");
  SCRIMP_CHECK(q.size(3) <= 256, "tree_attention: head size D=", q.size(3), " is above 256");
}

static void check_prefix(const int32_t* prefix, int64_t B, int64_t T, int64_t capacity) {
  for (int64_t b = 0; b < B; ++b)
    SCRIMP_CHECK(prefix[b] >= 0 && prefix[b] <= capacity - T, "tree_attention: prefix[", b, "]=", prefix[b], " and ", T,
                 " new rows leave the cache's ", capacity, " slots");
}

static void check_words(const int64_t* word, int64_t count, int64_t T) {
  for (int64_t i = 0; i < count; ++i)
    SCRIMP_CHECK(T == 64 || word[i] >> T == 0, "tree_attention: ancestors has bits set beyond its T=", T, " new rows");
}

// Memory of this call alone, in whole cache lines; a tensor would take ten times as long to make.
struct Floats {
  explicit Floats(int64_t count)
      : data(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}))) {}
  ~Floats() { ::operator delete(data, std::align_val_t{64}); }
  Floats(const Floats&) = delete;

  float* data;
};

// The splits of one (batch, key/value head).
struct Group {
  int64_t batch, group, prefix;
  int64_t begin;       // first position of the first split
  int64_t cached;      // splits that hold keys of the prefix, and the one where it ends
  int64_t states;      // those, and the one behind if new rows reach it
  int64_t first_item;  // of all groups' cached splits
  float* memory;
};

static std::vector<Group> find_groups(const int32_t* prefix, int64_t B, int64_t G, int64_t T, int64_t window) {
  std::vector<Group> groups;
  int64_t item = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = window ? std::max<int64_t>(prefix[b] + 1 - window, 0) / kSplitKeys : 0;
      const int64_t last = prefix[b] / kSplitKeys, end = (prefix[b] + T - 1) / kSplitKeys;
      groups.push_back({b, g, prefix[b], first * kSplitKeys, last - first + 1, end - first + 1, item, nullptr});
      item += last - first + 1;
    }
  return groups;
}

std::tuple<Tensor, Tensor> tree_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                          const Tensor& prefix_any, const std::optional<Tensor>& ancestors_any,
                                          int64_t window, double scale) {
  check_tree_attention(q_any, k_any, v_any, prefix_any, ancestors_any, window, scale);
  check_cpu(q_any, k_any, v_any, prefix_any, ancestors_any);
  const int64_t B = q_any.size(0), H = q_any.size(1), T = q_any.size(2), D = q_any.size(3), G = k_any.size(1);
  const Tensor prefixes = as_contiguous(prefix_any);
  const auto* prefix = static_cast<const int32_t*>(prefixes.data_ptr());
  check_prefix(prefix, B, T, k_any.size(2));
  std::optional<Tensor> words;
  if (ancestors_any) {
    words = as_contiguous(*ancestors_any);
    check_words(static_cast<const int64_t*>(words->data_ptr()), words->numel(), T);
  }

  const Tensor q = unit_last_stride(q_any), k = unit_last_stride(k_any), v = unit_last_stride(v_any);
  const Tensor out = cpu_heads(q, B, H, T, D);
  const Tensor lse = cpu_empty(q, {B, H, T}, ScalarType::Float);
  if (B * H * T == 0) return {out, lse};

  const int64_t some = D > 0;  // without dimensions there is no memory to step through
  const TreeAttention call{.q = q.data_ptr(),
                           .k = k.data_ptr(),
                           .v = v.data_ptr(),
                           .out = out.data_ptr(),
                           .lse = static_cast<float*>(lse.data_ptr()),
                           .q_strides = {some * q.stride(0), some * q.stride(1), some * q.stride(2)},
                           .k_strides = {some * k.stride(0), some * k.stride(1), some * k.stride(2)},
                           .v_strides = {some * v.stride(0), some * v.stride(1), some * v.stride(2)},
                           .out_strides = {some * out.stride(0), some * out.stride(1), some * out.stride(2)},
                           .ancestors = words ? static_cast<const int64_t*>(words->data_ptr()) : nullptr,
                           .ancestors_stride = words && words->size(0) > 1 ? T : 0,
                           .window = window,
                           .n_heads = H,
                           .n_groups = G,
                           .n_rows = T,
                           .head_dim = D,
                           .scale = static_cast<float>(scale),
                           .bf16 = q.scalar_type() == ScalarType::BFloat16};
  std::vector<Group> groups = find_groups(prefix, B, G, T, window);
  int64_t items = 0, states = 0, operations = 0;
  for (const Group& group : groups) {
    items += group.cached;
    states += group.states;
    operations += (group.prefix - group.begin + T) * (H / G * T + 4) * D;  // as if packing a key were four rows
  }
  const int64_t workers = worker_count(items, operations);
  const int64_t scratch = (SCRIMP_KERNEL(tree_attention_scratch)(call) + 15) / 16 * 16;  // whole cache lines
  const int64_t state = SCRIMP_KERNEL(tree_attention_state)(call);
  const Floats memory(workers * scratch + states * state);
  float* next = memory.data + workers * scratch;
  for (Group& group : groups) {
    group.memory = next;
    next += group.states * state;
  }

  std::vector<std::atomic<int64_t>> done(groups.size());
  const auto add_split = SCRIMP_KERNEL(tree_attention_split);
  const auto write = SCRIMP_KERNEL(tree_attention_write);
  for_each_item(items, workers, [&](int64_t item, int64_t worker) {
    const auto behind = [](int64_t i, const Group& group) { return i < group.first_item; };
    const Group& group = *(std::upper_bound(groups.begin(), groups.end(), item, behind) - 1);
    const int64_t split = item - group.first_item;
    add_split(call,
              {.batch = group.batch,
               .group = group.group,
               .prefix = group.prefix,
               .begin = group.begin + split * kSplitKeys,
               .last = split + 1 == group.cached,
               .states = group.memory + split * state},
              memory.data + worker * scratch);
    if (done[&group - groups.data()].fetch_add(1, std::memory_order_acq_rel) + 1 == group.cached)
      write(call, group.batch, group.group, group.memory, group.states);
  });
  return {out, lse};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("tree_attention", TORCH_BOX(&scrimp::tree_attention)); }
