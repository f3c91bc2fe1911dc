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

// How a weight takes x; weights of one form share what is packed.
struct Form {
  int64_t limbs, block;
  int32_t center;
  const void* permutation;

  explicit Form(const Int4Problem& p) : permutation(data(p.permutation)) {
    limbs = p.int8 ? 1 : isa() == Isa::avx512vnni && !p.codebook ? 3 : 0;
    const int64_t most = limbs == 3 ? kInt4LimbBlock : kInt4Chunk;
    block = p.group == p.K ? most : std::min(p.group, most);
    center = p.codebook ? 128 : limbs == 3 || p.kind == Int4Zeros::none ? 8 : 0;
  }
  bool operator==(const Form&) const = default;
};

// Rows of x in one form.
struct Packed {
  Form form;
  Int4Rows rows;
  int64_t values, integers, sums, scales, starts, filled;

  Packed(const Form& wanted, int64_t count, int64_t columns, Memory& memory) : form(wanted) {
    const int64_t plane = (columns + kInt4Chunk - 1) / kInt4Chunk * count * kInt4Chunk;
    rows = {.rows = count,
            .columns = columns,
            .block = form.block,
            .limbs = form.limbs,
            .values = nullptr,
            .integers = nullptr,
            .plane = plane,
            .sums = nullptr,
            .scales = nullptr,
            .starts = nullptr,
            .center = form.center};
    filled = (columns + form.block - 1) / form.block * count;
    values = memory.reserve<float>(form.limbs ? 0 : plane);
    integers = memory.reserve<int8_t>(form.limbs * plane);
    sums = memory.reserve<float>(filled + kInt4Groups);
    scales = memory.reserve<float>(filled + kInt4Groups);
    starts = memory.reserve<int32_t>(filled + kInt4Groups);
  }

  void place(const Memory& memory) {
    rows.values = memory.at<float>(values);
    rows.integers = memory.at<int8_t>(integers);
    rows.sums = memory.at<float>(sums);
    rows.scales = memory.at<float>(scales);
    rows.starts = memory.at<int32_t>(starts);
    // Read with the last block: a denormal there would cost an assist.
    for (float* padded : {rows.sums, rows.scales}) std::fill_n(padded + filled, kInt4Groups, 0.0f);
  }
};

// A weight with its place in the result.
struct Part {
  const Int4Problem& p;
  int64_t first;       // of its outputs among all
  int64_t panels = 0;  // of `outputs`
  int64_t outputs = 0;
  size_t packed = 0;
  float book[16] = {};  // exact mode reads an int8 codebook as fp32

  const void* codebook() const {
    return p.codebook && !p.int8 && p.codebook->scalar_type() == ScalarType::Char ? book : data(p.codebook);
  }
};

// Rows [begin, begin + rows): x is packed once for all weights of a form, then panels of outputs are computed.
static void multiply(std::vector<Part>& parts, const Rows& x, int64_t begin, int64_t rows, char* out,
                     int64_t out_stride) {
  Memory memory;
  std::vector<Packed> packed;
  int64_t panels = 0, operations = 0, scratch_size = 0;
  for (Part& part : parts) {
    const Form form(part.p);
    part.packed = 0;
    while (part.packed < packed.size() && !(packed[part.packed].form == form)) ++part.packed;
    if (part.packed == packed.size()) packed.emplace_back(form, rows, part.p.K, memory);
    part.outputs = rows == 1 && !form.limbs ? kInt4RowPanel : kInt4Panel;
    part.panels = (part.p.N + part.outputs - 1) / part.outputs;
    panels += part.panels;
    operations += 2 * rows * part.p.N * part.p.K;
    scratch_size = std::max(scratch_size, int4_scratch(packed[part.packed].rows));
  }
  const int64_t workers = worker_count(std::max(panels, rows), operations);
  const int64_t scratch = memory.reserve<float>(workers * scratch_size);
  memory.allocate();
  for (Packed& to : packed) to.place(memory);
  const auto scratch_of = [&](int64_t worker) { return memory.at<float>(scratch) + worker * scratch_size; };

  const auto type = *float_type(parts[0].p.x);
  const auto pack = SCRIMP_VNNI_KERNEL(int4_pack);
  for (const Packed& to : packed) {
    for_each_item(rows, rows == 1 ? 1 : workers, [&](int64_t row, int64_t worker) {
      pack({.to = &to.rows,
            .row = row,
            .x = x.row(begin + row),
            .type = type,
            .permutation = static_cast<const int32_t*>(to.form.permutation),
            .scratch = scratch_of(worker)});
    });
  }

  const auto kernel = SCRIMP_VNNI_KERNEL(int4_panel);
  for_each_item(panels, std::min(workers, panels), [&](int64_t panel, int64_t worker) {
    const Part* part = parts.data();
    for (; panel >= part->panels; ++part) panel -= part->panels;
    const Int4Problem& p = part->p;
    const int64_t n = panel * part->outputs, next = std::min(n + workers * part->outputs, p.N - 1);
    const int64_t groups = p.scales.size(1), scale_size = p.scales.element_size(), x_size = p.x.element_size();
    const int64_t stride = p.K / 2, zero_size = p.zeros ? p.zeros->element_size() : 0;
    const auto* codes = static_cast<const uint8_t*>(p.qweight.data_ptr());
    const auto* scales = static_cast<const char*>(p.scales.data_ptr());
    const auto* zeros = static_cast<const char*>(data(p.zeros));
    const auto* bias = static_cast<const char*>(data(p.bias));
    kernel({.x = &packed[part->packed].rows,
            .outputs = std::min(part->outputs, p.N - n),
            .codes = codes + n * stride,
            .codes_stride = stride,
            .codes_end = codes + p.N * stride,
            .next = codes + next * stride,
            .group = p.group,
            .scales = scales + n * groups * scale_size,
            .zeros = zeros ? zeros + n * groups * zero_size : nullptr,
            .scales_end = scales + p.N * groups * scale_size,
            .zeros_end = zeros ? zeros + p.N * groups * zero_size : nullptr,
            .scale_type = *float_type(p.scales),
            .byte_zeros = p.byte_zeros,
            .kind = p.kind,
            .codebook = part->codebook(),
            .bias = bias ? bias + n * x_size : nullptr,
            .out = out + (begin * out_stride + part->first + n) * x_size,
            .out_stride = out_stride,
            .type = type,
            .scratch = scratch_of(worker)});
  });
}

// out: contiguous [.., N of all problems], which share their x.
static void multiply_all(const std::vector<Int4Problem>& problems, const Tensor& out) {
  std::vector<Part> parts;
  int64_t M = 1, N = 0;
  for (const Int4Problem& p : problems) {
    check_on_cpu(p);
    Part& part = parts.emplace_back(Part{.p = p, .first = N});
    if (part.codebook() == part.book) std::copy_n(static_cast<const int8_t*>(p.codebook->data_ptr()), 16, part.book);
    N += p.N;
  }
  for (int64_t dim = 0; dim + 1 < out.dim(); ++dim) M *= out.size(dim);
  if (M == 0 || N == 0) return;
  const Rows rows(problems[0].x);
  for (int64_t row = 0; row < M; row += kInt4Rows) {
    multiply(parts, rows, row, std::min(kInt4Rows, M - row), static_cast<char*>(out.data_ptr()), N);
  }
}

void int4_linear_to(const Tensor& out, const Tensor& x, const std::vector<Int4WeightOf>& weights) {
  std::vector<Int4Problem> problems;
  for (const Int4WeightOf& w : weights) {
    problems.push_back(int4_problem(x, w.qweight, w.scales, w.zeros, w.codebook, w.permutation, w.bias, w.group_size,
                                    w.zero_kind, w.mode));
  }
  multiply_all(problems, out);
}

static Tensor int4_linear(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                          const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                          const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias,
                          int64_t group_size, int64_t zero_kind, int64_t mode) {
  const std::vector<Int4Problem> problem{
      int4_problem(x, qweight, scales, zeros, codebook, permutation, bias, group_size, zero_kind, mode)};
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = problem[0].N;
  const Tensor out = cpu_empty(x, shape);
  multiply_all(problem, out);
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("int4_linear", TORCH_BOX(&scrimp::int4_linear)); }
