// sparse_attention: what the launchers of every device check before they touch memory.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "common/check.h"

namespace scrimp {

// `length` is the size of dimension 2, or -1 for any.
inline void check_plan_tensor(const char* name, const Tensor& tensor, const Tensor& q, int64_t dim, int64_t length) {
  SCRIMP_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int, "sparse_attention: ", name,
               " must be int32");
  bool fits = tensor.dim() == dim;
  for (int i = 0; fits && i < 2; ++i) fits = tensor.size(i) == 1 || tensor.size(i) == q.size(i);
  fits = fits && (length < 0 || tensor.size(2) == length) && (dim == 3 || tensor.size(3) == 2);
  SCRIMP_CHECK(fits, "sparse_attention: ", name, " has shape ", shape_text(tensor), ", which does not fit q ",
               shape_text(q), length < 0 ? "" : " and its number of tiles, ", length < 0 ? "" : std::to_string(length));
}

// Devices and dtypes of q, k and v are the launcher's own, and so are the values of the plan.
inline void check_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges,
                                   const Tensor& range_slice, const Tensor& columns, const Tensor& column_slice,
                                   const std::optional<Tensor>& row_start, int64_t q_block, int64_t q_offset,
                                   double scale) {
  for (const auto& [name, tensor] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    SCRIMP_CHECK(tensor->dim() == 4, "sparse_attention: ", name, " must be [B, H, N, D], got ", shape_text(*tensor));
    SCRIMP_CHECK(tensor->scalar_type() == q.scalar_type(), "sparse_attention: ", name, " and q differ in dtype");
  }
  const int64_t H = q.size(1), G = k.size(1), n_q = q.size(2), n_k = k.size(2);
  for (int i = 0; i < 4; ++i)
    SCRIMP_CHECK(k.size(i) == v.size(i) && (i == 1 || i == 2 || k.size(i) == q.size(i)), "sparse_attention: shapes q ",
                 shape_text(q), ", k ", shape_text(k), ", v ", shape_text(v), " do not fit together");
  SCRIMP_CHECK(G == 0 ? H == 0 : H % G == 0, "sparse_attention: ", H, " query heads are not a multiple of ", G,
               " key/value heads");
  SCRIMP_CHECK(q.size(3) <= 256, "sparse_attention: head size D=", q.size(3), " is above 256");
  constexpr int64_t far = int64_t{1} << 31;
  SCRIMP_CHECK(n_q < far && n_k < far, "sparse_attention: n_q=", n_q, " or n_k=", n_k, " does not fit int32");
  SCRIMP_CHECK(-far < q_offset && q_offset < far, "sparse_attention: q_offset=", q_offset, " does not fit int32");
  SCRIMP_CHECK(q_block >= 1 && q_block < far, "sparse_attention: q_block=", q_block, " must be at least 1");
  SCRIMP_CHECK(std::isfinite(scale), "sparse_attention: scale=", scale, " must be finite");
  const int64_t tiles = (n_q + q_block - 1) / q_block;
  check_plan_tensor("ranges", ranges, q, 4, -1);
  check_plan_tensor("range_slice", range_slice, q, 4, tiles);
  check_plan_tensor("columns", columns, q, 3, -1);
  check_plan_tensor("column_slice", column_slice, q, 4, tiles);
  if (!row_start) return;
  SCRIMP_CHECK(row_start->scalar_type() == torch::headeronly::ScalarType::Int,
               "sparse_attention: row_start must be int32");
  SCRIMP_CHECK(row_start->dim() == 2 && (row_start->size(0) == 1 || row_start->size(0) == q.size(0)) &&
                   row_start->size(1) == n_q,
               "sparse_attention: row_start has shape ", shape_text(*row_start), ", which does not fit q ",
               shape_text(q));
}

}  // namespace scrimp
