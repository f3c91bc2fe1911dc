// sparse_attention on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One call. Strides count elements; the last dimension of q, k, v and out has stride 1.
struct SparseAttention {
  const void* q;  // [B, H, n_q, D]
  const void* k;  // [B, G, n_k, D], H % G == 0
  const void* v;  // [B, G, n_k, D]
  void* out;      // [B, H, n_q, D]
  float* lse;     // [B, H, n_q], contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];

  // The plan, broadcast over batch and heads by strides of 0.
  const int32_t* ranges;        // [B, H, R, 2]
  const int32_t* range_slice;   // [B, H, T, 2]: (first, count) in the head's ranges
  const int32_t* columns;       // [B, H, C]
  const int32_t* column_slice;  // [B, H, T, 2]: (first, count) in the head's columns
  int64_t ranges_strides[2], range_slice_strides[2], columns_strides[2], column_slice_strides[2];
  const int32_t* row_start;  // [B, n_q]: row i sees keys from row_start[b, i] on; or null
  int64_t row_start_stride;

  int64_t n_heads, n_groups, n_q, n_k, head_dim;
  int64_t q_block, q_offset;
  float scale;
  bool causal;
  bool bf16;  // q, k, v and out are bf16, else fp32
};

// Up to kQueryLanes queries of one plan tile.
struct QueryTile {
  int64_t batch, head, first_query, queries;
};

inline constexpr int64_t kQueryLanes = 64;

}  // namespace scrimp

// Floats of 64-byte aligned scratch that one worker needs.
SCRIMP_DECLARE_KERNEL(int64_t sparse_attention_scratch(const SparseAttention& call))
// Writes out and lse of one tile.
SCRIMP_DECLARE_KERNEL(void sparse_attention_tile(const SparseAttention& call, const QueryTile& tile, float* scratch))
