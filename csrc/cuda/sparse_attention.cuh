// sparse_attention, the kernels: a block of rows of a plan's tile attends to the tile's keys, or to a split of them;
// the splits of a row are merged.
#pragma once

#include "cuda/sparse_attention.parts.cuh"

namespace scrimp::cuda::sparse_attention {

__device__ __forceinline__ Rows rows_of(const Arguments& p, uint32_t block, int n_rows) {
  const uint32_t parts = (p.q_block * p.group + n_rows - 1) / n_rows, tiles = (p.n_q + p.q_block - 1) / p.q_block;
  const uint32_t heads = block / (tiles * parts), lanes = p.H / p.group;
  block = tiles * parts - 1 - block % (tiles * parts);  // the last have the most keys where a plan is causal
  const int tile = block / parts, first = block % parts * n_rows;
  const int head = heads % lanes * p.group, b = heads / lanes;
  return {b, head, tile, first, min(p.q_block, p.n_q - tile * p.q_block) * p.group};
}

// The slice of a list that belongs to a tile, clamped to the list.
template <class Value>
__device__ __forceinline__ const Value* slice_of(const List& list, const Rows& rows, const Arguments& p, int& count) {
  const int64_t h = rows.head / p.group;
  const int32_t* slice = list.slices + rows.b * list.slices_b + h * list.slices_h + int64_t{2} * rows.tile;
  const int capacity = static_cast<int>(list.capacity), first = min(max(slice[0], 0), capacity);
  count = min(max(slice[1], 0), capacity - first);
  return reinterpret_cast<const Value*>(list.values + rows.b * list.values_b + h * list.values_h) + first;
}

__device__ __forceinline__ Tile tile_of(const Arguments& p, const Rows& rows, int n_rows) {
  Tile tile;
  tile.ranges = slice_of<int2>(p.ranges, rows, p, tile.n_ranges);
  tile.columns = slice_of<int32_t>(p.columns, rows, p, tile.n_columns);
  tile.safe_high = max(min(rows.token(p, 0) + p.q_offset + 1, p.n_k), 0);
  tile.high = max(min(rows.token(p, n_rows - 1) + p.q_offset + 1, p.n_k), 0);
  tile.low = tile.safe_low = 0;
  if (p.row_start) {
    int low = INT32_MAX, safe_low = 0;
#pragma unroll
    for (int row = 0; row < n_rows; row += 32) {
      const int start = p.row_start[rows.b * p.row_start_b + rows.token(p, row + threadIdx.x % 32)];
      low = min(low, start);
      safe_low = max(safe_low, start);
    }
    tile.low = max(min_of_warp(low), 0);
    tile.safe_low = max_of_warp(safe_low);
  }
  return tile;
}

// Launched with a block for every kRows rows of every tile, of every head or group of heads that share a plan; and for
// every split of their keys.
template <class T, int D, int kTiles>
__global__ void __launch_bounds__(kThreads, 4 - kTiles) sparse_attention_kernel(const __grid_constant__ Arguments p) {
  using Size = Sizes<D, kTiles>;
  constexpr int kKeys = Size::kKeys, kChunks = Size::kChunks, kRowsOfWarp = 16 * kTiles, kKeysOfWarp = kKeys / kWarps;
  extern __shared__ __align__(128) unsigned char memory[];
  T* const numbers = reinterpret_cast<T*>(memory);
  int32_t* const keys = reinterpret_cast<int32_t*>(memory + Size::kStep);  // of every stage
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Place& place = reinterpret_cast<Place*>(memory + Size::kPlace)[warp];
  {
    const Rows rows = rows_of(p, p.order ? p.order[blockIdx.x] : blockIdx.x, Size::kRows);
    if (rows.first >= rows.count) return;
    const Tile tile = tile_of(p, rows, Size::kRows);
    if (lane == 0) place = {rows, tile};
    __syncwarp();
  }
  const Rows& rows = place.rows;

  // Each warp copies its own rows of q.
  T* const query = numbers + Size::kQuery + warp * kRowsOfWarp * D;
  const T* q = static_cast<const T*>(p.q) + rows.b * p.q_strides.b + rows.head * p.q_strides.h;
#pragma unroll
  for (int i = lane; i < kRowsOfWarp * kChunks; i += 32) {
    const int row = i / kChunks, r = min(rows.first + warp * kRowsOfWarp + row, rows.count - 1);
    const int64_t token = rows.tile * p.q_block + r / p.group;
    const T* from = q + token * p.q_strides.n + r % p.group * p.q_strides.h + i % kChunks * 8;
    ptx::copy_async(query + swizzled<D>(row, i % kChunks), from);
  }
  ptx::commit_copies();

  Walk<kKeys> walk{place.tile, max_of_warp(place.tile.n_ranges), max_of_warp(place.tile.n_columns)};
  if (p.splits > 1) {
    const int share = max((walk.count() + p.splits - 1) / p.splits, kLeastSteps);
    walk.limit(share * blockIdx.y, share);
  }
  const int64_t kv_head = rows.head / p.shared_by;
  const T* const k = static_cast<const T*>(p.k) + rows.b * p.k_strides.b + kv_head * p.k_strides.h;
  const T* const v = static_cast<const T*>(p.v) + rows.b * p.v_strides.b + kv_head * p.v_strides.h;
  // Starts to copy the keys of the next step. Of the result, bit 1 says that there are some, bit 0 that some row does
  // not see all of them.
  const auto fetch = [&](int slot) {
    int key[Walk<kKeys>::kOwn];
    unsigned found = 0;
    if (walk.next(key)) {
      bool unsafe = false;
#pragma unroll
      for (const int one : key) unsafe |= one < walk.tile.safe_low || one >= walk.tile.safe_high;
      found = __any_sync(kAll, unsafe) ? 3 : 2;
      if (found == 3 && warp == 0)
#pragma unroll
        for (int j = 0; j < Walk<kKeys>::kOwn; ++j) keys[slot * kKeys + 32 * j + lane] = key[j];
      const int mine = key[0], last = key[Walk<kKeys>::kOwn - 1];
      const int held = warp * kKeysOfWarp < 32 ? mine : last;  // this warp's keys are among these
#pragma unroll
      for (int i = 0; i < kKeysOfWarp; i += 32 / kChunks) {
        const int row = warp * kKeysOfWarp + i + lane / kChunks, chunk = lane % kChunks;
        const int of = __shfl_sync(kAll, held, row % 32);
        const bool inside = of != kHidden;
        const int64_t from = inside ? of : 0;
        T* to = numbers + slot * Size::kStageNumbers + swizzled<D>(row, chunk);
        ptx::copy_async(to, k + from * p.k_strides.n + chunk * 8, inside);
        ptx::copy_async(to + kKeys * D, v + from * p.v_strides.n + chunk * 8, inside);
      }
    }
    ptx::commit_copies();
    return found;
  };
  unsigned steps = 0;  // what fetch said of the steps to come, the next one on top
#pragma unroll
  for (int slot = 0; slot < kStages - 1; ++slot) steps = steps << 2 | fetch(slot);

  ptx::wait_copies<kStages - 1>();
  __syncwarp();
  if (p.negative)  // so that the largest product is the largest score
    for (int i = lane; i < kRowsOfWarp * D / 2; i += 32) reinterpret_cast<uint32_t*>(query)[i] ^= 0x80008000;
  __syncwarp();
  uint32_t held[D / 16][4];
  if constexpr (kTiles == 1)
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      ptx::load_matrices(held[step], query + swizzled<D>(lane % 16, 2 * step + lane / 16));
  const int first_token = rows.token(p, 0);
  int tokens[kTiles];  // behind the first, of this lane's rows; two in a register
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int row = warp * kRowsOfWarp + tile * 16 + lane / 4;
    tokens[tile] = (rows.token(p, row) - first_token) | (rows.token(p, row + 8) - first_token) << 16;
  }

  State state[kTiles];
  float sums[kTiles][D / 8][4] = {};
#pragma unroll 1
  for (int slot = 0; steps & 8; slot = slot == kStages - 1 ? 0 : slot + 1) {
    const bool masked = steps & 4;
    ptx::wait_copies<kStages - 2>();
    __syncthreads();  // the keys are there, and all warps are done with the stage that is filled now
    steps = (steps << 2 | fetch(slot == 0 ? kStages - 1 : slot - 1)) & 15;
    const T* const stage = numbers + slot * Size::kStageNumbers;
    float score[kTiles][kKeys / 8][4] = {};
    score_keys<T, D, kTiles>(held, query, stage, score);
    if (masked)
#pragma unroll
      for (int row = 0; row < 2 * kTiles; ++row) {
        const int token = first_token + (tokens[row / 2] >> row % 2 * 16 & 0xFFFF);
        const int last = token + p.q_offset, first = p.row_start ? p.row_start[rows.b * p.row_start_b + token] : 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const int2 key = *reinterpret_cast<const int2*>(keys + slot * kKeys + n * 8 + lane % 4 * 2);
          float* const two = score[row / 2][n] + row % 2 * 2;
          if (key.x < first || key.x > last) two[0] = -INFINITY;
          if (key.y < first || key.y > last) two[1] = -INFINITY;
        }
      }
    uint32_t weights[kTiles][kKeys / 16][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float past[2];
      weigh<T, kKeys>(score[tile], state[tile], p.scale, weights[tile], past);
      if (__any_sync(kAll, past[0] != 1 || past[1] != 1))
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][n][i] *= past[i / 2];
    }
    add_values<T, D, kTiles>(weights, stage + kKeys * D, sums);
  }
  if (p.splits > 1) {
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const int h = row % 2, r = rows.first + warp * kRowsOfWarp + row / 2 * 16 + h * 8 + lane / 4;
      const float total = sum_of_quad(state[row / 2].total[h]), inverse = total == 0 ? 0 : 1 / total;
      if (r >= rows.count) continue;
      const int64_t token = rows.tile * p.q_block + r / p.group, head = rows.head + r % p.group, b = rows.b;
      float* const to = p.partial + (blockIdx.y * p.n_rows + (b * p.n_q + token) * p.H + head) * D + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(to + n * 8) = {sums[row / 2][n][2 * h] * inverse,
                                                  sums[row / 2][n][2 * h + 1] * inverse};
      if (lane % 4 == 0)
        p.partial_lse[blockIdx.y * p.n_rows + (b * p.H + head) * p.n_q + token] =
            total == 0 ? -INFINITY : state[row / 2].top[h] + log2f(total);
    }
    return;
  }
  __syncthreads();  // all warps are done with the stages, which now hold results

  T* const result = numbers + warp * kRowsOfWarp * D;
#pragma unroll
  for (int row = 0; row < 2 * kTiles; ++row) {
    const State& of = state[row / 2];
    const int h = row % 2, in_warp = row / 2 * 16 + h * 8 + lane / 4, r = rows.first + warp * kRowsOfWarp + in_warp;
    const float total = sum_of_quad(of.total[h]), inverse = total == 0 ? 0 : 1 / total;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      T* const two = result + swizzled<D>(in_warp, n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(two) =
          ptx::pack<T>(sums[row / 2][n][2 * h] * inverse, sums[row / 2][n][2 * h + 1] * inverse);
    }
    if (lane % 4 == 0 && r < rows.count)
      p.lse[(int64_t{rows.b} * p.H + rows.head + r % p.group) * p.n_q + rows.tile * p.q_block + r / p.group] =
          total == 0 ? -INFINITY : of.top[h] * 0.69314718f + logf(total);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kRowsOfWarp * kChunks; i += 32) {
    const int row = i / kChunks, r = rows.first + warp * kRowsOfWarp + row;
    if (r >= rows.count) break;
    const int64_t token = int64_t{rows.b} * p.n_q + rows.tile * p.q_block + r / p.group;
    T* const to = static_cast<T*>(p.out) + (token * p.H + rows.head + r % p.group) * D;
    reinterpret_cast<uint4*>(to)[i % kChunks] = *reinterpret_cast<const uint4*>(result + swizzled<D>(row, i % kChunks));
  }
}

// Launched with a warp for every row: its splits are added up in their order.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) sparse_attention_merge_kernel(const __grid_constant__ Arguments p) {
  constexpr int kOwn = D / 32;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;  // as [B, n_q, H]
  if (row >= p.n_rows) return;
  const int64_t b = row / p.H / p.n_q, at = (b * p.H + row % p.H) * p.n_q + row / p.H % p.n_q;  // as [B, H, n_q]
  const float mine = lane < p.splits ? p.partial_lse[lane * p.n_rows + at] : -INFINITY;
  float top = fmaxf(mine, kLowest);
#pragma unroll
  for (int distance = 16; distance; distance /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, distance));
  const float weight = ptx::exp2_approximate(mine - top);
  float total = weight;
#pragma unroll
  for (int distance = 16; distance; distance /= 2) total += __shfl_xor_sync(kAll, total, distance);
  float sums[kOwn] = {};
  for (int split = 0; split < p.splits; ++split) {
    const float of = __shfl_sync(kAll, weight, split);
    if (of == 0) continue;
    const float* from = p.partial + (split * p.n_rows + row) * D + lane * kOwn;
    if constexpr (kOwn == 4) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
      sums[0] = fmaf(of, four.x, sums[0]);
      sums[1] = fmaf(of, four.y, sums[1]);
      sums[2] = fmaf(of, four.z, sums[2]);
      sums[3] = fmaf(of, four.w, sums[3]);
    } else {
      const float2 two = __ldcs(reinterpret_cast<const float2*>(from));
      sums[0] = fmaf(of, two.x, sums[0]);
      sums[1] = fmaf(of, two.y, sums[1]);
    }
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  uint32_t* const to = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + row * D) + lane * (kOwn / 2);
#pragma unroll
  for (int i = 0; i < kOwn / 2; ++i) to[i] = ptx::pack<T>(sums[2 * i] * inverse, sums[2 * i + 1] * inverse);
  if (lane == 0) p.lse[at] = total == 0 ? -INFINITY : (top + log2f(total)) * 0.69314718f;
}

}  // namespace scrimp::cuda::sparse_attention
