// int4_sparse_linear on the CPU: checks, the list of channels, work split, registration.
#include "cpu/int4_sparse_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/channel_list.h"
#include "common/float_dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensors.h"

namespace scrimp {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRun = 8192;       // outputs of a channel that a thread reads in one go, where rows are few
constexpr int64_t kSums = 4 * kRun;  // outputs times rows whose sums and totals are in the cache at once

// The op's arguments, checked.
struct Int4SparseProblem {
  Tensor x, codes, scales;
  OptionalTensor zeros, codebook, permutation, bias;
  int64_t group, K, N, inputs;
  Int4Zeros kind;
  bool byte_zeros, int8;

  static void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                           std::initializer_list<int64_t> shape) {
    bool same = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape.begin()[i];
    SCRIMP_CHECK(same, "int4_sparse_linear: ", name, " has shape ", shape_text(tensor),
                 ", which does not fit, or is not on the CPU");
    SCRIMP_CHECK(tensor.scalar_type() == dtype, "int4_sparse_linear: ", name, " has a dtype that does not fit");
  }

  void check() const {
    SCRIMP_CHECK(x.is_cpu() && x.dim() > 0, "int4_sparse_linear: x must be [.., inputs] on the CPU");
    SCRIMP_CHECK(float_type(x), "int4_sparse_linear: x must be float32, bfloat16 or float16 on the CPU");
    SCRIMP_CHECK(float_type(scales), "int4_sparse_linear: scales must be float32, bfloat16 or float16");
    SCRIMP_CHECK(
        group > 0 && K % group == 0 && (group == K || group == 16 || group == 32 || group == 64 || group == 128),
        "int4_sparse_linear: group_size=", group, " must be 16, 32, 64, 128 or K=", K, " and divide it");
    const int64_t groups = K / group;
    check_tensor("codes", codes, ScalarType::Byte, {K, (N + kInt4Tile - 1) / kInt4Tile * kInt4Tile / 2});
    check_tensor("scales", scales, scales.scalar_type(), {groups, N});
    SCRIMP_CHECK(zeros.has_value() == (kind != Int4Zeros::none), "int4_sparse_linear: zeros do not fit zero_kind");
    if (zeros) check_tensor("zeros", *zeros, byte_zeros ? ScalarType::Byte : scales.scalar_type(), {groups, N});
    if (codebook) {
      SCRIMP_CHECK(!zeros, "int4_sparse_linear: a codebook takes no zeros");
      const bool wide = !int8 && codebook->scalar_type() == ScalarType::Float;
      check_tensor("codebook", *codebook, wide ? ScalarType::Float : ScalarType::Char, {16});
    }
    SCRIMP_CHECK(permutation ? inputs <= K : inputs == K, "int4_sparse_linear: x has ", inputs,
                 " inputs, but the weight ", K);
    if (permutation) {
      check_tensor("permutation", *permutation, ScalarType::Int, {K});
      const auto* order = static_cast<const int32_t*>(permutation->data_ptr());
      for (int64_t k = 0; k < K; ++k) {
        SCRIMP_CHECK(0 <= order[k] && order[k] < inputs, "int4_sparse_linear: permutation[", k, "] is ", order[k],
                     ", outside the ", inputs, " inputs");
      }
    }
    if (bias) check_tensor("bias", *bias, x.scalar_type(), {N});
  }
};

static const void* data(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// The listed channels by blocks, in quads and spans.
class Int4Listed {
 public:
  Int4Listed(const Int4SparseProblem& p, const int32_t* index, int64_t count) : size_(block_of(p)) {
    std::vector<int32_t> columns, inputs;
    if (p.permutation) {
      const auto* order = static_cast<const int32_t*>(p.permutation->data_ptr());
      std::vector<char> wanted(p.inputs);
      for (int64_t j = 0; j < count; ++j) wanted[index[j]] = 1;
      for (int64_t k = 0; k < p.K; ++k) {
        if (wanted[order[k]]) columns.push_back(static_cast<int32_t>(k)), inputs.push_back(order[k]);
      }
      cut(columns.data(), inputs.data(), static_cast<int64_t>(columns.size()));
    } else {
      cut(index, index, count);
    }
  }

  static int64_t block_of(const Int4SparseProblem& p) { return p.group == p.K ? kInt4Block : p.group; }
  int64_t quads() const { return quads_; }
  Int4SparseList list() const {
    return {.channel = channels_.data(),
            .input = inputs_.data(),
            .place = places_.data(),
            .spans = spans_.data(),
            .span_count = static_cast<int64_t>(spans_.size()),
            .block = size_};
  }

 private:
  // Columns that ascend, and the input of each.
  void cut(const int32_t* columns, const int32_t* inputs, int64_t count) {
    const int64_t most = count + 3 * std::min(count, count ? columns[count - 1] / size_ + 1 : 0);
    channels_.resize(most), inputs_.resize(most), places_.resize(most);
    int64_t to = 0;
    for (int64_t j = 0; j < count;) {
      const int64_t block = columns[j] / size_, begin = block * size_, end = begin + size_, first = to / 4;
      for (; j < count && columns[j] < end; ++j, ++to) {
        channels_[to] = columns[j], inputs_[to] = inputs[j];
        places_[to] = static_cast<uint8_t>(columns[j] - begin);
      }
      for (; to % 4; ++to) {
        channels_[to] = channels_[to - 1], inputs_[to] = inputs_[to - 1];
        places_[to] = static_cast<uint8_t>(kInt4Block);
      }
      quads_ = to / 4;
      for (int64_t quad = first; quad < quads_; quad += kInt4SpanQuads) {
        const int64_t last = std::min(quad + kInt4SpanQuads, quads_);
        spans_.push_back({quad, last - quad, block, quad == first, last == quads_});
      }
    }
  }

  int64_t size_, quads_ = 0;
  std::vector<int32_t> channels_, inputs_;
  std::vector<uint8_t> places_;
  std::vector<Int4Span> spans_;
};

// Rows [first, first + rows): x is packed once, then parts of the outputs are computed.
static void multiply(const Int4SparseProblem& p, const Int4Listed& listed, const Rows& x_rows, int64_t first,
                     int64_t rows, const void* codebook, const Tensor& out) {
  const int64_t tiles = (p.N + kInt4Tile - 1) / kInt4Tile, quads = listed.quads();
  const int64_t workers = worker_count(tiles, rows * p.N * quads / 2);
  const int64_t run = std::min(kRun, kSums / rows), turns = (p.N + workers * run - 1) / (workers * run);
  const int64_t share = (p.N + workers * turns - 1) / (workers * turns);
  const int64_t width = (share + kInt4Tile - 1) / kInt4Tile * kInt4Tile, parts = (p.N + width - 1) / width;

  const int64_t in_blocks = (p.K / Int4Listed::block_of(p) + 1) * rows;
  Memory memory;
  const int64_t values = memory.reserve<float>(p.int8 ? 0 : 4 * quads * rows);
  const int64_t integers = memory.reserve<int8_t>(p.int8 ? 4 * quads * rows : 0);
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
                              .center = p.codebook                  ? 128
                                        : p.kind == Int4Zeros::none ? 8
                                                                    : 0,
                              .int8 = p.int8};
  const auto type = *float_type(p.x);
  const auto pack = SCRIMP_VNNI_KERNEL(int4_sparse_pack);
  for_each_item(rows, rows == 1 ? 1 : std::min(workers, rows), [&](int64_t row, int64_t) {
    pack({.to = &packed, .row = row, .x = x_rows.row(first + row), .type = type});
  });

  const int64_t scale_size = p.scales.element_size(), zero_size = p.zeros ? p.zeros->element_size() : 0;
  const auto* all_scales = static_cast<const char*>(p.scales.data_ptr());
  const auto* all_zeros = static_cast<const char*>(data(p.zeros));
  const auto* bias = static_cast<const char*>(data(p.bias));
  const int64_t size = p.x.element_size();
  const auto kernel = SCRIMP_VNNI_KERNEL(int4_sparse_linear);
  for_each_item(parts, std::min(workers, parts), [&](int64_t part, int64_t worker) {
    const int64_t n = part * width;
    const int64_t outputs = std::min(width, p.N - n);
    kernel({.x = &packed,
            .outputs = outputs,
            .width = (outputs + kInt4Tile - 1) / kInt4Tile * kInt4Tile,
            .codes = static_cast<const uint8_t*>(p.codes.data_ptr()) + n / 2,
            .codes_stride = p.codes.stride(0),
            .group = p.group,
            .scales = all_scales + n * scale_size,
            .zeros = all_zeros ? all_zeros + n * zero_size : nullptr,
            .scales_stride = p.scales.stride(0),
            .zeros_stride = p.zeros ? p.zeros->stride(0) : 0,
            .scale_type = *float_type(p.scales),
            .byte_zeros = p.byte_zeros,
            .kind = p.kind,
            .codebook = codebook,
            .bias = bias ? bias + n * size : nullptr,
            .out = static_cast<char*>(out.data_ptr()) + (first * p.N + n) * size,
            .out_stride = p.N,
            .type = type,
            .sums = memory.at<float>(scratch) + 2 * worker * rows * width,
            .totals = memory.at<float>(scratch) + (2 * worker + 1) * rows * width});
  });
}

static Tensor int4_sparse_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                 const OptionalTensor& zeros, const OptionalTensor& codebook,
                                 const OptionalTensor& permutation, const Tensor& index_any, const Tensor& count,
                                 const OptionalTensor& bias, int64_t group_size, int64_t zero_kind, int64_t mode) {
  SCRIMP_CHECK(0 <= zero_kind && zero_kind <= 3, "int4_sparse_linear: zero_kind=", zero_kind, " must be 0 to 3");
  SCRIMP_CHECK(mode == 0 || mode == 1, "int4_sparse_linear: mode=", mode, " must be 0 or 1");
  SCRIMP_CHECK(x.dim() > 0 && codes.dim() == 2 && scales.dim() == 2,
               "int4_sparse_linear: x must be [.., inputs], codes [K, bytes], scales [groups, N]");
  const auto contiguous = [](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
  };
  const auto rows_of = [](const OptionalTensor& tensor) {
    return tensor && tensor->dim() == 2 ? OptionalTensor(unit_last_stride(*tensor)) : tensor;
  };
  const Int4Zeros kinds[] = {Int4Zeros::none, Int4Zeros::shift, Int4Zeros::shift, Int4Zeros::offset};
  const Int4SparseProblem p{x,
                            unit_last_stride(codes),
                            unit_last_stride(scales),
                            rows_of(zeros),
                            contiguous(codebook),
                            contiguous(permutation),
                            contiguous(bias),
                            group_size,
                            codes.size(0),
                            scales.size(1),
                            x.size(x.dim() - 1),
                            kinds[zero_kind],
                            zero_kind == 1,
                            mode == 1};
  p.check();
  const Tensor index = as_contiguous(index_any);
  const int64_t listed = check_list("int4_sparse_linear", index, count, p.inputs);
  float book[16];  // exact mode reads an int8 codebook as fp32
  const void* entries = data(p.codebook);
  if (entries && !p.int8 && p.codebook->scalar_type() == ScalarType::Char) {
    std::copy_n(static_cast<const int8_t*>(entries), 16, book);
    entries = book;
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.N;
  const Tensor out = cpu_empty(x, shape);
  if (out.numel() == 0) return out;
  const int64_t M = out.numel() / p.N;
  const Int4Listed channels(p, static_cast<const int32_t*>(index.data_ptr()), listed);
  const Rows rows(x);
  for (int64_t row = 0; row < M; row += kInt4SparseRows) {
    multiply(p, channels, rows, row, std::min(kInt4SparseRows, M - row), entries, out);
  }
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("int4_sparse_linear", TORCH_BOX(&scrimp::int4_sparse_linear)); }
