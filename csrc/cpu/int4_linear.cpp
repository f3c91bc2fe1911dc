// int4_linear on the CPU: checks, work split, registration.
#include "cpu/int4_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/float_dtype.h"
#include "common/int4_linear.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;

// What the shared check leaves to the device.
static void check_on_cpu(const Int4Problem& p) {
  SCRIMP_CHECK(p.all([](const Tensor& tensor) { return tensor.is_cpu(); }), "int4_linear: a tensor is not on the CPU");
  p.check();
  if (!p.permutation) return;
  const auto* order = static_cast<const int32_t*>(p.permutation->data_ptr());
  const int64_t inputs = p.x.size(p.x.dim() - 1);
  for (int64_t k = 0; k < p.K; ++k) {
    SCRIMP_CHECK(0 <= order[k] && order[k] < inputs, "int4_linear: permutation[", k, "] is ", order[k],
                 ", outside the ", inputs, " inputs");
  }
}

static const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// Rows [first, first + rows): x is packed once, then panels of outputs are computed.
static void multiply(const Int4Problem& p, const Rows& x_rows, int64_t first, int64_t rows, const void* codebook,
                     char* out, int64_t out_stride) {
  const int64_t limbs = p.int8 ? 1 : isa() == Isa::avx512vnni && !p.codebook ? 3 : 0;
  const int64_t most = limbs == 3 ? kInt4LimbBlock : kInt4Chunk,
                block = p.group == p.K ? most : std::min(p.group, most);
  const int64_t chunks = (p.K + kInt4Chunk - 1) / kInt4Chunk, plane = chunks * rows * kInt4Chunk;
  const int64_t blocks = (p.K + block - 1) / block, outputs = rows == 1 && !limbs ? kInt4RowPanel : kInt4Panel;
  const int64_t panels = (p.N + outputs - 1) / outputs;
  const int64_t workers = worker_count(std::max(panels, rows), 2 * rows * p.N * p.K);

  Memory memory;
  const int64_t values = memory.reserve<float>(limbs ? 0 : plane), integers = memory.reserve<int8_t>(limbs * plane);
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
                        .limbs = limbs,
                        .values = memory.at<float>(values),
                        .integers = memory.at<int8_t>(integers),
                        .plane = plane,
                        .sums = memory.at<float>(sums),
                        .scales = memory.at<float>(scales),
                        .starts = memory.at<int32_t>(starts),
                        .center = p.codebook                                ? 128
                                  : limbs == 3 || p.kind == Int4Zeros::none ? 8
                                                                            : 0};
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

static void multiply_all(const Int4Problem& p, const Tensor& out) {
  check_on_cpu(p);
  float book[16];  // exact mode reads an int8 codebook as fp32
  const void* entries = data(p.codebook);
  if (entries && !p.int8 && p.codebook->scalar_type() == ScalarType::Char) {
    std::copy_n(static_cast<const int8_t*>(entries), 16, book);
    entries = book;
  }
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < out.dim(); ++dim) M *= out.size(dim);
  if (M == 0 || p.N == 0) return;
  const Rows rows(p.x);
  const int64_t stride = out.dim() > 1 ? out.stride(out.dim() - 2) : p.N;
  for (int64_t row = 0; row < M; row += kInt4Rows) {
    multiply(p, rows, row, std::min(kInt4Rows, M - row), entries, static_cast<char*>(out.data_ptr()), stride);
  }
}

void int4_linear_to(const Tensor& out, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                    const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias, int64_t group_size,
                    int64_t zero_kind, int64_t mode) {
  multiply_all(int4_problem(x, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode), out);
}

static Tensor int4_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                          const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias,
                          int64_t group_size, int64_t zero_kind, int64_t mode) {
  const Int4Problem p =
      int4_problem(x, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.N;
  const Tensor out = cpu_empty(x, shape);
  multiply_all(p, out);
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("int4_linear", TORCH_BOX(&scrimp::int4_linear)); }
