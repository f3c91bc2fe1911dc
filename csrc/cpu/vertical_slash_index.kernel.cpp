// Which keys a few sampled rows of each segment attend to; the sampled rows of several segments lie in the lanes.
//
//   pass 1: keys that a row sees, in pieces of kPiece; lanes that see none of a piece are left out
//     S^T[key, row] = K[key, :] . Q^T[:, row]             score_piece
//     P^T = 2^(S^T - max so far), and its sums            softmax_piece
//   pass 2: keys that a row scores; pieces too many to be kept in scratch are computed again
//     score[segment, key] += sum_row P^T * factor[row]    add_scores; factor = 2^(max so far - max) / sum
//   the best keys of each segment                         choose
//
// The bits of non-negative floats have the order of the floats, so the k-th best score is a binary search over
// bits: every step counts the scores above one value, a comparison and a subtraction per vector of keys.
#include "cpu/vertical_slash_index.h"

#include <string.h>

#include "common/query_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int64_t kPiece = 96;                     // keys whose P^T stays in cache; a multiple of kStripRows and kLanes
constexpr int64_t kKeptPieces = 171;               // whose P^T scratch holds: 4 MiB
constexpr int64_t kBlock = (kPiece + 1) * kPitch;  // floats of a piece: P^T and the maxima it was computed with
static_assert(kSampleLanes == kPitch && kPiece % kStripRows == 0 && kPiece % kLanes == 0);

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

int64_t whole_lines(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

SCRIMP_INLINE IntVec load_int(const int32_t* p) {
  IntVec x;
  memcpy(&x, p, sizeof x);
  return x;
}

SCRIMP_INLINE IntVec broadcast_int(int64_t x) { return IntVec{} + static_cast<int32_t>(x); }

// Sampled rows in the lanes; all of it lives in the worker's scratch. Lanes behind the last row of a segment repeat
// that row with weight 0.
struct Lanes {
  int64_t count;
  int64_t head_dim;
  float* q;        // Q^T [D, 64], times scale * log2 e
  float* max;      // [64] so far
  float* sum;      // [64] so far
  float* inverse;  // [64] 1 / sum, 0 for a repeated row
  int32_t* end;    // [64] a lane sees keys [0, end)
  int32_t* low;    // [64] and scores those of [sinks, low)
};

struct Scratch {
  Lanes lanes;
  float* blocks;  // [kept + 1, kPiece + 1, 64]; the last one serves all pieces that are not kept
  int64_t kept;
  float* staged;  // bfloat16 only: [kPiece, D] floats
  float* scores;  // [segments of a group, score_pitch]
  int64_t score_pitch;
  int64_t floats;
};

Scratch carve(const VerticalSlashIndex& call, float* scratch) {
  Scratch result;
  float* next = scratch;
  const auto take = [&](int64_t floats) {
    float* block = next;
    next += floats;
    return block;
  };
  const int64_t pieces = (call.n_k + kPiece - 1) / kPiece;
  result.kept = pieces < kKeptPieces ? pieces : kKeptPieces;
  result.blocks = take((result.kept + 1) * kBlock);
  result.lanes.q = take(call.head_dim * kPitch);
  result.lanes.max = take(kPitch);
  result.lanes.sum = take(kPitch);
  result.lanes.inverse = take(kPitch);
  result.lanes.end = reinterpret_cast<int32_t*>(take(kPitch));
  result.lanes.low = reinterpret_cast<int32_t*>(take(kPitch));
  result.staged = take(call.bf16 ? whole_lines(kPiece * call.head_dim) : 0);
  result.score_pitch = pieces * kPiece + kLine;  // zeros behind the last key
  result.scores = take(kSampleLanes / call.segment_lanes * result.score_pitch);
  result.floats = next - scratch;
  return result;
}

// First key of the window of a row's tile; 0 where it would touch the sinks.
int64_t window_start(const VerticalSlashIndex& call, int64_t head, int64_t row) {
  const int64_t first = row / call.q_block * call.q_block + call.q_offset - call.window[head];
  const int64_t low = clamp(first, 0, call.n_k);
  return low <= call.sinks ? 0 : low;
}

// Rows of K, as floats.
struct Keys {
  int64_t count;
  const float* data;
  int64_t stride;
};

Keys find_keys(const float* k, int64_t stride, int64_t first, int64_t count, int64_t, float*) {
  return {count, k + first * stride, stride};
}

Keys find_keys(const BFloat16* k, int64_t stride, int64_t first, int64_t count, int64_t head_dim, float* staged) {
  for (int64_t i = 0; i < count; ++i) {
    const BFloat16* from = k + (first + i) * stride;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store_first(staged + i * head_dim + d, load_first(from + d, head_dim - d), head_dim - d);
    }
  }
  return {count, staged, head_dim};
}

// S^T of the piece for lanes from first_lane on, -inf for keys that a lane does not see; raises lanes.max.
[[gnu::flatten]] void score_piece(const Lanes lanes, int64_t first_lane, const Keys keys, int64_t first_key,
                                  bool masked, float* scores) {
  for_strips(keys.count, (lanes.count - first_lane) / kLanes, [&](auto rows, auto width, int64_t key, int64_t vector) {
    constexpr int R = rows.value, C = width.value;
    const int64_t lane = first_lane + vector * kLanes;
    Vec score[R][C];
    for_vectors<R, C>([&](int r, int c) { score[r][c] = Vec{}; });
    const float* k[R];
    const float* next_k[R];
    for_vectors<R, 1>([&](int r, int) {
      k[r] = keys.data + (key + r) * keys.stride;
      next_k[r] = keys.data + (key + R + r < keys.count ? key + R + r : keys.count - 1) * keys.stride;
    });
    for (int64_t d = 0; d < lanes.head_dim; d += kLine) {
      if (vector == 0) for_vectors<R, 1>([&](int r, int) { __builtin_prefetch(next_k[r] + d); });
      const int64_t depth = lanes.head_dim - d < kLine ? lanes.head_dim - d : kLine;
      multiply_add(score, lanes.q + d * kPitch + lane, depth, [&](int r, int64_t i) { return k[r][d + i]; });
    }
    if (masked) {
      for_vectors<R, C>([&](int r, int c) {
        const IntVec end = load_int(lanes.end + lane + c * kLanes);
        score[r][c] = end > broadcast_int(first_key + key + r) ? score[r][c] : broadcast(-kInfinity);
      });
    }
    Vec high[C];
    for_vectors<1, C>([&](int, int c) { high[c] = load(lanes.max + lane + c * kLanes); });
    for_vectors<R, C>([&](int r, int c) {
      high[c] = max(high[c], score[r][c]);
      store(scores + (key + r) * kPitch + lane + c * kLanes, score[r][c]);
    });
    for_vectors<1, C>([&](int, int c) { store(lanes.max + lane + c * kLanes, high[c]); });
  });
}

// P^T = 2^(S^T - max) in place; brings sum up to date. `maxima` are the old ones and become the present ones. A piece
// is summed from zero, so that rounding errors grow with the square root of the piece, not of the whole row.
void softmax_piece(const Lanes& lanes, int64_t first_lane, int64_t keys, float* scores, float* maxima) {
  for (int64_t lane = first_lane; lane < lanes.count; lane += kLanes) {
    const Vec high = load(lanes.max + lane);
    const Vec base = high == -kInfinity ? Vec{} : high;  // a lane without any key so far: 2^(-inf - 0) = 0
    const Vec rescale = exp2(load(maxima + lane) - base);
    Vec sum{};
    for (int64_t key = 0; key < keys; ++key) {
      float* p = scores + key * kPitch + lane;
      const Vec weight = exp2(load(p) - base);
      sum += weight;
      store(p, weight);
    }
    store(lanes.sum + lane, fma(load(lanes.sum + lane), rescale, sum));
    store(maxima + lane, base);
  }
}

// Lane i of the result is the sum of the lanes of rows[i]: a transposition that adds instead of keeping.
SCRIMP_INLINE Vec add_lanes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Vec a = rows[i], b = rows[i + half];
#if defined(__AVX512F__)
      rows[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
                __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      rows[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) +
                __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      rows[i] = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
  }
  return rows[0];
}

// scores[segment, key] += sum over the segment's lanes of P^T * 2^(max so far - max) / sum, where key < low.
void add_scores(const Lanes& lanes, int64_t first_lane, int64_t segment_lanes, const float* block, int64_t first_key,
                int64_t keys, bool masked, float* scores, int64_t score_pitch) {
  float factor[kPitch];
  for (int64_t lane = first_lane; lane < lanes.count; lane += kLanes) {
    const Vec past = load(block + kPiece * kPitch + lane);
    store(factor + lane, exp2(past - load(lanes.max + lane)) * load(lanes.inverse + lane));
  }
  for (int64_t key = 0; key < keys; key += kLanes) {
    for (int64_t lane = first_lane; lane < lanes.count;) {
      const int64_t segment = lane / segment_lanes, end = (segment + 1) * segment_lanes;
      Vec rows[kLanes] = {};
      for (; lane < end; lane += kLanes) {
        const Vec by = load(factor + lane);
        const IntVec low = load_int(lanes.low + lane);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          Vec weight = load(block + (key + i) * kPitch + lane) * by;
          if (masked) weight = low > broadcast_int(first_key + key + i) ? weight : Vec{};
          rows[i] += weight;
        }
      }
      float* score = scores + segment * score_pitch + first_key + key;
      store(score, load(score) + add_lanes(rows));
    }
  }
}

int64_t largest(const int32_t* x, int64_t count) {
  int64_t result = 0;
  for (int64_t i = 0; i < count; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

int64_t smallest(const int32_t* x, int64_t count) {
  int64_t result = INT32_MAX;
  for (int64_t i = 0; i < count; ++i) result = x[i] < result ? x[i] : result;
  return result;
}

// First lane from which on `limit` is above `key` for some lane of each vector.
int64_t find_lane(const Lanes& lanes, const int32_t* limit, int64_t key) {
  int64_t lane = 0;
  while (lane < lanes.count && largest(limit + lane, kLanes) <= key) lane += kLanes;
  return lane;
}

// P^T of a piece of keys, and the maxima it was computed with.
template <class T>
float* weigh_piece(const Scratch& scratch, int64_t first_key, const T* k, int64_t k_stride) {
  const Lanes& lanes = scratch.lanes;
  const int64_t piece = first_key / kPiece, left = largest(lanes.end, lanes.count) - first_key;
  float* block = scratch.blocks + (piece < scratch.kept ? piece : scratch.kept) * kBlock;
  float* maxima = block + kPiece * kPitch;
  const int64_t lane = find_lane(lanes, lanes.end, first_key);
  const Keys keys = find_keys(k, k_stride, first_key, left < kPiece ? left : kPiece, lanes.head_dim, scratch.staged);
  const bool masked = smallest(lanes.end + lane, lanes.count - lane) < first_key + keys.count;
  memcpy(maxima, lanes.max, kPitch * sizeof(float));
  score_piece(lanes, lane, keys, first_key, masked, block);
  softmax_piece(lanes, lane, keys.count, block, maxima);
  return block;
}

// Adds the mass that rows first_sample, first_sample + 1, ... of each segment give each key to the segment's scores.
template <class T>
void score_rows(const VerticalSlashIndex& call, const SegmentGroup& group, int64_t first_sample, Scratch& scratch) {
  const int64_t b = group.batch, h = group.head, g = h / (call.n_heads / call.n_groups);
  const T* q = static_cast<const T*>(call.q) + b * call.q_strides[0] + h * call.q_strides[1];
  const T* k = static_cast<const T*>(call.k) + b * call.k_strides[0] + g * call.k_strides[1];
  const int64_t step = call.segment / call.samples;
  Lanes& lanes = scratch.lanes;
  lanes.count = group.segments * call.segment_lanes;
  lanes.head_dim = call.head_dim;

  int64_t row[kPitch];
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    const int64_t start = (group.first_segment + lane / call.segment_lanes) * call.segment;
    const int64_t stop = start + call.segment < call.n_q ? start + call.segment : call.n_q;
    const int64_t sample = first_sample + lane % call.segment_lanes;
    const int64_t wanted = start + (sample + 1) * step - 1;
    const bool repeated = sample >= call.samples || wanted - step >= stop - 1;
    row[lane] = wanted < stop - 1 ? wanted : stop - 1;
    const int64_t low = window_start(call, h, row[lane]);
    lanes.low[lane] = static_cast<int32_t>(low);
    lanes.end[lane] = static_cast<int32_t>(low == 0 ? 0 : clamp(row[lane] + call.q_offset + 1, 0, call.n_k));
    lanes.inverse[lane] = repeated ? 0.0f : 1.0f;
    lanes.max[lane] = -kInfinity;
    lanes.sum[lane] = 0.0f;
  }
  const float factor = call.scale * kLog2E;
  pack_queries(lanes.count, call.head_dim, factor, [&](int64_t i) { return q + row[i] * call.q_strides[2]; }, lanes.q);
  const int64_t end = largest(lanes.end, lanes.count), low_end = largest(lanes.low, lanes.count);
  for (int64_t key = 0; key < end; key += kPiece) weigh_piece(scratch, key, k, call.k_strides[2]);

  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    if (lanes.sum[lane] > 0.0f) {
      lanes.inverse[lane] /= lanes.sum[lane];
    } else {
      lanes.low[lane] = 0;  // no keys, or NaN among them: the row says nothing
    }
  }
  for (int64_t key = call.sinks / kPiece * kPiece; key < low_end; key += kPiece) {
    const bool kept = key < scratch.kept * kPiece;
    const float* block =
        kept ? scratch.blocks + key / kPiece * kBlock : weigh_piece(scratch, key, k, call.k_strides[2]);
    const int64_t lane = find_lane(lanes, lanes.low, key);
    const bool masked = smallest(lanes.low + lane, lanes.count - lane) < key + kPiece;
    add_scores(lanes, lane, call.segment_lanes, block, key, low_end - key < kPiece ? low_end - key : kPiece, masked,
               scratch.scores, scratch.score_pitch);
  }
}

int64_t count_from(const float* scores, int64_t keys, int32_t least_bits) {
  IntVec count = {};
  for (int64_t key = 0; key < keys; key += kLanes) count -= (IntVec)load(scores + key) >= least_bits;
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  return total;
}

// Writes the best `wanted` keys with a positive score in increasing order, the lower one of equals, and returns how
// many. Scores behind the last key are zeros up to a whole vector.
int64_t choose(const float* scores, int64_t keys, int64_t wanted, int64_t first_key, int32_t* chosen) {
  // More than `wanted` keys have bits >= low, at most `wanted` have bits >= high.
  int32_t low = 0, high = 0x7f800000;
  int64_t above = 0;
  while (above < wanted && high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t count = count_from(scores, keys, middle);
    if (count > wanted) {
      low = middle;
    } else {
      high = middle;
      above = count;
    }
  }
  int64_t equals = low > 0 ? wanted - above : 0;  // how many of those with bits == low
  int64_t count = 0;
  for (int64_t key = 0; key < keys && count < wanted; ++key) {
    int32_t bits;
    memcpy(&bits, scores + key, sizeof bits);
    const bool equal = bits >= low && bits < high && equals > 0;
    equals -= equal;
    chosen[count] = static_cast<int32_t>(first_key + key);
    count += equal || bits >= high;
  }
  return count;
}

// Ranges, slices and the rest of the columns of one segment, whose `count` chosen keys are written.
void write_plan(const VerticalSlashIndex& call, int64_t b, int64_t h, int64_t segment, int64_t count) {
  const int64_t head = b * call.n_heads + h;
  int32_t* chosen = call.chosen + (head * call.segments + segment) * call.max_columns;
  for (int64_t i = count; i < call.max_columns; ++i) chosen[i] = 0;

  const int64_t tile_end = (segment + 1) * (call.segment / call.q_block);
  int64_t below = 0;  // chosen keys before the tile's window, which only moves forward
  for (int64_t tile = segment * (call.segment / call.q_block); tile < tile_end && tile < call.tiles; ++tile) {
    const int64_t last = (tile + 1) * call.q_block < call.n_q ? (tile + 1) * call.q_block : call.n_q;
    const auto low = static_cast<int32_t>(window_start(call, h, tile * call.q_block));
    const auto high = static_cast<int32_t>(clamp(last + call.q_offset, 0, call.n_k));
    const bool has_sinks = low > 0 && call.sinks > 0;
    const int64_t at = head * call.tiles + tile;
    int32_t* ranges = call.ranges + 4 * at;
    ranges[0] = has_sinks ? 0 : low;
    ranges[1] = has_sinks ? static_cast<int32_t>(call.sinks) : high;
    ranges[2] = low;
    ranges[3] = high;
    call.range_slice[2 * at] = static_cast<int32_t>(2 * tile);
    call.range_slice[2 * at + 1] = has_sinks + (high > low);
    while (below < count && chosen[below] < low) ++below;
    call.column_slice[2 * at] = static_cast<int32_t>(segment * call.max_columns);
    call.column_slice[2 * at + 1] = static_cast<int32_t>(below);
  }
}

template <class T>
void index_group(const VerticalSlashIndex& call, const SegmentGroup& group, float* memory) {
  const int64_t b = group.batch, h = group.head;
  const int64_t wanted = call.columns[h] < call.max_columns ? call.columns[h] : call.max_columns;
  const int64_t group_end = (group.first_segment + group.segments) * call.segment;
  const int64_t last_row = (group_end < call.n_q ? group_end : call.n_q) - 1;
  const bool scored = wanted > 0 && window_start(call, h, last_row) > 0;
  Scratch scratch = carve(call, memory);
  if (scored) {
    memset(scratch.scores, 0, group.segments * scratch.score_pitch * sizeof(float));
    for (int64_t sample = 0; sample < call.samples; sample += call.segment_lanes) {
      score_rows<T>(call, group, sample, scratch);
    }
  }
  for (int64_t i = 0; i < group.segments; ++i) {
    const int64_t segment = group.first_segment + i;
    int64_t count = 0;
    if (scored) {
      const int64_t end = (segment + 1) * call.segment;
      const int64_t keys = window_start(call, h, (end < call.n_q ? end : call.n_q) - 1) - call.sinks;
      int32_t* chosen = call.chosen + ((b * call.n_heads + h) * call.segments + segment) * call.max_columns;
      count = choose(scratch.scores + i * scratch.score_pitch + call.sinks, keys, wanted, call.sinks, chosen);
    }
    write_plan(call, b, h, segment, count);
  }
}

}  // namespace

int64_t vertical_slash_index_scratch(const VerticalSlashIndex& call) { return carve(call, nullptr).floats; }

void vertical_slash_index_group(const VerticalSlashIndex& call, const SegmentGroup& group, float* scratch) {
  if (call.bf16) {
    index_group<BFloat16>(call, group, scratch);
  } else {
    index_group<float>(call, group, scratch);
  }
}

}  // namespace scrimp::SCRIMP_ISA
