// sparse_attention, the order in which blocks of rows start: those with many keys first, so that none of them runs
// alone in the end. It does not show in results.
#pragma once

#include "cuda/sparse_attention.cuh"

namespace scrimp::cuda::sparse_attention {

constexpr int kClasses = 32, kOrderWarps = 32;

// Two classes for each power of two; blocks of a class stay in the order of heads, which share keys in the cache.
__device__ __forceinline__ int class_of(int steps) {
  const int halves = static_cast<int>(__float_as_uint(static_cast<float>(steps)) >> 22) - 2 * 127;
  return kClasses - 1 - min(max(halves, 0), kClasses - 1);
}

// Launched with a warp for every block of n_rows rows.
__global__ void __launch_bounds__(kThreads)
    sparse_attention_steps_kernel(const __grid_constant__ Arguments p, int n_rows, int n_blocks) {
  const int block = blockIdx.x * kWarps + threadIdx.x / 32;
  if (block >= n_blocks) return;
  const Rows rows = rows_of(p, block, n_rows);
  int steps = 0;
  if (rows.first < rows.count) {
    const Tile tile = tile_of(p, rows, n_rows);
    steps = Walk<32>{tile, max_of_warp(tile.n_ranges), max_of_warp(tile.n_columns)}.count();
  }
  if (threadIdx.x % 32 == 0) p.steps[block] = steps;
}

// Launched with one block, each warp of which places a share of the blocks. Their numbers by class and warp, added up
// in this order, say where.
__global__ void __launch_bounds__(32 * kOrderWarps)
    sparse_attention_order_kernel(const int32_t* __restrict__ steps, int32_t* __restrict__ order, int n_blocks) {
  __shared__ int32_t place[kOrderWarps][kClasses + 1], total[kClasses];  // one more: columns lie in different banks
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = (n_blocks + 32 * kOrderWarps - 1) / (32 * kOrderWarps) * 32;
  const int begin = warp * share, end = min(begin + share, n_blocks);
  place[warp][lane] = 0;
  __syncwarp();
#pragma unroll 1
  for (int i = begin + lane; i < end; i += 32) atomicAdd(&place[warp][class_of(steps[i])], 1);
  __syncthreads();

  const int mine = place[lane][warp];  // of class `warp`, in the share of warp `lane`
  int upto = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAll, upto, distance);
    if (lane >= distance) upto += before;
  }
  if (lane == 31) total[warp] = upto;
  __syncthreads();
  place[lane][warp] = __reduce_add_sync(kAll, lane < warp ? total[lane] : 0) + upto - mine;
  __syncthreads();

#pragma unroll 1
  for (int from = begin; from < end; from += 32) {
    const int i = from + lane, of = i < end ? class_of(steps[i]) : kClasses;
    const unsigned alike = __match_any_sync(kAll, of);
    const int before = __popc(alike & ((1u << lane) - 1));
    const int at = i < end ? place[warp][of] : 0;
    __syncwarp();
    if (i < end) order[at + before] = i;
    if (i < end && before == 0) place[warp][of] = at + __popc(alike);
    __syncwarp();
  }
}

}  // namespace scrimp::cuda::sparse_attention
