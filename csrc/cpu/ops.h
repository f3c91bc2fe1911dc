// The CPU's ops as functions, for an op that is made of others. They check what they are given.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"

namespace scrimp {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensor silu_mul(const Tensor& gate, const Tensor& up);
Tensor gelu_mul(const Tensor& gate, const Tensor& up, bool tanh);
Tensor linear(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
              const std::optional<Tensor>& residual);
// A 4-bit weight as int4_linear takes it.
struct Int4WeightOf {
  const Tensor &qweight, &scales;
  const std::optional<Tensor>&zeros, &codebook, &permutation, &bias;
  int64_t group_size, zero_kind, mode;
};
// out: contiguous [.., N of all weights], their results side by side.
void int4_linear_to(const Tensor& out, const Tensor& x, const std::vector<Int4WeightOf>& weights);
Tensor rotary_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                     const Tensor& positions, const Tensor& start, const Tensor& k_cache, const Tensor& v_cache);
// kept: of the shape of x, contiguous; index: [K]; energy: [rows, 2]. Returns the count.
int64_t channel_select_to(const Tensor& kept, int32_t* index, float* energy, const Tensor& x, const Tensor& level,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& center,
                          const std::optional<Tensor>& whole, int64_t rule, bool common);
// Channels that a sparse product reads, ascending.
struct ChannelList {
  const int32_t* index;
  int64_t count;
};
// `out` [.., N] may be a slice of the last dimension of a contiguous tensor.
void sparse_linear_to(const Tensor& out, const Tensor& x, const Tensor& weight, ChannelList channels,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual);
// A 4-bit weight as int4_sparse_linear takes it.
struct Int4ChannelsOf {
  const Tensor &codes, &scales;
  const std::optional<Tensor>&zeros, &codebook, &permutation, &bias;
  int64_t group_size, zero_kind, mode;
};
// out: contiguous [.., N of all weights], their results side by side.
void int4_sparse_linear_to(const Tensor& out, const Tensor& x, const std::vector<Int4ChannelsOf>& weights,
                           ChannelList channels);
std::tuple<Tensor, Tensor> tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                          const Tensor& prefix, const std::optional<Tensor>& ancestors, int64_t window,
                                          double scale);

}  // namespace scrimp
