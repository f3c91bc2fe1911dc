// decoder_layers on the CPU: the ops of every layer called as functions, which saves the dispatcher nine calls a layer.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "common/memory.h"
#include "common/team.h"
#include "common/tensors.h"
#include "cpu/linear.h"
#include "cpu/ops.h"

namespace scrimp {

using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kParts = 7;                       // linear layers of a decoder layer: q, k, v, o, gate, up, down
constexpr int64_t kTensors = 6;                     // of a part: weight, bias, scales, zeros, codebook, permutation
constexpr int64_t kFormat = 3;                      // numbers of a part: group size (0: dense), zero kind, mode
constexpr int64_t kNorms = 4;                       // attention, q, k, mlp
constexpr int64_t kFirst[] = {0, 3, 4, 6, kParts};  // parts of the groups that share an input
constexpr int64_t kGroups = 4;
constexpr int64_t kSelection = 3;     // tensors of a group's choice of channels: level, scale, center
constexpr int64_t kRelativeRule = 1;  // of channel_select

// Parts that share their input.
struct Parts {
  const std::optional<Tensor>* tensors;    // [count, kTensors]
  const int64_t* formats;                  // [count, kFormat]
  const std::optional<Tensor>* selection;  // [kSelection], or null: all channels are read, and weights lie row-major
  int64_t count;

  bool is_dense() const { return formats[0] == 0; }
  bool is_sparse() const { return selection && selection[0]; }
  // The outputs of part i; 0 where an earlier one holds them.
  int64_t outputs(int64_t i) const {
    const auto* t = tensors + i * kTensors;
    if (!t[0]) return 0;
    return !is_sparse() ? t[0]->size(0) : is_dense() ? t[0]->size(1) : t[2]->size(1);
  }
};

// y += residual, both [B, T, N], of at most kLinearRows rows.
static void add(const Tensor& y, const Tensor& residual) {
  const int64_t rows = y.size(0) * y.size(1), N = y.size(2), size = y.element_size();
  const Tensor other = as_contiguous(residual);
  const void* at[kLinearRows];
  for (int64_t m = 0; m < rows; ++m) at[m] = static_cast<const char*>(other.data_ptr()) + m * N * size;
  SCRIMP_KERNEL(linear_add)
  ({.rows = rows,
    .inputs = 0,
    .outputs = N,
    .packed = nullptr,
    .weight = nullptr,
    .weight_stride = 0,
    .index = nullptr,
    .bias = nullptr,
    .residual = at,
    .residual_offset = 0,
    .out = y.data_ptr(),
    .out_stride = N,
    .bf16 = y.scalar_type() == torch::headeronly::ScalarType::BFloat16});
}

// Numbers [first, first + count) of every row of a contiguous x [B, T, N].
static Tensor slice(const Tensor& x, int64_t first, int64_t count) {
  const int64_t T = x.size(1), N = x.size(2);
  return as_strided(x, {x.size(0), T, count}, {T * N, N, 1}, first);
}

// The same as heads [B, T, count, D].
static Tensor heads_of(const Tensor& x, int64_t first, int64_t count, int64_t D) {
  const int64_t T = x.size(1), N = x.size(2);
  return as_strided(x, {x.size(0), T, count, D}, {T * N, N, D, 1}, first * D);
}

// The dense parts in full.
static Tensor apply_dense(const Parts& parts, const Tensor& x, const std::optional<Tensor>& residual) {
  std::vector<Tensor> weights;
  OptionalTensors biases;
  for (int64_t i = 0; i < parts.count; ++i) {
    weights.push_back(*parts.tensors[i * kTensors]);
    biases.push_back(parts.tensors[i * kTensors + 1]);
  }
  return linear(x, weights, biases, residual);
}

// Whether a selection keeps x as it is: its level is below every score.
static bool keeps_all(const std::optional<Tensor>* selection) {
  const Tensor& level = *selection[0];
  const bool is_number = level.is_cpu() && level.scalar_type() == torch::headeronly::ScalarType::Float &&
                         level.dim() == 1 && level.size(0) == 1;
  return is_number && *static_cast<const float*>(level.data_ptr()) < 0 && !selection[1] && !selection[2];
}

// The parts for the channels of x that matter, into out.
static void apply_sparse(const Parts& parts, const Tensor& x, const std::optional<Tensor>& residual,
                         const Tensor& out) {
  const auto* s = parts.selection;
  const bool all = keeps_all(s);
  const int64_t K = x.size(2);
  const Tensor kept = all ? x : cpu_empty(x, x.sizes());
  Memory memory;
  const int64_t index_at = memory.reserve<int32_t>(K), energy = memory.reserve<float>(2 * x.size(0) * x.size(1));
  memory.allocate();
  int32_t* const index = memory.at<int32_t>(index_at);
  if (all) std::iota(index, index + K, 0);
  const ChannelList channels{index, all ? K
                                        : channel_select_to(kept, index, memory.at<float>(energy), x, *s[0], s[1], s[2],
                                                            std::nullopt, kRelativeRule, /*common=*/false)};
  std::vector<Int4ChannelsOf> weights;
  for (int64_t i = 0, first = 0; i < parts.count; ++i) {
    const auto* t = parts.tensors + i * kTensors;
    const auto* f = parts.formats + i * kFormat;
    if (!t[0]) continue;
    if (parts.is_dense()) {
      const int64_t outputs = parts.outputs(i);
      sparse_linear_to(slice(out, first, outputs), kept, *t[0], channels, t[1], residual);
      first += outputs;
    } else {
      weights.push_back({*t[0], *t[2], t[3], t[4], t[5], t[1], f[0], f[1], f[2]});
    }
  }
  if (!parts.is_dense()) int4_sparse_linear_to(out, kept, weights, channels);
}

// The 4-bit parts in full, into out.
static void apply_int4(const Parts& parts, const Tensor& x, const Tensor& out) {
  std::vector<Int4WeightOf> weights;
  for (int64_t i = 0; i < parts.count; ++i) {
    const auto* t = parts.tensors + i * kTensors;
    const auto* f = parts.formats + i * kFormat;
    weights.push_back({*t[0], *t[2], t[3], t[4], t[5], t[1], f[0], f[1], f[2]});
  }
  int4_linear_to(out, x, weights);
}

// x [B, T, K] -> [B, T, sum of the parts' outputs]; all parts dense, or all 4-bit.
static Tensor apply(const Parts& parts, const Tensor& x, const std::optional<Tensor>& residual) {
  if (parts.is_dense() && !parts.is_sparse()) return apply_dense(parts, x, residual);
  int64_t N = 0;
  for (int64_t i = 0; i < parts.count; ++i) N += parts.outputs(i);
  Tensor out = cpu_empty(x, {x.size(0), x.size(1), N});
  parts.is_sparse() ? apply_sparse(parts, x, residual, out) : apply_int4(parts, x, out);
  if (residual && !parts.is_dense()) add(out, *residual);
  return out;
}

static Tensor activate(int64_t activation, const Tensor& gate, const Tensor& up) {
  return activation == 0 ? silu_mul(gate, up) : gelu_mul(gate, up, activation == 2);
}

static void check(const Tensor& x, const OptionalTensors& norms, const std::vector<double>& eps,
                  const OptionalTensors& linears, const std::vector<int64_t>& formats,
                  const OptionalTensors& selections, const std::vector<Tensor>& k_caches,
                  const std::vector<Tensor>& v_caches, const std::vector<int64_t>& windows, int64_t heads,
                  int64_t activation) {
  const size_t layers = k_caches.size();
  SCRIMP_CHECK(x.dim() == 3, "decoder_layers: x must be [B, T, d], got ", shape_text(x));
  SCRIMP_CHECK(x.size(0) * x.size(1) <= kLinearRows, "decoder_layers: x has ", x.size(0) * x.size(1),
               " rows; up to 64 can be computed together");
  SCRIMP_CHECK(norms.size() == layers * kNorms && eps.size() == layers * kNorms, "decoder_layers: ", norms.size(),
               " norms and ", eps.size(), " eps for ", layers, " layers; there must be 4 each");
  SCRIMP_CHECK(linears.size() == layers * kParts * kTensors && formats.size() == layers * kParts * kFormat,
               "decoder_layers: ", linears.size(), " tensors and ", formats.size(), " numbers of linear layers for ",
               layers, " layers; there must be 42 and 21 each");
  SCRIMP_CHECK(selections.empty() || selections.size() == layers * kGroups * kSelection,
               "decoder_layers: ", selections.size(), " selections for ", layers,
               " layers; there must be 12 each, or none");
  SCRIMP_CHECK(v_caches.size() == layers && windows.size() == layers, "decoder_layers: ", layers, " key caches, ",
               v_caches.size(), " value caches, ", windows.size(), " windows");
  SCRIMP_CHECK(heads > 0, "decoder_layers: heads=", heads, " must be at least 1");
  SCRIMP_CHECK(0 <= activation && activation <= 2, "decoder_layers: activation=", activation, " must be 0, 1 or 2");
  for (size_t i = 0; i < layers; ++i) {
    SCRIMP_CHECK(norms[i * kNorms] && norms[i * kNorms + 3], "decoder_layers: a norm of layer ", i, " is missing");
    SCRIMP_CHECK(k_caches[i].dim() == 4, "decoder_layers: k_caches[", i, "] must be [B, G, C, D], got ",
                 shape_text(k_caches[i]));
    for (int64_t part = 0, group = 0; part < kParts; ++part) {
      group += part == kFirst[group + 1];
      const bool first = part == kFirst[group];
      const auto* tensors = linears.data() + (i * kParts + part) * kTensors;
      const auto* format = formats.data() + (i * kParts + part) * kFormat;
      if (!first && !tensors[0] && !selections.empty() && selections[(i * kGroups + group) * kSelection]) continue;
      const bool dense = format[0] == 0;
      SCRIMP_CHECK(tensors[0] && tensors[0]->dim() == 2 && (dense || (tensors[2] && tensors[2]->dim() == 2)),
                   "decoder_layers: part ", part, " of layer ", i, " has no weight [N, K], or no scales");
      SCRIMP_CHECK(0 <= format[1] && format[1] <= 3 && (format[2] == 0 || format[2] == 1),
                   "decoder_layers: zero_kind=", format[1], " or mode=", format[2], " of layer ", i, " is unknown");
      SCRIMP_CHECK(dense == (format[(kFirst[group] - part) * kFormat] == 0), "decoder_layers: parts ", kFirst[group],
                   " and ", part, " of layer ", i, " must both be dense, or both 4-bit");
    }
  }
}

static Tensor decoder_layers(const Tensor& hidden, const OptionalTensors& norms, const std::vector<double>& eps,
                             const OptionalTensors& linears, const std::vector<int64_t>& formats,
                             const OptionalTensors& selections, const Tensor& cos, const Tensor& sin,
                             const Tensor& positions, const Tensor& start, const Tensor& prefix,
                             const std::optional<Tensor>& ancestors, const std::vector<Tensor>& k_caches,
                             const std::vector<Tensor>& v_caches, const std::vector<int64_t>& windows, int64_t heads,
                             int64_t activation, double scale) {
  check(hidden, norms, eps, linears, formats, selections, k_caches, v_caches, windows, heads, activation);
  if (k_caches.empty()) return torch::stable::clone(hidden);
  const int64_t B = hidden.size(0), T = hidden.size(1);
  Tensor x = hidden;
  const auto layer = [&](size_t i) {
    const auto parts = [&](int64_t group) -> Parts {
      const int64_t first = i * kParts + kFirst[group];
      return {.tensors = linears.data() + first * kTensors,
              .formats = formats.data() + first * kFormat,
              .selection = selections.empty() ? nullptr : selections.data() + (i * kGroups + group) * kSelection,
              .count = kFirst[group + 1] - kFirst[group]};
    };
    const auto norm = [&](const Tensor& of, int64_t which) {
      const auto& weight = norms[i * kNorms + which];
      return weight ? rms_norm(of, *weight, eps[i * kNorms + which]) : of;
    };
    const int64_t G = k_caches[i].size(1), D = k_caches[i].size(3);
    const Tensor qkv = apply(parts(0), norm(x, 0), std::nullopt);
    SCRIMP_CHECK(qkv.size(2) == (heads + 2 * G) * D, "decoder_layers: layer ", i, " gives ", qkv.size(2),
                 " numbers for ", heads, " and ", G, " heads of ", D);
    const Tensor q = norm(heads_of(qkv, 0, heads, D), 1), k = norm(heads_of(qkv, heads, G, D), 2);
    const Tensor v = heads_of(qkv, heads + G, G, D);
    const Tensor turned = rotary_append(q, k, v, cos, sin, positions, start, k_caches[i], v_caches[i]);
    const Tensor seen =
        std::get<0>(tree_attention(turned, k_caches[i], v_caches[i], prefix, ancestors, windows[i], scale));
    const Tensor joined = as_strided(seen, {B, T, heads * D}, {T * heads * D, heads * D, 1}, 0);
    x = apply(parts(1), joined, x);
    const Tensor gate_up = apply(parts(2), norm(x, 3), std::nullopt);
    const int64_t half = gate_up.size(2) / 2;
    x = apply(parts(3), activate(activation, slice(gate_up, 0, half), slice(gate_up, half, half)), x);
  };
  Team::run([&] {
    for (size_t i = 0; i < k_caches.size(); ++i) layer(i);
  });
  return x;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("decoder_layers", TORCH_BOX(&scrimp::decoder_layers)); }
