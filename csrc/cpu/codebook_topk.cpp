// codebook_topk on the CPU: checks, work split, registration.
//
// Items are blocks of rows x a codebook x a range of its codes; there are several ranges only where rows are few. Which
// codes are the best does not depend on any of these splits: a score is always the same sum, and no two codes are equal
// in the order of (score, code).
#include "cpu/codebook_topk.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "common/codebook_topk.h"
#include "common/float_dtype.h"
#include "common/rows.h"
#include "common/tensors.h"

namespace scrimp {

using torch::headeronly::ScalarType;

constexpr int64_t kRows = 1024;            // of an item: a code is packed once for so many
constexpr int64_t kRowBytes = 4 << 20;     // of an item's rows, which bounds them where D is large
constexpr int64_t kCodeBytes = 512 << 10;  // of codes packed at a time: they stay in the second-level cache
constexpr int64_t kRowTiles = 12;          // rows of an item are a multiple of any tile's
constexpr int64_t kGatherRows = 64;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

static void check(const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& bias, int64_t k) {
  SCRIMP_CHECK(float_type(x), "codebook_topk: x must be float32, bfloat16 or float16 on the CPU");
  SCRIMP_CHECK(x.is_cpu() && codebook.is_cpu() && (!bias || bias->is_cpu()),
               "codebook_topk: x, codebook and bias must be on the CPU");
  check_codebook_topk(x, codebook, bias, k);
}

// How many rows, and codes, an item has.
struct Split {
  int64_t rows, codes, row_blocks, parts, block;

  Split(int64_t T, int64_t G, int64_t C, int64_t D) {
    const int64_t most = std::clamp(kRowBytes / std::max<int64_t>(4 * D, 1), kRowTiles, kRows);
    rows = round_up(divide_up(T, divide_up(T, most)), kRowTiles);
    row_blocks = divide_up(T, rows);
    const int64_t workers = worker_count(INT64_MAX, 2 * T * G * C * D);
    const int64_t wanted = workers > 1 ? divide_up(2 * workers, row_blocks * G) : 1;
    codes = round_up(divide_up(C, wanted), kCodebookPanel);
    parts = divide_up(C, codes);
    block = std::max(kCodeBytes / (4 * (D + 1)) / kCodebookPanel, int64_t{1}) * kCodebookPanel;
    block = T <= kRowTiles ? kCodebookPanel : std::min(block, codes);  // packed codes that are used once stay closer
  }
};

// What one thread works with.
struct Scratch {
  int64_t packed;  // floats of the rows, and behind them those of the codes
  std::unique_ptr<float, void (*)(void*)> memory;
  std::vector<const void*> rows;

  Scratch(const Split& split, int64_t D)
      : packed(round_up(split.rows * D, 16)), memory(nullptr, std::free), rows(split.rows) {
    const int64_t bytes = round_up(4 * (packed + split.block * (D + 1)), 64);
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
  }
};

static std::tuple<Tensor, Tensor, Tensor> codebook_topk(const Tensor& x, const Tensor& codebook,
                                                        const std::optional<Tensor>& any_bias, int64_t k,
                                                        bool euclidean, bool mean) {
  check(x, codebook, any_bias, k);
  const int64_t dims = codebook.dim(), G = dims == 3 ? codebook.size(0) : 1, C = codebook.size(dims - 2),
                D = codebook.size(dims - 1), size = x.element_size();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor out = cpu_empty(x, shape);
  shape.back() = k;
  if (dims == 3) shape.insert(shape.end() - 1, G);
  const Tensor index = cpu_empty(x, shape, ScalarType::Int);
  const Tensor scores = cpu_empty(x, shape, ScalarType::Float);
  const int64_t T = scores.numel() / (G * k);
  if (T == 0) return {out, index, scores};

  const Rows rows(x);
  const std::optional<Tensor> bias = any_bias ? std::optional(as_contiguous(*any_bias)) : std::nullopt;
  const FloatType type = *float_type(x);
  const Split split(T, G, C, D);
  const int64_t part_stride = T * G * k, more = (split.parts - 1) * part_stride;
  const std::unique_ptr<float[]> more_scores(new float[more]);
  const std::unique_ptr<int32_t[]> more_index(new int32_t[more]);
  auto* found_scores = static_cast<float*>(scores.data_ptr());
  auto* found_index = static_cast<int32_t*>(index.data_ptr());
  const int64_t group_bytes = dims == 3 ? codebook.stride(0) * size : 0, stride = codebook.stride(dims - 2);
  const auto book = [&](int64_t g) { return static_cast<const char*>(codebook.data_ptr()) + g * group_bytes; };

  const int64_t items = split.row_blocks * G * split.parts, workers = worker_count(items, 2 * T * G * C * D);
  std::vector<Scratch> scratch;
  for (int64_t worker = 0; worker < workers; ++worker) scratch.emplace_back(split, D);
  const auto search = SCRIMP_KERNEL(codebook_topk);
  for_each_item(items, workers, [&](int64_t item, int64_t worker) {
    const int64_t part = item % split.parts, g = item / split.parts % G, row = item / split.parts / G * split.rows;
    const int64_t count = std::min(split.rows, T - row), first = part * split.codes;
    Scratch& own = scratch[worker];
    for (int64_t i = 0; i < count; ++i) own.rows[i] = rows.row(row + i) + g * D * size;
    // Ranges behind the first have lists of their own: [parts - 1, G, T, k].
    const int64_t direct = (row * G + g) * k, apart = (part - 1) * part_stride + (g * T + row) * k;
    search({.rows = count,
            .width = D,
            .k = k,
            .type = type,
            .euclidean = euclidean,
            .x = own.rows.data(),
            .codebook = book(g),
            .codebook_stride = stride,
            .bias = bias ? static_cast<const float*>(bias->data_ptr()) + g * C : nullptr,
            .first = first,
            .last = std::min(first + split.codes, C),
            .block = split.block,
            .packed_rows = own.memory.get(),
            .packed_codes = own.memory.get() + own.packed,
            .scores = part ? more_scores.get() + apart : found_scores + direct,
            .index = part ? more_index.get() + apart : found_index + direct,
            .found_stride = part ? k : G * k});
  });

  const auto gather = SCRIMP_KERNEL(codebook_topk_gather);
  const int64_t blocks = divide_up(T, kGatherRows);
  for_each_item(blocks * G, worker_count(blocks * G, T * G * k * D), [&](int64_t item, int64_t) {
    const int64_t g = item % G, row = item / G * kGatherRows, at = (g * T + row) * k;
    gather({.rows = std::min(kGatherRows, T - row),
            .width = D,
            .k = k,
            .type = type,
            .mean = mean,
            .codebook = book(g),
            .codebook_stride = stride,
            .scores = found_scores + (row * G + g) * k,
            .index = found_index + (row * G + g) * k,
            .found_stride = G * k,
            .parts = split.parts - 1,
            .more_scores = more_scores.get() + at,
            .more_index = more_index.get() + at,
            .part_stride = part_stride,
            .out = static_cast<char*>(out.data_ptr()) + (row * G + g) * D * size,
            .out_stride = G * D});
  });
  return {out, index, scores};
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("codebook_topk", TORCH_BOX(&scrimp::codebook_topk)); }
