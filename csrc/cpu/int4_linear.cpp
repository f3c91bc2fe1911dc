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

static const void* offset(const void* from, int64_t bytes) {
  return from ? static_cast<const char*>(from) + bytes : nullptr;
}

// A weight with its place in the result.
struct Part {
  Form form;
  Int4Panel whole;  // the weight as one panel, for row 0, without x and scratch
  int64_t N, K, scale_bytes, zero_bytes;
  bool reads_book;
  float book[16] = {};  // exact mode reads an int8 codebook as fp32
  int64_t panels = 0;   // of `outputs`
  int64_t outputs = 0;
  size_t packed = 0;

  // Outputs from `first` on of those of `out`.
  Part(const Int4Problem& p, const Tensor& out, int64_t first) : form(p), N(p.N), K(p.K) {
    const int64_t groups = p.scales.size(1);
    scale_bytes = groups * p.scales.element_size();
    zero_bytes = p.zeros ? groups * p.zeros->element_size() : 0;
    reads_book = p.codebook && !p.int8 && p.codebook->scalar_type() == ScalarType::Char;
    if (reads_book) std::copy_n(static_cast<const int8_t*>(p.codebook->data_ptr()), 16, book);
    const auto* codes = static_cast<const uint8_t*>(p.qweight.data_ptr());
    const void *scales = p.scales.data_ptr(), *zeros = data(p.zeros);
    whole = {.x = nullptr,
             .outputs = N,
             .codes = codes,
             .codes_stride = K / 2,
             .codes_end = codes + N * (K / 2),
             .next = codes,
             .group = p.group,
             .scales = scales,
             .zeros = zeros,
             .scales_end = offset(scales, N * scale_bytes),
             .zeros_end = offset(zeros, N * zero_bytes),
             .scale_type = *float_type(p.scales),
             .byte_zeros = p.byte_zeros,
             .kind = p.kind,
             .codebook = data(p.codebook),
             .bias = data(p.bias),
             .out = static_cast<char*>(out.data_ptr()) + first * out.element_size(),
             .out_stride = out.size(out.dim() - 1),
             .type = *float_type(out),
             .scratch = nullptr};
  }

  // Outputs [n, n + outputs) for rows from `row` on; the thread is likely to need those from `next` on after them.
  Int4Panel panel(int64_t n, int64_t next, int64_t row, int64_t size, const Int4Rows& x, float* scratch) const {
    Int4Panel some = whole;
    some.x = &x;
    some.outputs = std::min(outputs, N - n);
    some.codes += n * some.codes_stride;
    some.next += std::min(next, N - 1) * some.codes_stride;
    some.scales = offset(some.scales, n * scale_bytes);
    some.zeros = offset(some.zeros, n * zero_bytes);
    if (reads_book) some.codebook = book;
    some.bias = offset(some.bias, n * size);
    some.out = static_cast<char*>(some.out) + (row * some.out_stride + n) * size;
    some.scratch = scratch;
    return some;
  }
};

// Rows [begin, begin + rows): x is packed once for all weights of a form, then panels of outputs are computed.
static void multiply(std::vector<Part>& parts, const Rows& x, int64_t begin, int64_t rows, int64_t size) {
  Memory memory;
  std::vector<Packed> packed;
  int64_t panels = 0, operations = 0, scratch_size = 0;
  for (Part& part : parts) {
    part.packed = 0;
    while (part.packed < packed.size() && !(packed[part.packed].form == part.form)) ++part.packed;
    if (part.packed == packed.size()) packed.emplace_back(part.form, rows, part.K, memory);
    part.outputs = rows == 1 && !part.form.limbs ? kInt4RowPanel : kInt4Panel;
    part.panels = (part.N + part.outputs - 1) / part.outputs;
    panels += part.panels;
    operations += 2 * rows * part.N * part.K;
    scratch_size = std::max(scratch_size, int4_scratch(packed[part.packed].rows));
  }
  const int64_t workers = worker_count(std::max(panels, rows), operations);
  const int64_t scratch = memory.reserve<float>(workers * scratch_size);
  memory.allocate();
  for (Packed& to : packed) to.place(memory);
  const auto scratch_of = [&](int64_t worker) { return memory.at<float>(scratch) + worker * scratch_size; };

  const auto pack = SCRIMP_VNNI_KERNEL(int4_pack);
  for (const Packed& to : packed) {
    for_each_item(rows, rows == 1 ? 1 : workers, [&](int64_t row, int64_t worker) {
      pack({.to = &to.rows,
            .row = row,
            .x = x.row(begin + row),
            .type = parts[0].whole.type,
            .permutation = static_cast<const int32_t*>(to.form.permutation),
            .scratch = scratch_of(worker)});
    });
  }

  const auto kernel = SCRIMP_VNNI_KERNEL(int4_panel);
  for_each_item(panels, std::min(workers, panels), [&](int64_t panel, int64_t worker) {
    const Part* part = parts.data();
    for (; panel >= part->panels; ++part) panel -= part->panels;
    const int64_t n = panel * part->outputs, next = n + workers * part->outputs;
    kernel(part->panel(n, next, begin, size, packed[part->packed].rows, scratch_of(worker)));
  });
}

// out: contiguous [.., N of all problems], which share their x.
static void multiply_all(const std::vector<Int4Problem>& problems, const Tensor& out) {
  std::vector<Part> parts;
  parts.reserve(problems.size());
  int64_t M = 1, N = 0;
  for (const Int4Problem& p : problems) {
    check_on_cpu(p);
    parts.emplace_back(p, out, N);
    N += p.N;
  }
  for (int64_t dim = 0; dim + 1 < out.dim(); ++dim) M *= out.size(dim);
  if (M == 0 || N == 0) return;
  const Rows rows(problems[0].x);
  const int64_t size = out.element_size();
  for (int64_t row = 0; row < M; row += kInt4Rows) {
    multiply(parts, rows, row, std::min(kInt4Rows, M - row), size);
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
