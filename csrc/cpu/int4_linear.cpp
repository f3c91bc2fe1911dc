// int4_linear on the CPU: checks, work split, registration.
#include "cpu/int4_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/float_dtype.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape.begin()[i];
  if (same) return;
  std::string expected;
  for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  fail("int4_linear: ", name, " has shape ", shape_text(tensor), ", expected [", expected, "]");
}

// The op's arguments, checked.
struct Problem {
  Tensor x, qweight, scales;
  std::optional<Tensor> zeros, codebook, permutation, bias;
  int64_t group, N, K;
  Int4Zeros kind;
  bool byte_zeros, int8;

  void check() const {
    for (const Tensor* tensor : {&x, &qweight, &scales})
      SCRIMP_CHECK(tensor->is_cpu(), "int4_linear: a tensor is not on the CPU");
    for (const auto* tensor : {&zeros, &codebook, &permutation, &bias}) {
      SCRIMP_CHECK(!*tensor || (*tensor)->is_cpu(), "int4_linear: a tensor is not on the CPU");
    }
    SCRIMP_CHECK(float_type(x), "int4_linear: x must be float32, bfloat16 or float16 on the CPU");
    SCRIMP_CHECK(qweight.scalar_type() == ScalarType::Byte, "int4_linear: qweight must be uint8");
    SCRIMP_CHECK(float_type(scales), "int4_linear: scales must be float32, bfloat16 or float16 on the CPU");
    SCRIMP_CHECK(
        group > 0 && K % group == 0 && (group == K || group == 16 || group == 32 || group == 64 || group == 128),
        "int4_linear: group_size=", group, " must be 16, 32, 64, 128 or K=", K, " and divide it");
    check_shape("scales", scales, {N, K ? K / group : 0});
    SCRIMP_CHECK(zeros.has_value() == (kind != Int4Zeros::none), "int4_linear: zeros do not fit zero_kind");
    if (zeros) {
      SCRIMP_CHECK(zeros->scalar_type() == (byte_zeros ? ScalarType::Byte : scales.scalar_type()),
                   "int4_linear: zeros must be ", byte_zeros ? "uint8" : "of the dtype of scales");
      check_shape("zeros", *zeros, {N, K ? K / group : 0});
    }
    if (codebook) {
      SCRIMP_CHECK(!zeros, "int4_linear: a codebook takes no zeros");
      const auto dtype = codebook->scalar_type();
      SCRIMP_CHECK(dtype == ScalarType::Char || (dtype == ScalarType::Float && !int8),
                   "int4_linear: a codebook must be int8, or float32 in exact mode");
      check_shape("codebook", *codebook, {16});
    }
    const int64_t inputs = x.size(x.dim() - 1);
    SCRIMP_CHECK(permutation || inputs == K, "int4_linear: x has ", inputs, " inputs, but the weight ", K);
    if (permutation) {
      SCRIMP_CHECK(inputs <= K, "int4_linear: x has ", inputs, " inputs, but the weight permutes ", K);
      SCRIMP_CHECK(permutation->scalar_type() == ScalarType::Int, "int4_linear: permutation must be int32");
      check_shape("permutation", *permutation, {K});
      const auto* order = static_cast<const int32_t*>(permutation->data_ptr());
      for (int64_t k = 0; k < K; ++k) {
        SCRIMP_CHECK(0 <= order[k] && order[k] < inputs, "int4_linear: permutation[", k, "] is ", order[k],
                     ", outside the ", inputs, " inputs");
      }
    }
    if (bias) {
      SCRIMP_CHECK(bias->scalar_type() == x.scalar_type(), "int4_linear: bias must be of the dtype of x");
      check_shape("bias", *bias, {N});
    }
  }
};

static const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Rows [first, first + rows): x is packed once, then panels of outputs are computed.
static void multiply(const Problem& p, const Rows& x_rows, int64_t first, int64_t rows, const void* codebook, char* out,
                     int64_t out_stride) {
  const int64_t block = p.group == p.K ? kInt4Chunk : std::min(p.group, kInt4Chunk);
  const int64_t chunks = (p.K + kInt4Chunk - 1) / kInt4Chunk;
  const int64_t blocks = (p.K + block - 1) / block, outputs = rows == 1 && !p.int8 ? kInt4RowPanel : kInt4Panel;
  const int64_t panels = (p.N + outputs - 1) / outputs;
  const int64_t workers = worker_count(std::max(panels, rows), 2 * rows * p.N * p.K);

  Memory memory;
  const int64_t values = memory.reserve<float>(p.int8 ? 0 : chunks * rows * kInt4Chunk);
  const int64_t integers = memory.reserve<int8_t>(p.int8 ? chunks * rows * kInt4Chunk : 0);
  const int64_t in_blocks = blocks * rows + kInt4Groups;
  const int64_t sums = memory.reserve<float>(in_blocks), scales = memory.reserve<float>(in_blocks);
  const int64_t starts = memory.reserve<int32_t>(in_blocks);
  const int64_t ordered = chunks * kInt4Chunk, scratch_size = std::max(int4_scratch(rows, blocks), ordered);
  const int64_t scratch = memory.reserve<float>(workers * scratch_size);
  memory.allocate();
  for (const int64_t padded : {sums, scales}) {  // read with the last block: a denormal there would cost an assist
    std::fill_n(memory.at<float>(padded) + blocks * rows, kInt4Groups, 0.0f);
  }

  const auto type = *float_type(p.x);
  const Int4Rows packed{.rows = rows,
                        .columns = p.K,
                        .block = block,
                        .values = memory.at<float>(values),
                        .integers = memory.at<int8_t>(integers),
                        .sums = memory.at<float>(sums),
                        .scales = memory.at<float>(scales),
                        .starts = memory.at<int32_t>(starts),
                        .center = p.codebook                  ? 128
                                  : p.kind == Int4Zeros::none ? 8
                                                              : 0,
                        .int8 = p.int8};
  const auto pack = SCRIMP_VNNI_KERNEL(int4_pack);
  for_each_item(rows, rows == 1 ? 1 : workers, [&](int64_t row, int64_t worker) {
    pack({.to = &packed,
          .row = row,
          .x = x_rows.row(first + row),
          .type = type,
          .permutation = static_cast<const int32_t*>(data(p.permutation)),
          .scratch = memory.at<float>(scratch) + worker * scratch_size});
  });

  const int64_t groups = p.scales.size(1), scale_size = p.scales.element_size(), x_size = p.x.element_size();
  const int64_t stride = p.K / 2, zero_size = p.zeros ? p.zeros->element_size() : 0;
  const auto* codes = static_cast<const uint8_t*>(p.qweight.data_ptr());
  const auto* all_scales = static_cast<const char*>(p.scales.data_ptr());
  const auto* all_zeros = static_cast<const char*>(data(p.zeros));
  const auto* bias = static_cast<const char*>(data(p.bias));
  const auto kernel = SCRIMP_VNNI_KERNEL(int4_panel);
  for_each_item(panels, std::min(workers, panels), [&](int64_t panel, int64_t worker) {
    const int64_t n = panel * outputs, next = std::min(n + workers * outputs, p.N - 1);
    kernel({.x = &packed,
            .outputs = std::min(outputs, p.N - n),
            .codes = codes + n * stride,
            .codes_stride = stride,
            .codes_end = codes + p.N * stride,
            .next = codes + next * stride,
            .group = p.group,
            .scales = all_scales + n * groups * scale_size,
            .zeros = all_zeros ? all_zeros + n * groups * zero_size : nullptr,
            .scales_end = all_scales + p.N * groups * scale_size,
            .zeros_end = all_zeros ? all_zeros + p.N * groups * zero_size : nullptr,
            .scale_type = *float_type(p.scales),
            .byte_zeros = p.byte_zeros,
            .kind = p.kind,
            .codebook = codebook,
            .bias = bias ? bias + n * x_size : nullptr,
            .out = out + (first * out_stride + n) * x_size,
            .out_stride = out_stride,
            .type = type,
            .scratch = memory.at<float>(scratch) + worker * scratch_size});
  });
}

void int4_linear_to(const Tensor& out, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                    const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias, int64_t group_size,
                    int64_t zero_kind, int64_t mode) {
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
  };
  const Int4Zeros kinds[] = {Int4Zeros::none, Int4Zeros::shift, Int4Zeros::shift, Int4Zeros::offset};
  const Problem p{x,
                  as_contiguous(qweight),
                  as_contiguous(scales),
                  contiguous(zeros),
                  contiguous(codebook),
                  contiguous(permutation),
                  contiguous(bias),
                  group_size,
                  qweight.size(0),
                  2 * qweight.size(1),
                  kinds[zero_kind],
                  zero_kind == 1,
                  mode == 1};
  p.check();
  float book[16];  // exact mode reads an int8 codebook as fp32
  const void* entries = data(p.codebook);
  if (entries && !p.int8 && p.codebook->scalar_type() == ScalarType::Char) {
    std::copy_n(static_cast<const int8_t*>(entries), 16, book);
    entries = book;
  }
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < out.dim(); ++dim) M *= out.size(dim);
  if (M == 0 || p.N == 0) return;
  const Rows rows(x);
  const int64_t stride = out.dim() > 1 ? out.stride(out.dim() - 2) : p.N;
  for (int64_t row = 0; row < M; row += kInt4Rows) {
    multiply(p, rows, row, std::min(kInt4Rows, M - row), entries, static_cast<char*>(out.data_ptr()), stride);
  }
}

static Tensor int4_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                          const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias,
                          int64_t group_size, int64_t zero_kind, int64_t mode) {
  SCRIMP_CHECK(0 <= zero_kind && zero_kind <= 3, "int4_linear: zero_kind=", zero_kind, " must be 0 to 3");
  SCRIMP_CHECK(mode == 0 || mode == 1, "int4_linear: mode=", mode, " must be 0 or 1");
  SCRIMP_CHECK(qweight.dim() == 2, "int4_linear: qweight must be [N, K/2], got shape ", shape_text(qweight));
  SCRIMP_CHECK(x.dim() >= 1, "int4_linear: x must be [..., inputs], got a scalar");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = qweight.size(0);
  const Tensor out = torch::stable::new_empty(x, shape);
  int4_linear_to(out, x, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode);
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("int4_linear", TORCH_BOX(&scrimp::int4_linear)); }
