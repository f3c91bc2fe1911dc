// vertical_slash_index on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One call. Strides count elements; the last dimension of q and k has stride 1.
struct VerticalSlashIndex {
  const void* q;  // [B, H, n_q, D]
  const void* k;  // [B, G, n_k, D], H % G == 0
  int64_t q_strides[3], k_strides[3];
  const int32_t* window;   // [H], not negative
  const int32_t* columns;  // [H], not negative

  // The plan: T tiles of q_block queries, S segments.
  int32_t* ranges;        // [B, H, 2 T, 2]
  int32_t* range_slice;   // [B, H, T, 2]
  int32_t* chosen;        // [B, H, S max_columns]
  int32_t* column_slice;  // [B, H, T, 2]

  int64_t n_heads, n_groups, n_q, n_k, head_dim, tiles, segments;
  int64_t max_columns, sinks, segment, samples, q_block, q_offset;
  int64_t segment_lanes;  // lanes of a segment's rows: 16, 32, 48 or 64, which takes several turns for more rows
  float scale;
  bool bf16;  // q and k are bf16, else fp32
};

// Segments of one head whose sampled rows share kSampleLanes lanes.
struct SegmentGroup {
  int64_t batch, head, first_segment, segments;
};

inline constexpr int64_t kSampleLanes = 64;

}  // namespace scrimp

// Floats of 64-byte aligned scratch that one worker needs.
SCRIMP_DECLARE_KERNEL(int64_t vertical_slash_index_scratch(const VerticalSlashIndex& call))
// Writes the plan of the group's segments.
SCRIMP_DECLARE_KERNEL(void vertical_slash_index_group(const VerticalSlashIndex& call, const SegmentGroup& group,
                                                      float* scratch))
