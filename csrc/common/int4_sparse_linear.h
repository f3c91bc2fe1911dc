// int4_sparse_linear: what the launchers of every device check before they touch memory.
#pragma once

#include <initializer_list>
#include <optional>

#include "common/check.h"
#include "common/float_dtype.h"
#include "common/int4.h"
#include "common/int4_tile.h"

namespace scrimp {

inline void check_int4_tensor(const char* name, const Tensor& tensor, torch::headeronly::ScalarType dtype,
                              std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape.begin()[i];
  SCRIMP_CHECK(same, "int4_sparse_linear: ", name, " has shape ", shape_text(tensor), ", which does not fit");
  SCRIMP_CHECK(tensor.scalar_type() == dtype, "int4_sparse_linear: ", name, " has a dtype that does not fit");
}

// Shapes and types of x [.., inputs] and of a weight; devices, the dtype of x and the values of a permutation are the
// launcher's own.
inline void check_int4_channels(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                                const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias,
                                int64_t group, Int4Zeros kind, bool byte_zeros, bool int8) {
  using torch::headeronly::ScalarType;
  const int64_t K = codes.size(0), N = scales.size(1), inputs = x.size(x.dim() - 1);
  SCRIMP_CHECK(float_type(scales), "int4_sparse_linear: scales must be float32, bfloat16 or float16");
  SCRIMP_CHECK(group > 0 && K % group == 0 && (group == K || group == 16 || group == 32 || group == 64 || group == 128),
               "int4_sparse_linear: group_size=", group, " must be 16, 32, 64, 128 or K=", K, " and divide it");
  const int64_t groups = K / group;
  check_int4_tensor("codes", codes, ScalarType::Byte, {K, (N + kInt4Tile - 1) / kInt4Tile * kInt4Tile / 2});
  check_int4_tensor("scales", scales, scales.scalar_type(), {groups, N});
  SCRIMP_CHECK(zeros.has_value() == (kind != Int4Zeros::none), "int4_sparse_linear: zeros do not fit zero_kind");
  if (zeros) check_int4_tensor("zeros", *zeros, byte_zeros ? ScalarType::Byte : scales.scalar_type(), {groups, N});
  if (codebook) {
    SCRIMP_CHECK(!zeros, "int4_sparse_linear: a codebook takes no zeros");
    const bool wide = !int8 && codebook->scalar_type() == ScalarType::Float;
    check_int4_tensor("codebook", *codebook, wide ? ScalarType::Float : ScalarType::Char, {16});
  }
  SCRIMP_CHECK(permutation ? inputs <= K : inputs == K, "int4_sparse_linear: x has ", inputs,
               " inputs, but the weight ", K);
  if (permutation) check_int4_tensor("permutation", *permutation, ScalarType::Int, {K});
  if (bias) check_int4_tensor("bias", *bias, x.scalar_type(), {N});
}

}  // namespace scrimp
