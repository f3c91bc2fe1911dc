// sparse_attention, the keys of a plan's tile: every warp walks through them alone, a step at a time.
#pragma once

#include <cstdint>

namespace scrimp::cuda::sparse_attention {

constexpr unsigned kAll = 0xFFFFFFFF;
constexpr int kHidden = INT32_MAX;  // no key: behind all that a row sees

// What a plan lists for a tile, and the keys of interest: those in [low, high) are seen by some row of the block, those
// in [safe_low, safe_high) by every row.
struct Tile {
  const int2* ranges;      // [n_ranges], sorted and disjoint
  const int32_t* columns;  // [n_columns], sorted; those inside a range are left out
  int n_ranges, n_columns, low, high, safe_low, safe_high;
};

__device__ __forceinline__ int min_of_warp(int x) { return __reduce_min_sync(kAll, x); }
__device__ __forceinline__ int max_of_warp(int x) { return __reduce_max_sync(kAll, x); }

// Keys are handed out kKeys at a time, kKeys / 32 a lane. Those of the ranges lie side by side, whatever gaps are
// between them: 32 ranges at hand, one a lane, count their keys through, and a key is looked up by its place in that
// count.
template <int kKeys>
struct Walk {
  static constexpr int kOwn = kKeys / 32;

  const Tile& tile;
  const int n_ranges, n_columns;        // the tile's, as results of a reduction: so all lanes are known to share them
  int next_range = 0, next_column = 0;  // not looked at yet
  int place = 0, total = 0;             // in the keys of the ranges at hand
  int upto = 0, base = 0;               // keys up to the end of this lane's range; at place i its key is base + i
  int run_upto = 0, run_base = 0;       // the same of the range in which the last step ended

  __device__ __forceinline__ void take_ranges() {
    const int lane = threadIdx.x % 32, i = next_range + lane;
    const int2 range = i < n_ranges ? __ldg(tile.ranges + i) : int2{0, 0};
    const int start = max(range.x, tile.low);
    upto = max(min(range.y, tile.high), start) - start;
    base = start + upto;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAll, upto, distance);
      if (lane >= distance) upto += before;
    }
    base -= upto;
    total = max_of_warp(upto);
    next_range += 32;
    place = run_upto = 0;
  }

  // The lane's keys of the next step, kHidden where there are too few; false behind the last.
  __device__ __forceinline__ bool next(int (&key)[kOwn]) {
#pragma unroll 1
    while (place >= total && next_range < n_ranges) take_ranges();
    if (place < total) {
      next_of_ranges(key);
      return true;
    }
#pragma unroll 1
    while (next_column < n_columns)
      if (next_columns(key)) return true;
    return false;
  }

  __device__ __forceinline__ void next_of_ranges(int (&key)[kOwn]) {
    const int lane = threadIdx.x % 32;
    if (place + kKeys <= run_upto) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) key[j] = run_base + place + 32 * j + lane;
    } else {
      int range = 0;  // of the key in the loop: how many end before it
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int at = place + 32 * j + lane;
        range = 0;
#pragma unroll
        for (int step = 16; step; step /= 2)
          if (__shfl_sync(kAll, upto, range + step - 1) <= at) range += step;
        const int found = __shfl_sync(kAll, base, range) + at;
        key[j] = at < total && found >= 0 && found < tile.high ? found : kHidden;  // ranges may overlap in a bad plan
      }
      run_upto = max_of_warp(__shfl_sync(kAll, upto, range));
      run_base = __shfl_sync(kAll, __shfl_sync(kAll, base, range), 31);
    }
    place += kKeys;
  }

  // Those of the next kKeys columns that lie in [low, high) and in no range; false where there is none.
  __device__ __forceinline__ bool next_columns(int (&key)[kOwn]) {
    const int lane = threadIdx.x % 32, begin = next_column;
    next_column += kKeys;
    bool some = false;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = begin + 32 * j + lane;
      const int column = i < n_columns ? __ldg(tile.columns + i) : kHidden;
      if (j == 0 && __all_sync(kAll, column >= tile.high)) next_column = n_columns;  // so are those behind
      const bool in_range = in_a_range(column), kept = column >= tile.low && column < tile.high && !in_range;
      key[j] = kept ? column : kHidden;
      some |= kept;
    }
    return __any_sync(kAll, some);
  }

  __device__ __forceinline__ bool in_a_range(int column) const {
    bool found = false;
#pragma unroll 1
    for (int done = 0; done < n_ranges; done += 32) {
      const int i = done + threadIdx.x % 32;
      const int2 range = i < n_ranges ? __ldg(tile.ranges + i) : int2{kHidden, kHidden};
      int ended = 0;  // of these 32, before the column
#pragma unroll
      for (int step = 16; step; step /= 2)
        if (__shfl_sync(kAll, range.y, ended + step - 1) <= column) ended += step;
      const int start = __shfl_sync(kAll, range.x, ended), stop = __shfl_sync(kAll, range.y, ended);
      found |= start <= column && column < stop;
    }
    return found;
  }
};

}  // namespace scrimp::cuda::sparse_attention
