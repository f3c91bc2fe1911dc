// Attention of a few new rows over a cache: every key is read once for all rows and all heads of its group.
//
//   blocks of 64 positions                                            flash attention's loop
//     S[row, key] = Q[row, :] . K^T[:, key]      keys in the lanes    score_block
//     P[row, key] = 2^(S - max), sums, rescale   one row at a time    weigh_row
//     O[row, dim] = O * rescale + P . V          dims in the lanes    add_values
//
// Every score is one chain of fused multiply-adds over the dimensions and every output one over the keys of a block,
// in order of position; so neither strips of rows nor the block's other rows change a bit. Blocks that all rows see
// whole are computed in strips of rows; the others row by row over just the keys that the row sees: a hidden key adds
// nothing, not even zero times its value.
#include "cpu/tree_attention.h"

#include <string.h>

#include "common/query_lanes.h"
#include "cpu/tree_attention.quads.h"

namespace scrimp::SCRIMP_ISA {
namespace {

static_assert(kBlockKeys == kPitch);
constexpr float kLn2 = 0.693147181f;

constexpr int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

// What a split knows of its rows so far.
struct State {
  float* out;  // [rows, pitch], not yet divided by the sum
  float* sum;  // [rows, kLanes]: key i of a block adds to lane i % kLanes
  float* max;  // [rows]
};

// One (batch, key/value head), passed by value: a store cannot change it. Row r is head r % heads of its group at new
// row r / heads.
struct Tile {
  int64_t heads, rows;
  int64_t head_dim, vectors, pitch;  // vectors of a row of values, floats from one to the next
  float* q;                          // [rows, D], times scale * log2 e
  float* keys;                       // K^T [D, 64]
  float* scores;                     // [2, rows, 64]: two blocks of S, then P
  float* rescale;                    // [rows]
  float* staged;                     // [2 * 64, pitch]: values that are not read where they lie
  float* row_scores;                 // [2, heads, 64]: those of one new row in the order of its keys
};

// Rows of V in the order of their slots, as they lie or as fp32.
struct Values {
  const void* row[2 * kBlockKeys];
  bool staged;
};

int64_t pitch_of(int64_t head_dim) { return whole_lines(head_dim); }

State state_at(const Tile tile, float* states, int64_t split) {
  const int64_t size = tile.rows * tile.pitch + tile.rows * kLanes + whole_lines(tile.rows);
  float* out = states + split * size;
  return {out, out + tile.rows * tile.pitch, out + tile.rows * (tile.pitch + kLanes)};
}

void clear(const Tile tile, const State& state) {
  for (int64_t i = 0; i < tile.rows * (tile.pitch + kLanes); ++i) state.out[i] = 0.0f;
  for (int64_t i = 0; i < tile.rows; ++i) state.max[i] = -kInfinity;
}

// Whether row r has met no key, or none but of score -inf (scores of NaN leave NaN in the sum).
bool saw_nothing(const State& state, int64_t r) {
  return state.max[r] == -kInfinity && sum_lanes(load(state.sum + r * kLanes)) == 0.0f;
}

// S of `count` keys from `keys` on: scores[row, key] for all rows. `values` are the values of the same keys.
template <class T>
[[gnu::flatten]] void score_block(const Tile tile, const T* keys, int64_t stride, const T* values, int64_t value_stride,
                                  int64_t count, float* scores) {
  const int64_t D = tile.head_dim;
  int64_t packed = 0;
  for (; D % (16 / sizeof(T)) == 0 && packed + kLanes <= count; packed += kLanes)
    pack_lanes(keys + packed * stride, stride, values + packed * value_stride, value_stride, D, tile.keys + packed);
  if (packed < count) {
    const auto row = [&](int64_t i) { return packed + i < count ? keys + (packed + i) * stride : nullptr; };
    pack_queries(count - packed, D, 1.0f, row, tile.keys + packed);
  }
  for (int64_t vector = 0, vectors = (count + kLanes - 1) / kLanes; vector < vectors; vector += kStripVectors) {
    with_constant<kStripVectors>(vectors - vector, [&](auto width) {
      for_row_strips(tile.rows, [&](auto height, int64_t first) {
        constexpr int R = height.value, C = width.value;
        const float* q = tile.q + first * D;
        Vec score[R][C];
        for_vectors<R, C>([&](int r, int c) { score[r][c] = Vec{}; });
        multiply_add(score, tile.keys + vector * kLanes, D, [&](int r, int64_t d) { return q[r * D + d]; });
        float* to = scores + first * kPitch + vector * kLanes;
        for_vectors<R, C>([&](int r, int c) { store(to + r * kPitch + c * kLanes, score[r][c]); });
      });
    });
  }
}

// Finds `count` rows of V; copies them if they are no whole vectors, or bf16 that many rows would widen again and
// again.
template <class T>
void find_values(const Tile tile, const T* values, int64_t stride, int64_t count, Values& found) {
  const int64_t D = tile.head_dim, whole = D / kLanes * kLanes;
  found.staged = whole < D || (sizeof(T) < sizeof(float) && tile.rows > kStripRows);
  for (int64_t i = 0; i < count; ++i, values += stride) {
    found.row[i] = values;
    if (!found.staged) continue;
    float* to = tile.staged + i * tile.pitch;
    found.row[i] = to;
    for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(values + d));
    if (whole < D) store(to + whole, load_first(values + whole, D - whole));
  }
}

// Turns the scores of a block into weights in place (-inf into 0) and brings max and sum of row r up to date; returns
// the rescale of what the row has added up so far.
SCRIMP_INLINE float weigh_row(const State& state, int64_t r, float* scores) {
  constexpr int V = kBlockKeys / kLanes;
  Vec score[V], high[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) high[i] = score[i] = load(scores + i * kLanes);
#pragma GCC unroll 4
  for (int half = V / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) high[i] = max(high[i], high[i + half]);
  }
  const float block = highest_lane(high[0]), past = state.max[r];
  const float top = block > past ? block : past;
  state.max[r] = top;
  const Vec base = broadcast(top == -kInfinity ? 0.0f : top);
  const Vec rescale = exp2(broadcast(past) - base);
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    score[i] = exp2(score[i] - base);
    store(scores + i * kLanes, score[i]);
  }
#pragma GCC unroll 4
  for (int half = V / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) score[i] += score[i + half];
  }
  float* sum = state.sum + r * kLanes;
  store(sum, fma(load(sum), rescale, score[0]));
  return rescale[0];
}

// O[r, :] = O[r, :] * rescale[r] + sum of weights[r, i] * values[i] over i in [begin, end), for `rows` rows.
template <class V, class T>
[[gnu::flatten]] void add_values(const Tile tile, const float* weights, const void* const* values, int64_t begin,
                                 int64_t end, int64_t rows, float* out, const T* next, int64_t next_stride) {
  const int64_t pitch = tile.pitch;
  const float* rescale = tile.rescale;
  for (int64_t vector = 0; vector < tile.vectors; vector += kStripVectors) {
    with_constant<kStripVectors>(tile.vectors - vector, [&](auto width) {
      for_row_strips(rows, [&](auto height, int64_t first) {
        constexpr int R = height.value, C = width.value;
        const float* weight = weights + first * kPitch;
        Vec sum[R][C];
        for_vectors<R, C>([&](int r, int c) { sum[r][c] = Vec{}; });
        for (int64_t i = begin; i < end; ++i) {
          const V* value = static_cast<const V*>(values[i]) + vector * kLanes;
          Vec b[C];
          for_vectors<1, C>([&](int, int c) { b[c] = load(value + c * kLanes); });
          for_vectors<R, 1>([&](int r, int) {
            const Vec a = broadcast(weight[r * kPitch + i]);
            for_vectors<1, C>([&](int, int c) { sum[r][c] = fma(a, b[c], sum[r][c]); });
          });
          for_vectors<1, C>([&](int, int c) {
            if (c * kLanes * sizeof(T) % 64 == 0)
              __builtin_prefetch(next + i * next_stride + (vector + c) * kLanes, 0, 2);
          });
        }
        for_vectors<R, C>([&](int r, int c) {
          float* past = out + (first + r) * pitch + (vector + c) * kLanes;
          store(past, fma(load(past), broadcast(rescale[first + r]), sum[r][c]));
        });
      });
    });
  }
}

// Adds to the heads of new row t the keys at positions [begin, end) of a block; scores[h, i] are those of position i
// for i in [begin, end), values[i] its values.
template <class T>
void add_row(const Tile tile, const State& state, int64_t t, float* scores, const void* const* values, bool staged,
             int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = t * tile.heads;
  for (int64_t h = 0; h < tile.heads; ++h) {
    float* row = scores + h * kPitch;
    for (int64_t i = 0; i < begin; ++i) row[i] = -kInfinity;
    for (int64_t i = end; i < kBlockKeys; ++i) row[i] = -kInfinity;
    tile.rescale[h] = weigh_row(state, first + h, row);
  }
  float* out = state.out + first * tile.pitch;
  const auto* again = static_cast<const T*>(values[begin]);  // nothing to fetch ahead
  staged ? add_values<float>(tile, scores, values, begin, end, tile.heads, out, again, 0)
         : add_values<T>(tile, scores, values, begin, end, tile.heads, out, again, 0);
}

template <class T>
struct Cache {
  const T *k, *v;
  int64_t k_stride, v_stride;
};

// A block that the prefix fills; with a window, new row t sees its positions from prefix + t + 1 - window on.
template <class T>
void add_block(const Tile tile, const State& state, const Cache<T>& cache, int64_t position, int64_t prefix,
               int64_t window) {
  const T *keys = cache.k + position * cache.k_stride, *first_values = cache.v + position * cache.v_stride;
  score_block(tile, keys, cache.k_stride, first_values, cache.v_stride, kBlockKeys, tile.scores);
  Values values;
  find_values(tile, first_values, cache.v_stride, kBlockKeys, values);
  const int64_t rows = tile.rows / tile.heads;
  if (window == 0 || prefix + rows - window <= position) {
    for (int64_t r = 0; r < tile.rows; ++r) tile.rescale[r] = weigh_row(state, r, tile.scores + r * kPitch);
    const T* next = keys + kBlockKeys * cache.k_stride;
    const auto add = [&](auto kind) {
      add_values<decltype(kind)>(tile, tile.scores, values.row, 0, kBlockKeys, tile.rows, state.out, next,
                                 cache.k_stride);
    };
    values.staged ? add(float{}) : add(T{});
    return;
  }
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t hidden = prefix + t + 1 - window - position;
    add_row<T>(tile, state, t, tile.scores + t * tile.heads * kPitch, values.row, values.staged,
               hidden > 0 ? hidden : 0, kBlockKeys);
  }
}

// The keys from `position` on, where the block in which the prefix ends begins: the rest of the prefix and the new
// rows, up to two blocks. Each row gathers its own new rows behind the prefix.
template <class T>
void add_tail(const Tile tile, const TreeAttention& call, const TreeSplit& split, const Cache<T>& cache,
              int64_t position) {
  const int64_t heads = tile.heads, rows = call.n_rows, rest = split.prefix - position, slots = rest + rows;
  const T *keys = cache.k + position * cache.k_stride, *first_values = cache.v + position * cache.v_stride;
  for (int64_t block = 0; block < slots; block += kBlockKeys) {
    const int64_t count = slots - block < kBlockKeys ? slots - block : kBlockKeys;
    score_block(tile, keys + block * cache.k_stride, cache.k_stride, first_values + block * cache.v_stride,
                cache.v_stride, count, tile.scores + block * tile.rows);
  }
  Values slot_values;
  find_values(tile, first_values, cache.v_stride, slots, slot_values);
  const int64_t first_split = (position - split.begin) / kSplitKeys;
  const int64_t second_split = (position + kBlockKeys - split.begin) / kSplitKeys;
  const State states[2] = {state_at(tile, split.states, first_split), state_at(tile, split.states, second_split)};
  if (slots > kBlockKeys && second_split != first_split) clear(tile, states[1]);

  const int64_t* words = call.ancestors ? call.ancestors + split.batch * call.ancestors_stride : nullptr;
  for (int64_t t = 0; t < rows; ++t) {
    const uint64_t word = words ? static_cast<uint64_t>(words[t]) : ~uint64_t{0} >> (63 - t);
    const int64_t hidden = call.window ? split.prefix + t + 1 - call.window - position : 0;
    const int64_t begin = hidden > 0 ? hidden : 0;
    const float* scores = tile.scores + t * heads * kPitch;
    memcpy(tile.row_scores, scores, heads * kPitch * sizeof(float));
    const void* values[2 * kBlockKeys];
    memcpy(values, slot_values.row, rest * sizeof(void*));
    int64_t end = rest;
    for (uint64_t left = word; left != 0; left &= left - 1, ++end) {
      const int64_t slot = rest + __builtin_ctzll(left);
      values[end] = slot_values.row[slot];
      const float* from = scores + slot / kBlockKeys * tile.rows * kPitch + slot % kBlockKeys;
      float* to = tile.row_scores + end / kBlockKeys * heads * kPitch + end % kBlockKeys;
      for (int64_t h = 0; h < heads; ++h) to[h * kPitch] = from[h * kPitch];
    }
    for (int64_t block = 0; block < end; block += kBlockKeys) {
      const int64_t start = begin > block ? begin - block : 0,
                    stop = end - block < kBlockKeys ? end - block : kBlockKeys;
      add_row<T>(tile, states[block / kBlockKeys], t, tile.row_scores + block * heads, values + block,
                 slot_values.staged, start, stop);
    }
  }
}

template <class T>
void attend(const TreeAttention& call, const TreeSplit& split, float* scratch) {
  const int64_t heads = call.n_heads / call.n_groups, rows = heads * call.n_rows, D = call.head_dim;
  Tile tile;
  tile.heads = heads;
  tile.rows = rows;
  tile.head_dim = D;
  tile.vectors = (D + kLanes - 1) / kLanes;
  tile.pitch = pitch_of(D);
  tile.keys = scratch;
  tile.staged = tile.keys + D * kPitch;
  tile.row_scores = tile.staged + 2 * kBlockKeys * tile.pitch;
  tile.scores = tile.row_scores + 2 * heads * kPitch;
  tile.q = tile.scores + 2 * rows * kPitch;
  tile.rescale = tile.q + rows * D;

  const Vec factor = broadcast(call.scale * kLog2E);
  const T* q =
      static_cast<const T*>(call.q) + split.batch * call.q_strides[0] + split.group * heads * call.q_strides[1];
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = q + r % heads * call.q_strides[1] + r / heads * call.q_strides[2];
    float* to = tile.q + r * D;
    for (int64_t d = 0; d < D; d += kLanes) store_first(to + d, load_first(from + d, D - d) * factor, D - d);
  }
  const Cache<T> cache{
      static_cast<const T*>(call.k) + split.batch * call.k_strides[0] + split.group * call.k_strides[1],
      static_cast<const T*>(call.v) + split.batch * call.v_strides[0] + split.group * call.v_strides[1],
      call.k_strides[2], call.v_strides[2]};
  const State state = state_at(tile, split.states, 0);
  clear(tile, state);
  const int64_t whole = split.prefix / kBlockKeys * kBlockKeys;  // what lies behind belongs to the tail
  const int64_t end = split.last ? whole : split.begin + kSplitKeys;
  const int64_t seen = call.window ? split.prefix + 1 - call.window : 0;  // by row 0, the first to see any
  for (int64_t position = split.begin; position < end; position += kBlockKeys) {
    if (position + kBlockKeys <= seen) continue;
    add_block(tile, state, cache, position, split.prefix, call.window);
  }
  if (split.last) add_tail(tile, call, split, cache, whole);
}

template <class T>
void write(const TreeAttention& call, int64_t batch, int64_t group, float* states, int64_t splits) {
  const int64_t heads = call.n_heads / call.n_groups;
  Tile tile;
  tile.rows = heads * call.n_rows;
  tile.pitch = pitch_of(call.head_dim);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t h = group * heads + r % heads, t = r / heads, D = call.head_dim;
    float top = -kInfinity;
    for (int64_t s = 0; s < splits; ++s) {
      const float max = state_at(tile, states, s).max[r];
      top = max > top ? max : top;
    }
    const Vec base = broadcast(top == -kInfinity ? 0.0f : top);
    Vec lanes{};
    for (int64_t s = 0; s < splits; ++s) {
      const State state = state_at(tile, states, s);
      if (saw_nothing(state, r)) continue;  // not even a zero is added
      lanes = fma(exp2(broadcast(state.max[r]) - base), load(state.sum + r * kLanes), lanes);
    }
    const float sum = sum_lanes(lanes);
    const Vec inverse = broadcast(sum == 0.0f ? 0.0f : 1.0f / sum);
    T* out =
        static_cast<T*>(call.out) + batch * call.out_strides[0] + h * call.out_strides[1] + t * call.out_strides[2];
    for (int64_t d = 0; d < D; d += kLanes) {
      Vec total{};
      for (int64_t s = 0; s < splits; ++s) {
        const State state = state_at(tile, states, s);
        if (saw_nothing(state, r)) continue;
        total = fma(exp2(broadcast(state.max[r]) - base), load(state.out + r * tile.pitch + d), total);
      }
      store_first(out + d, total * inverse, D - d);
    }
    call.lse[(batch * call.n_heads + h) * call.n_rows + t] = top * kLn2 + __builtin_logf(sum);
  }
}

}  // namespace

int64_t tree_attention_scratch(const TreeAttention& call) {
  const int64_t heads = call.n_heads / call.n_groups, rows = heads * call.n_rows, D = call.head_dim;
  return (D + 2 * heads + 2 * rows) * kPitch + 2 * kBlockKeys * pitch_of(D) + rows * D + rows;
}

int64_t tree_attention_state(const TreeAttention& call) {
  const int64_t rows = call.n_heads / call.n_groups * call.n_rows;
  return rows * (pitch_of(call.head_dim) + kLanes) + whole_lines(rows);
}

void tree_attention_split(const TreeAttention& call, const TreeSplit& split, float* scratch) {
  call.bf16 ? attend<BFloat16>(call, split, scratch) : attend<float>(call, split, scratch);
}

void tree_attention_write(const TreeAttention& call, int64_t batch, int64_t group, const float* states,
                          int64_t splits) {
  float* of = const_cast<float*>(states);
  call.bf16 ? write<BFloat16>(call, batch, group, of, splits) : write<float>(call, batch, group, of, splits);
}

}  // namespace scrimp::SCRIMP_ISA
