// int4_sparse_linear on the CPU: checks, the list of channels, work split, registration.
#include "cpu/int4_sparse_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/channel_list.h"
#include "common/float_dtype.h"
#include "common/int4_sparse_linear.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRun = 8192;       // outputs of a channel that a thread reads in one go, where rows are few
constexpr int64_t kSums = 4 * kRun;  // outputs times rows whose sums and totals are in the cache at once

// x and one weight, checked.
struct Int4SparseProblem {
  Tensor x, codes, scales;
  OptionalTensor zeros, codebook, permutation, bias;
  int64_t group, K, N, inputs;
  Int4Zeros kind;
  bool byte_zeros, int8;
  int64_t first_output = 0;  // where its results begin in a row
  float wide_codebook[16];   // exact mode reads an int8 codebook as fp32

  Int4SparseProblem(const Tensor& x, const Int4ChannelsOf& weight)
      : x(x),
        codes(unit_last_stride(weight.codes)),
        scales(unit_last_stride(weight.scales)),
        zeros(weight.zeros && weight.zeros->dim() == 2 ? OptionalTensor(unit_last_stride(*weight.zeros))
                                                       : weight.zeros),
        codebook(contiguous(weight.codebook)),
        permutation(contiguous(weight.permutation)),
        bias(contiguous(weight.bias)),
        group(weight.group_size),
        K(codes.size(0)),
        N(scales.size(1)),
        inputs(x.size(x.dim() - 1)),
        kind(weight.zero_kind == 0   ? Int4Zeros::none
             : weight.zero_kind == 3 ? Int4Zeros::offset
                                     : Int4Zeros::shift),
        byte_zeros(weight.zero_kind == 1),
        int8(weight.mode == 1) {
    check();
    if (codebook && !int8 && codebook->scalar_type() == ScalarType::Char) {
      std::copy_n(static_cast<const int8_t*>(codebook->data_ptr()), 16, wide_codebook);
    }
  }

  const void* entries() const {
    if (!codebook) return nullptr;
    return !int8 && codebook->scalar_type() == ScalarType::Char ? wide_codebook : codebook->data_ptr();
  }
  int64_t block() const { return group == K ? kInt4Block : group; }
  int32_t center() const { return codebook ? 128 : kind == Int4Zeros::none ? 8 : 0; }
  // Whether rows that are packed for the other one are packed for this one.
  bool packs_as(const Int4SparseProblem& other) const {
    return !permutation && !other.permutation && block() == other.block() && center() == other.center() &&
           int8 == other.int8;
  }

  static OptionalTensor contiguous(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
  }

  void check() const {
    SCRIMP_CHECK(x.is_cpu() && x.dim() > 0, "int4_sparse_linear: x must be [.., inputs] on the CPU");
    SCRIMP_CHECK(float_type(x), "int4_sparse_linear: x must be float32, bfloat16 or float16 on the CPU");
    bool all = codes.is_cpu() && scales.is_cpu();
    for (const auto* tensor : {&zeros, &codebook, &permutation, &bias}) all &= !*tensor || (*tensor)->is_cpu();
    SCRIMP_CHECK(all, "int4_sparse_linear: the tensors must be on the CPU");
    check_int4_channels(x, codes, scales, zeros, codebook, permutation, bias, group, kind, byte_zeros, int8);
    if (!permutation) return;
    const auto* order = static_cast<const int32_t*>(permutation->data_ptr());
    for (int64_t k = 0; k < K; ++k) {
      SCRIMP_CHECK(0 <= order[k] && order[k] < inputs, "int4_sparse_linear: permutation[", k, "] is ", order[k],
                   ", outside the ", inputs, " inputs");
    }
  }
};

// The listed channels by blocks, in quads and spans.
class Int4Listed {
 public:
  Int4Listed(const Int4SparseProblem& p, const int32_t* index, int64_t count) : size_(p.block()) {
    if (!p.permutation) {
      cut(index, nullptr, count);
      return;
    }
    std::vector<int32_t> columns, inputs;
    const auto* order = static_cast<const int32_t*>(p.permutation->data_ptr());
    std::vector<char> wanted(p.inputs);
    for (int64_t j = 0; j < count; ++j) wanted[index[j]] = 1;
    for (int64_t k = 0; k < p.K; ++k) {
      if (wanted[order[k]]) columns.push_back(static_cast<int32_t>(k)), inputs.push_back(order[k]);
    }
    cut(columns.data(), inputs.data(), static_cast<int64_t>(columns.size()));
  }

  int64_t quads() const { return quads_; }
  // The first span of a block where piece `piece` of `pieces` of the list begins.
  int64_t block_at(int64_t piece, int64_t pieces) const {
    int64_t span = span_count_ * piece / pieces;
    while (span < span_count_ && !spans_[span].opens) ++span;
    return span;
  }
  Int4SparseList list() const {
    return {.channel = channels_, .input = inputs_, .spans = spans_, .span_count = span_count_, .block = size_};
  }

 private:
  // Columns that ascend, and the input of each where that is another one.
  void cut(const int32_t* columns, const int32_t* inputs, int64_t count) {
    const int64_t blocks = std::min(count, count ? columns[count - 1] / size_ + 1 : 0), most = count + 3 * blocks;
    const int64_t channels_at = memory_.reserve<int32_t>(most), inputs_at = memory_.reserve<int32_t>(inputs ? most : 0);
    const int64_t spans_at = memory_.reserve<Int4Span>(most / (4 * kInt4SpanQuads) + blocks);
    memory_.allocate();
    channels_ = memory_.at<int32_t>(channels_at);
    inputs_ = inputs ? memory_.at<int32_t>(inputs_at) : channels_;
    spans_ = memory_.at<Int4Span>(spans_at);
    int64_t to = 0;
    for (int64_t j = 0, end; j < count; j = end) {
      const int64_t block = columns[j] / size_, behind = (block + 1) * size_, first = to / 4;
      for (end = j; end < count && columns[end] < behind;) ++end;
      std::copy(columns + j, columns + end, channels_ + to);
      if (inputs) std::copy(inputs + j, inputs + end, inputs_ + to);
      for (to += end - j; to % 4; ++to) channels_[to] = channels_[to - 1], inputs_[to] = inputs_[to - 1];
      quads_ = to / 4;
      for (int64_t quad = first; quad < quads_; quad += kInt4SpanQuads) {
        const int64_t last = std::min(quad + kInt4SpanQuads, quads_);
        spans_[span_count_++] = {quad, last - quad, block, quad == first, last == quads_};
      }
    }
  }

  int64_t size_, quads_ = 0, span_count_ = 0;
  Memory memory_;
  int32_t *channels_, *inputs_;
  Int4Span* spans_;
};

// Outputs of a weight that one thread computes.
struct Int4SparseItem {
  const Int4SparseProblem* weight;
  int64_t first, outputs;
};

// Rows [first_row, first_row + rows) for weights [begin, end): x is packed once, then parts of the outputs are
// computed.
static void multiply(const Int4SparseProblem* begin, const Int4SparseProblem* end, const Int4Listed& listed,
                     const Rows& x_rows, int64_t first_row, int64_t rows, char* out, int64_t out_stride) {
  const int64_t quads = listed.quads();
  int64_t N = 0, tiles = 0;
  for (const auto* p = begin; p < end; ++p) N += p->N, tiles += (p->N + kInt4Tile - 1) / kInt4Tile;
  const int64_t workers = worker_count(tiles, 8 * rows * N * quads);
  const int64_t run = std::min(kRun, kSums / rows), turns = (N + workers * run - 1) / (workers * run);
  const int64_t share = (N + workers * turns - 1) / (workers * turns);
  const int64_t width = (share + kInt4Tile - 1) / kInt4Tile * kInt4Tile;
  std::vector<Int4SparseItem> items;
  for (const auto* p = begin; p < end; ++p) {
    for (int64_t n = 0; n < p->N; n += width) items.push_back({p, n, std::min(width, p->N - n)});
  }

  const int64_t in_blocks = (begin->K / begin->block() + 1) * rows;
  Memory memory;
  const int64_t values = memory.reserve<float>(begin->int8 ? 0 : 4 * quads * rows);
  const int64_t integers = memory.reserve<int8_t>(begin->int8 ? 4 * quads * rows : 0);
  const int64_t sums = memory.reserve<float>(in_blocks), scales = memory.reserve<float>(in_blocks);
  const int64_t starts = memory.reserve<int32_t>(in_blocks);
  const int64_t scratch = memory.reserve<float>(2 * workers * rows * width);
  memory.allocate();

  const Int4SparseList list = listed.list();
  const Int4SparseRows packed{.list = &list,
                              .rows = rows,
                              .values = memory.at<float>(values),
                              .integers = memory.at<int8_t>(integers),
                              .sums = memory.at<float>(sums),
                              .scales = memory.at<float>(scales),
                              .starts = memory.at<int32_t>(starts),
                              .center = begin->center(),
                              .int8 = begin->int8};
  const auto type = *float_type(begin->x);
  const auto pack = SCRIMP_VNNI_KERNEL(int4_sparse_pack);
  const int64_t pieces = rows == 1 ? 1 : workers;  // of the list: rows lie side by side in memory
  for_each_item(pieces, pieces, [&](int64_t piece, int64_t) {
    const int64_t first = listed.block_at(piece, pieces), last = listed.block_at(piece + 1, pieces);
    for (int64_t row = 0; row < rows; ++row) {
      pack({.to = &packed, .row = row, .begin = first, .end = last, .x = x_rows.row(first_row + row), .type = type});
    }
  });

  const auto at = [](const OptionalTensor& tensor, int64_t n) {
    return tensor ? static_cast<const char*>(tensor->data_ptr()) + n * tensor->element_size() : nullptr;
  };
  const int64_t size = begin->x.element_size();
  const auto kernel = SCRIMP_VNNI_KERNEL(int4_sparse_linear);
  for_each_item(items.size(), std::min<int64_t>(workers, items.size()), [&](int64_t item, int64_t worker) {
    const auto [weight, n, outputs] = items[item];
    const Int4SparseProblem& p = *weight;
    kernel({.x = &packed,
            .outputs = outputs,
            .width = (outputs + kInt4Tile - 1) / kInt4Tile * kInt4Tile,
            .codes = static_cast<const uint8_t*>(p.codes.data_ptr()) + n / 2,
            .codes_stride = p.codes.stride(0),
            .group = p.group,
            .scales = at(p.scales, n),
            .zeros = at(p.zeros, n),
            .scales_stride = p.scales.stride(0),
            .zeros_stride = p.zeros ? p.zeros->stride(0) : 0,
            .scale_type = *float_type(p.scales),
            .byte_zeros = p.byte_zeros,
            .kind = p.kind,
            .codebook = p.entries(),
            .bias = at(p.bias, n),
            .out = out + (first_row * out_stride + p.first_output + n) * size,
            .out_stride = out_stride,
            .type = type,
            .sums = memory.at<float>(scratch) + 2 * worker * rows * width,
            .totals = memory.at<float>(scratch) + (2 * worker + 1) * rows * width});
  });
}

void int4_sparse_linear_to(const Tensor& out, const Tensor& x, const std::vector<Int4ChannelsOf>& weights,
                           ChannelList channels) {
  std::vector<Int4SparseProblem> problems;
  problems.reserve(weights.size());
  int64_t N = 0;
  for (const Int4ChannelsOf& weight : weights) {
    problems.emplace_back(x, weight);
    problems.back().first_output = N;
    N += problems.back().N;
  }
  if (out.numel() == 0) return;
  const int64_t M = out.numel() / N;
  const Rows rows(x);
  for (const auto *begin = problems.data(), *last = begin + problems.size(), *end = begin; begin < last; begin = end) {
    for (end = begin + 1; end < last && end->packs_as(*begin); ++end) continue;
    const Int4Listed quads(*begin, channels.index, channels.count);
    for (int64_t row = 0; row < M; row += kInt4SparseRows) {
      multiply(begin, end, quads, rows, row, std::min(kInt4SparseRows, M - row), static_cast<char*>(out.data_ptr()), N);
    }
  }
}

static Tensor int4_sparse_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                 const OptionalTensor& zeros, const OptionalTensor& codebook,
                                 const OptionalTensor& permutation, const Tensor& index_any, const Tensor& count,
                                 const OptionalTensor& bias, int64_t group_size, int64_t zero_kind, int64_t mode) {
  SCRIMP_CHECK(0 <= zero_kind && zero_kind <= 3, "int4_sparse_linear: zero_kind=", zero_kind, " must be 0 to 3");
  SCRIMP_CHECK(mode == 0 || mode == 1, "int4_sparse_linear: mode=", mode, " must be 0 or 1");
  SCRIMP_CHECK(x.dim() > 0 && codes.dim() == 2 && scales.dim() == 2,
               "int4_sparse_linear: x must be [.., inputs], codes [K, bytes], scales [groups, N]");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = scales.size(1);
  const Tensor index = as_contiguous(index_any), out = cpu_empty(x, shape);
  const int64_t listed = check_list("int4_sparse_linear", index, count, x.size(x.dim() - 1));
  int4_sparse_linear_to(out, x, {{codes, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode}},
                        {static_cast<const int32_t*>(index.data_ptr()), listed});
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("int4_sparse_linear", TORCH_BOX(&scrimp::int4_sparse_linear)); }
