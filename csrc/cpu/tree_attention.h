// tree_attention on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

// One call. Strides count elements; the last dimension of q, k, v and out has stride 1.
struct TreeAttention {
  const void* q;  // [B, H, T, D]
  const void* k;  // [B, G, C, D], H % G == 0
  const void* v;  // [B, G, C, D]
  void* out;      // [B, H, T, D]
  float* lse;     // [B, H, T], contiguous
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  const int64_t* ancestors;  // [B, T]: bit j of word t: row t sees new row j; null: the chain j <= t
  int64_t ancestors_stride;  // from batch to batch
  int64_t window;            // 0, or row t of the chain sees only the last `window` keys
  int64_t n_heads, n_groups, n_rows, head_dim;
  float scale;
  bool bf16;  // q, k, v and out are bf16, else fp32
};

// Keys are added up by position: a cached key's is its slot, and the i-th new row that row t sees has position
// prefix + i. Positions are cut into splits and those into blocks, both of fixed size, so that the sums of a row are
// the same wherever its prefix ends and whatever the other rows see.
inline constexpr int64_t kSplitKeys = 512;
inline constexpr int64_t kBlockKeys = 64;

// The rows of one (batch, key/value head) at one split. The last split goes on to the new rows and with them, if need
// be, into a split behind it.
struct TreeSplit {
  int64_t batch, group, prefix;
  int64_t begin;  // first position
  bool last;
  float* states;  // of this split, and behind it of the next
};

}  // namespace scrimp

// Floats of 64-byte aligned scratch that one worker needs, and of the state of one split.
SCRIMP_DECLARE_KERNEL(int64_t tree_attention_scratch(const TreeAttention& call))
SCRIMP_DECLARE_KERNEL(int64_t tree_attention_state(const TreeAttention& call))
// Adds up the keys of a split.
SCRIMP_DECLARE_KERNEL(void tree_attention_split(const TreeAttention& call, const TreeSplit& split, float* scratch))
// Writes out and lse of one (batch, key/value head) from the states of its `splits` splits.
SCRIMP_DECLARE_KERNEL(void tree_attention_write(const TreeAttention& call, int64_t batch, int64_t group,
                                                const float* states, int64_t splits))
