// tree_attention, the kernels: all rows attend to whole blocks of cached keys, split by position; then every new row
// adds the keys behind them along its path and merges its splits.
#pragma once

#include "cuda/tree_attention.parts.cuh"

namespace scrimp::cuda::tree_attention {

template <int D>
struct Prefix {
  static constexpr int kStages = 256 / D, kBlockNumbers = kBlock * D, kStageNumbers = 2 * kBlockNumbers;
  static constexpr int kWarpBytes = kStages * kStageNumbers * 2;  // holds the sums [kRows, D] of the warp, too
  static constexpr int kStats = kRows * D * 2 + kWarps * kWarpBytes, kBytes = kStats + kWarps * kRows * 8;
  static_assert(kRows * D * 4 <= kWarpBytes);
};

// Launched with B x G x (splits + 1) x ceil(rows / kRows) blocks: kRows rows, one split of the cached keys.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) tree_attention_kernel(const __grid_constant__ Arguments p) {
  using Memory = Prefix<D>;
  constexpr int kChunks = D / 8;
  extern __shared__ __align__(128) unsigned char memory[];
  T* const query = reinterpret_cast<T*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t parts = (p.rows + kRows - 1) / kRows;
  const int first_row = blockIdx.x % parts * kRows, rows = min(kRows, p.rows - first_row);
  const int64_t split = blockIdx.x / parts % (p.splits + 1), head = blockIdx.x / parts / (p.splits + 1);
  const int64_t b = head / p.G, g = head % p.G;
  const int64_t whole = cached_tokens(p, b) / kBlock * kBlock;  // up to here blocks are of cached keys
  if (split * kSplit >= whole) return;

  const T* q = static_cast<const T*>(p.q) + b * p.q_strides.b + g * p.group * p.q_strides.h;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, r = first_row + row;
    const T* from = q + r / p.group * p.q_strides.n + r % p.group * p.q_strides.h + i % kChunks * 8;
    ptx::copy_async(query + swizzled<D>(row, i % kChunks), row < rows ? from : q, row < rows);
  }
  ptx::commit_copies();

  unsigned char* const own = memory + kRows * D * 2 + warp * Memory::kWarpBytes;
  const int64_t begin = split * kSplit + warp * kUnit;
  const int blocks = static_cast<int>(min(max(whole - begin, int64_t{0}), int64_t{kUnit}) / kBlock);
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + g * p.k_strides.h + begin * p.k_strides.n;
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides.b + g * p.v_strides.h + begin * p.v_strides.n;
  const auto stage = [&](int i) { return reinterpret_cast<T*>(own) + i % Memory::kStages * Memory::kStageNumbers; };
  const auto fetch = [&](int i) {
    if (i < blocks)
#pragma unroll
      for (int c = lane; c < kBlock * kChunks; c += 32) {
        const int64_t key = i * kBlock + c / kChunks;
        T* to = stage(i) + swizzled<D>(c / kChunks, c % kChunks);
        ptx::copy_async(to, k + key * p.k_strides.n + c % kChunks * 8);
        ptx::copy_async(to + Memory::kBlockNumbers, v + key * p.v_strides.n + c % kChunks * 8);
      }
    ptx::commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Memory::kStages - 1; ++i) fetch(i);
  ptx::wait_copies<Memory::kStages - 1>();
  __syncthreads();  // the query is there

  State state[kTiles];
  float sums[kTiles][D / 8][4] = {};
  const int tiles = (rows + kTile - 1) / kTile;
#pragma unroll 1
  for (int i = 0; i < blocks; ++i) {
    __syncwarp();  // all lanes are done with the stage that is filled now
    fetch(i + Memory::kStages - 1);
    ptx::wait_copies<Memory::kStages - 1>();
    __syncwarp();
    add_block<T, D, kTiles, D / 16>(query, stage(i), stage(i) + Memory::kBlockNumbers, tiles, 0, kBlock, p.scale, state,
                                    sums);
  }
  __syncwarp();
  float2* const stats = reinterpret_cast<float2*>(memory + Memory::kStats);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    keep<D, D / 16>(state[tile], sums[tile], 0, reinterpret_cast<float*>(own) + tile * kTile * D,
                    stats + warp * kRows + tile * kTile);
  __syncthreads();

  const bool complete = (split + 1) * kSplit <= whole;
  const int64_t slots = p.splits + kWarps;
  for (int row = warp; row < rows; row += kWarps) {
    const auto part = [&](int u, int column) {
      const auto* sums_of = reinterpret_cast<const float*>(memory + kRows * D * 2 + u * Memory::kWarpBytes);
      return load4(sums_of + swizzled_sum<D>(row, column));
    };
    const int64_t at = (head * p.rows + first_row + row) * slots;
    float2 units[kWarps];
#pragma unroll
    for (int u = 0; u < kWarps; ++u) units[u] = stats[u * kRows + row];
    if (complete) {
      const Merged merged = merge_units(units);
      if (lane == 0) p.stats[at + split] = merged.stat;
      for (int column = 4 * lane; column < D; column += 128) {
        float4 sum = {};
#pragma unroll
        for (int u = 0; u < kWarps; ++u) sum = add_weighed(merged.weight[u], part(u, column), sum);
        __stcg(reinterpret_cast<float4*>(p.sums + (at + split) * D + column), sum);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kWarps; ++u) {
        if (split * kSplit + u * kUnit >= whole) continue;
        if (lane == 0) p.stats[at + p.splits + u] = units[u];
        for (int column = 4 * lane; column < D; column += 128)
          __stcg(reinterpret_cast<float4*>(p.sums + (at + p.splits + u) * D + column), part(u, column));
      }
    }
  }
}

template <int D>
struct Tail {
  static constexpr int kKeys = kTailBlocks * kBlock;
  static constexpr int kK = kTile * D, kV = kK + kKeys * D, kSums = (kV + kKeys * D) * 2;  // numbers, then bytes
  static constexpr int kStats = kSums + 2 * kTile * D * 4, kPath = kStats + 2 * kTile * 8, kBytes = kPath + 64;
};

// Launched with B x G x T x ceil(group / kTile) blocks: one new row, its heads of a key/value head. Continues the unit
// in which whole blocks of cached keys end, and goes on to the next one where the path reaches it.
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 4) tree_attention_merge_kernel(const __grid_constant__ Arguments p) {
  using Memory = Tail<D>;
  constexpr int kChunks = D / 8, kPairs = D / 16 / kWarps;
  extern __shared__ __align__(128) unsigned char memory[];
  T *const query = reinterpret_cast<T*>(memory), *const keys = query + Memory::kK, *const values = query + Memory::kV;
  float* const sums = reinterpret_cast<float*>(memory + Memory::kSums);  // [2 units, kTile, D]
  float2* const stats = reinterpret_cast<float2*>(memory + Memory::kStats);
  unsigned char* const path = memory + Memory::kPath;  // the new row at every place
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t parts = (p.group + kTile - 1) / kTile;
  const int first_head = blockIdx.x % parts * kTile, heads = min(kTile, p.group - first_head);
  const int t = blockIdx.x / parts % p.T;
  const int64_t head = blockIdx.x / parts / p.T, b = head / p.G, g = head % p.G;
  const int64_t cached = cached_tokens(p, b), whole = cached / kBlock * kBlock;

  const uint64_t word = p.ancestors ? p.ancestors[b * p.ancestors_b + t] : ~uint64_t{0} >> (63 - t);
  const uint64_t seen = word & (~uint64_t{0} >> (64 - p.T));
  if (threadIdx.x < 64 && seen >> threadIdx.x & 1)
    path[__popcll(seen & ((uint64_t{1} << threadIdx.x) - 1))] = threadIdx.x;
  const int tail = static_cast<int>(cached - whole) + __popcll(seen), blocks = (tail + kBlock - 1) / kBlock;
  __syncthreads();

  const T* q =
      static_cast<const T*>(p.q) + b * p.q_strides.b + t * p.q_strides.n + (g * p.group + first_head) * p.q_strides.h;
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const T* from = q + row * p.q_strides.h + i % kChunks * 8;
    ptx::copy_async(query + swizzled<D>(row, i % kChunks), row < heads ? from : q, row < heads);
  }
  const T* k = static_cast<const T*>(p.k) + b * p.k_strides.b + g * p.k_strides.h;
  const T* v = static_cast<const T*>(p.v) + b * p.v_strides.b + g * p.v_strides.h;
  for (int i = threadIdx.x; i < blocks * kBlock * kChunks; i += kThreads) {
    const int key = i / kChunks;
    const int64_t position = whole + key;
    const int64_t slot = key >= tail ? 0 : position < cached ? position : cached + path[position - cached];
    const int at = swizzled<D>(key, i % kChunks);
    ptx::copy_async(keys + at, k + slot * p.k_strides.n + i % kChunks * 8, key < tail);
    ptx::copy_async(values + at, v + slot * p.v_strides.n + i % kChunks * 8, key < tail);
  }
  const int64_t last = whole / kSplit, slots = p.splits + kWarps;  // last: the split in which whole blocks end
  const int unit = static_cast<int>(whole % kSplit) / kUnit;
  const bool begun = whole % kUnit > 0;
  const int64_t rows = (head * p.rows + t * p.group + first_head) * slots;  // stats and sums of the first head
  if (begun)
    for (int i = threadIdx.x; i < kTile * D / 4; i += kThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      const float* from = p.sums + (rows + (row < heads ? row : 0) * slots + p.splits + unit) * D + column;
      ptx::copy_async(sums + swizzled_sum<D>(row, column), from, row < heads);
    }
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();

  State state[1];
  float held[1][2 * kPairs][4] = {};
  const int first_pair = warp * kPairs;
  if (begun)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      if (row < heads) {
        const float2 stat = p.stats[rows + row * slots + p.splits + unit];
        state[0].top[h] = stat.x;
        state[0].total[h] = stat.y;
      }
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        const int column = (2 * first_pair + n) * 8 + lane % 4 * 2;
        const auto two = *reinterpret_cast<const float2*>(sums + swizzled_sum<D>(row, column));
        held[0][n][2 * h] = two.x;
        held[0][n][2 * h + 1] = two.y;
      }
    }
  int next = 0;  // units that are finished
  for (int i = 0; i < blocks; ++i) {
    if (i > 0 && (whole + i * kBlock) % kUnit == 0) {
      keep<D, kPairs>(state[0], held[0], first_pair, sums, stats);
      state[0] = {};
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) held[0][n][e] = 0;
      next = 1;
    }
    add_block<T, D, 1, kPairs>(query, keys + i * kBlock * D, values + i * kBlock * D, 1, first_pair, tail - i * kBlock,
                               p.scale, state, held);
  }
  keep<D, kPairs>(state[0], held[0], first_pair, sums + next * kTile * D, stats + next * kTile);
  __syncthreads();

  constexpr int kLanes = D / 4, kAtOnce = 32 / kLanes;  // lanes of a split's sums; splits that are added at once
  const int column = lane % kLanes * 4, part = lane / kLanes;
  for (int row = warp; row < heads; row += kWarps) {
    const float2* stats_of = p.stats + rows + row * slots;
    const float* sums_of = p.sums + (rows + row * slots) * D + column;
    float2 units[kWarps];
#pragma unroll
    for (int u = 0; u < kWarps; ++u)
      units[u] = u < unit          ? stats_of[p.splits + u]
                 : u > unit + next ? float2{kLowest, 0}
                                   : stats[(u - unit) * kTile + row];
    const Merged merged = merge_units(units);
    const bool crosses = next && unit == kWarps - 1;  // the path goes on into another split
    const auto own = [&](int u) { return load4(sums + u * kTile * D + swizzled_sum<D>(row, column)); };
    float4 merged_sum = {};
#pragma unroll
    for (int u = 0; u < kWarps; ++u)
      if (u <= unit + next)
        merged_sum =
            add_weighed(merged.weight[u], u < unit ? load4(sums_of + (p.splits + u) * D) : own(u - unit), merged_sum);

    const int64_t splits = last + 1 + crosses;
    const auto stat = [&](int64_t s) {
      return s < last ? stats_of[s] : s == last ? merged.stat : s < splits ? stats[kTile + row] : float2{kLowest, 0};
    };
    float top = kLowest, total = 0;
    for (int64_t s = lane; s < splits; s += 32) top = fmaxf(top, stat(s).x);
#pragma unroll
    for (int distance = 16; distance; distance /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, distance));
    float4 sum = {};
    for (int64_t begin = 0; begin < splits; begin += 32) {
      const float2 mine = stat(begin + lane);
      const float weight = ptx::exp2_approximate(__fsub_rn(mine.x, top));
      total = __fmaf_rn(mine.y, weight, total);
      const int count = static_cast<int>(min(int64_t{32}, splits - begin));
#pragma unroll 4
      for (int j = 0; j < count; j += kAtOnce) {
        const float of = __shfl_sync(kAll, weight, j + part);
        const int64_t s = begin + j + part;
        if (s < last) sum = add_weighed(of, load4(sums_of + s * D), sum);
        if (s == last) sum = add_weighed(of, merged_sum, sum);
        if (s == last + 1 && crosses) sum = add_weighed(of, own(1), sum);
      }
    }
#pragma unroll
    for (int distance = 16; distance; distance /= 2) total = __fadd_rn(total, __shfl_xor_sync(kAll, total, distance));
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      sum.x = __fadd_rn(sum.x, __shfl_xor_sync(kAll, sum.x, distance));
      sum.y = __fadd_rn(sum.y, __shfl_xor_sync(kAll, sum.y, distance));
      sum.z = __fadd_rn(sum.z, __shfl_xor_sync(kAll, sum.z, distance));
      sum.w = __fadd_rn(sum.w, __shfl_xor_sync(kAll, sum.w, distance));
    }
    const float inverse = total > 0 || total != total ? 1 / total : 0;
    const int64_t h = g * p.group + first_head + row, H = static_cast<int64_t>(p.G) * p.group;
    if (part == 0)
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + ((b * p.T + t) * H + h) * D + column) = {
          ptx::pack<T>(sum.x * inverse, sum.y * inverse), ptx::pack<T>(sum.z * inverse, sum.w * inverse)};
    if (lane == 0) p.lse[(b * H + h) * p.T + t] = total == 0 ? -INFINITY : top * 0.69314718f + logf(total);
  }
}

}  // namespace scrimp::cuda::tree_attention
