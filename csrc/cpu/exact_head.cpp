// exact_head on the CPU: checks, the screen's phases, registration.
#include "cpu/exact_head.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/exact_head.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "cpu/exact_head.parts.h"

namespace scrimp {

using torch::headeronly::ScalarType;

constexpr int64_t kGuesses = 2;     // exact logits for each one wanted, to find a threshold
constexpr int64_t kSegment = 1024;  // tiles that a thread searches at once

static void check(const Tensor& x, const Head& head) {
  const auto dtype = x.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "exact_head: x must be float32 or bfloat16 on the CPU");
  check_exact_head(x, head.weight, head.codes, head.scales, head.basis, head.error, head.norm, head.slack, head.wide,
                   head.k);
  for (const Tensor* tensor : {&x, &head.weight, &head.codes, &head.scales, &head.error, &head.norm})
    SCRIMP_CHECK(tensor->is_cpu(), "exact_head: all tensors must be on the CPU");
}

// Of a row of the head; or a tile's best upper end, with the number of the tile.
struct Logit {
  float value;
  int32_t id;
};

// Whether a comes before b: a NaN first, then the larger value, of equal ones the lower id.
static bool before(Logit a, Logit b) {
  const bool nan_a = std::isnan(a.value), nan_b = std::isnan(b.value);
  if (nan_a != nan_b) return nan_a;
  if (!nan_a && a.value != b.value) return a.value > b.value;
  return a.id < b.id;
}

// The rows of the head that remain for one hidden state, in no order.
struct Survivors {
  std::atomic<int64_t> count{0};
  float threshold = 0;
  bool dense = false;
};

// The `count` first of `many` values in their order, an index each, sorted.
static void first_of(const float* values, int64_t many, int64_t count, Logit* top) {
  for (int64_t i = 0; i < count; ++i) top[i] = {values[i], static_cast<int32_t>(i)};
  std::make_heap(top, top + count, before);  // its front is the last of them
  for (int64_t i = count; i < many; ++i) {
    if (values[i] <= top[0].value) continue;
    std::pop_heap(top, top + count, before);
    top[count - 1] = {values[i], static_cast<int32_t>(i)};
    std::push_heap(top, top + count, before);
  }
  std::sort_heap(top, top + count, before);
}

// A threshold that k logits reach: the k-th of 2 k exact ones, guessed from the centres in the 2 k tiles that seem
// best.
static void find_threshold(const Exact& exact, const Screen& screen, int64_t m, Survivors& found) {
  const Head& head = exact.head;
  const int64_t count = kGuesses * head.k;
  found.dense = !screen.usable[m] || head.tiles < count || head.V <= head.most;
  if (found.dense) return;
  Logit top[kGuesses * kMostLogits];
  float centres[kGuesses * kMostLogits * kScreenTile] = {}, logits[kGuesses * kMostLogits];
  int32_t ids[kGuesses * kMostLogits * kScreenTile], guesses[kGuesses * kMostLogits];
  first_of(screen.centre + m * head.tiles, head.tiles, count, top);
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tile = top[i].id;
    for (int64_t row = 0; row < screen.rows_of(tile); ++row, ++rows) {
      ids[rows] = static_cast<int32_t>(tile * kScreenTile + row);
      centres[rows] = screen.at(m, ids[rows], 0);
    }
  }
  first_of(centres, rows, count, top);
  for (int64_t i = 0; i < count; ++i) {
    guesses[i] = ids[top[i].id];
    exact.prefetch(guesses[i]);
  }
  for (int64_t i = 0; i < count; i += kLinearOutputs)
    exact.logits(m, 0, guesses + i, std::min(kLinearOutputs, count - i), logits + i);
  first_of(logits, count, head.k, top);
  const float threshold = top[head.k - 1].value;
  found.dense = !std::isfinite(threshold);
  // a bf16 logit is its fp32 sum, which the interval holds, rounded by at most 2^-8 of it
  found.threshold = head.bf16 ? threshold - std::fabs(threshold) * 0x1p-7f - 0x1p-126f : threshold;
}

// Computes the logits of the rows in `tiles` tiles from `first` on whose intervals reach the threshold.
static void search(const Exact& exact, const Screen& screen, int64_t m, int64_t first, int64_t tiles, Survivors& found,
                   Logit* survivors) {
  const float *best = screen.upper + m * exact.head.tiles, bound = *(screen.bound + m);
  int32_t ids[kLinearOutputs];
  float logits[kLinearOutputs];
  int64_t held = 0;
  const auto flush = [&] {
    const int64_t at = found.count.fetch_add(held, std::memory_order_relaxed);
    if (held && at + held <= exact.head.most) {
      exact.logits(m, 0, ids, held, logits);
      for (int64_t i = 0; i < held; ++i) survivors[at + i] = {logits[i], ids[i]};
    }
    held = 0;
  };
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    if (best[tile] < found.threshold) continue;
    for (int64_t i = 0; i < screen.rows_of(tile); ++i) {
      const int64_t row = tile * kScreenTile + i;
      if (screen.at(m, row, bound) < found.threshold) continue;
      exact.prefetch(row);
      ids[held++] = static_cast<int32_t>(row);
      if (held == kLinearOutputs) flush();
    }
  }
  flush();
}

// The first k of `count` logits, in order.
static void select(Logit* some, int64_t count, int64_t m, const Head& head, void* values, int64_t* ids) {
  std::partial_sort(some, some + head.k, some + count, before);
  for (int64_t i = 0; i < head.k; ++i) {
    const int64_t at = m * head.k + i;
    ids[at] = some[i].id;
    if (head.bf16) {
      static_cast<uint16_t*>(values)[at] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, some[i].value) >> 16);
    } else {
      static_cast<float*>(values)[at] = some[i].value;
    }
  }
}

// All logits of one hidden state.
static void dense(const Exact& exact, int64_t m, void* values, int64_t* ids) {
  const Head& head = exact.head;
  Buffer<Logit> all(head.V);
  for_each_item((head.V + kLinearOutputs - 1) / kLinearOutputs, [&](int64_t item, int64_t) {
    const int64_t first = item * kLinearOutputs, count = std::min(kLinearOutputs, head.V - first);
    float logits[kLinearOutputs];
    exact.logits(m, first, nullptr, count, logits);
    for (int64_t i = 0; i < count; ++i) *(all + first + i) = {logits[i], static_cast<int32_t>(first + i)};
  });
  select(all + 0, head.V, m, head, values, ids);
}

static void run(const Head& head, const Rows& x, void* values, int64_t* ids, int32_t* scored) {
  const Exact exact(head, x);
  const Screen screen(head, x);
  const int64_t M = head.M, tiles = head.tiles;
  screen.scan();
  std::vector<Survivors> found(M);
  for_each_item(M, [&](int64_t m, int64_t) { find_threshold(exact, screen, m, found[m]); });
  const Buffer<Logit> survivors(M * head.most);
  const int64_t segments = (tiles + kSegment - 1) / kSegment;
  for_each_item(M * segments, [&](int64_t item, int64_t) {
    const int64_t m = item / segments, first = item % segments * kSegment;
    if (found[m].dense) return;
    search(exact, screen, m, first, std::min(kSegment, tiles - first), found[m], survivors + m * head.most);
  });
  for (int64_t m = 0; m < M; ++m) {
    const int64_t count = found[m].count;
    const bool whole = found[m].dense || count > head.most;
    scored[m] = static_cast<int32_t>(whole ? head.V : count);
    whole ? dense(exact, m, values, ids) : select(survivors + m * head.most, count, m, head, values, ids);
  }
}

static std::tuple<Tensor, Tensor, Tensor> exact_head(const Tensor& x, const Tensor& weight, const Tensor& codes,
                                                     const Tensor& scales, const std::optional<Tensor>& basis,
                                                     const Tensor& error, const Tensor& norm, double slack,
                                                     int64_t wide, int64_t k) {
  SCRIMP_CHECK(x.dim() >= 1, "exact_head: x must be [.., K], got a scalar");
  const int64_t K = x.size(x.dim() - 1), V = weight.dim() ? weight.size(0) : 0;
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) M *= x.size(dim);
  const Head head{.weight = weight,
                  .codes = codes,
                  .scales = scales,
                  .error = error,
                  .norm = norm,
                  .basis = basis,
                  .slack = slack,
                  .wide = wide,
                  .k = k,
                  .M = M,
                  .K = K,
                  .V = V,
                  .groups = (K + kScreenGroup - 1) / kScreenGroup,
                  .tiles = (V + kScreenTile - 1) / kScreenTile,
                  .most = std::max<int64_t>(256, V / 4),
                  .bf16 = x.scalar_type() == ScalarType::BFloat16};
  check(x, head);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.pop_back();
  const Tensor scored = cpu_empty(x, shape, ScalarType::Int);
  shape.push_back(k);
  const Tensor values = cpu_empty(x, shape);
  const Tensor ids = cpu_empty(x, shape, ScalarType::Long);
  if (M > 0)
    run(head, Rows(x), values.data_ptr(), static_cast<int64_t*>(ids.data_ptr()),
        static_cast<int32_t*>(scored.data_ptr()));
  return {values, ids, scored};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("exact_head", TORCH_BOX(&scrimp::exact_head)); }
