// Softmax attention of one tile of queries over the keys its plan names; queries lie in the lanes.
//
//   keys of the tile, in pieces of kPiece                                   flash attention's loop
//     S^T[key, query]  = K[key, :] . Q^T[:, query]                          score_piece
//     P^T[key, query]  = 2^(S^T - max), sums and the rescale of the past    softmax_piece
//     O^T[dim, query]  = O^T * rescale + V^T[dim, key] . P^T[key, query]    value_piece
//   O = (O^T / sum)^T,  lse = (max + log2 sum) * ln 2                       write_out
//
// Both products are the same micro-kernel: scalars of K (or V), broadcast from where they lie in
// memory, times vectors of 64 queries. So a key is only a pointer to its row: ranges of any alignment,
// scattered columns and head groups cost nothing extra, and nothing is repeated, padded or packed
// but Q, once a tile. Maxima and sums are vertical: no horizontal reduction anywhere.
#include "cpu/sparse_attention.h"

#include <string.h>

#include "common/query_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

static_assert(kQueryLanes == kPitch);
constexpr int64_t kPiece = 126;  // keys whose S^T stays in cache; a multiple of kStripRows
constexpr float kLn2 = 0.693147181f;

// The next keys of a tile: tokens in increasing order and the rows they stand for.
struct Piece {
  int64_t keys;
  int32_t token[kPiece];
  const float* k[kPiece + kStripRows];  // some more behind the end, to be prefetched
  const float* v[kPiece];
};

// Walks a tile's keys in order: its ranges, and those of its columns that lie in no range.
struct KeyWalk {
  const int32_t (*range)[2];
  const int32_t (*ranges_end)[2];
  const int32_t* column;
  const int32_t* columns_end;
  int32_t limit;  // keys from here on are hidden from every query of the tile
  int32_t done;   // keys before this one are listed, or hidden from every query

  int64_t take(int32_t* token) {
    int64_t count = 0;
    while (count < kPiece) {
      int32_t start = limit;
      if (range < ranges_end && (*range)[0] < limit) start = (*range)[0] > done ? (*range)[0] : done;
      if (column < columns_end && *column < start) {
        token[count++] = *column++;
        continue;
      }
      if (start >= limit) break;
      int64_t stop = (*range)[1] < limit ? (*range)[1] : limit;
      if (stop > start + (kPiece - count)) stop = start + (kPiece - count);
      for (int64_t i = start; i < stop; ++i) token[count++] = static_cast<int32_t>(i);
      done = static_cast<int32_t>(stop);
      if (done >= (*range)[1]) ++range;
      while (column < columns_end && *column < done) ++column;
    }
    return count;
  }
};

// What one tile works on; all of it lies in the worker's scratch.
struct Tile {
  int64_t queries;
  int64_t vectors;  // ceil(queries / kLanes); lanes behind the last query hold zeros
  int64_t head_dim;
  int64_t first_position;  // query i sees keys up to first_position + i, if causal
  bool causal;
  const int32_t* row_start;  // [64] first key of each query; read only below last_start
  int32_t last_start;        // the largest of them, 0 without any
  float* q;                  // Q^T [D, 64], times scale * log2 e
  float* out;                // O^T [D, 64]
  float* scores;             // S^T, then P^T [kPiece, 64]
  float* max;                // [64] so far
  float* sum;                // [64] so far
  float* rescale;            // [64] 2^(old max - new max)
  float* staged;             // bf16 only: K and V as fp32, [2, kPiece, D]
};

// S^T of the piece, -inf where causality or row_start hides a key; raises tile.max. (Tile by value: a store cannot
// change it.)
[[gnu::flatten]] void score_piece(const Tile tile, const Piece& piece) {
  const bool late = tile.causal && piece.token[piece.keys - 1] > tile.first_position;
  const bool early = piece.token[0] < tile.last_start;
  for_strips(piece.keys, tile.vectors, [&](auto rows, auto width, int64_t key, int64_t vector) {
    constexpr int R = rows.value, C = width.value;
    const int64_t lane = vector * kLanes;
    Vec score[R][C];
    for_vectors<R, C>([&](int r, int c) { score[r][c] = Vec{}; });
    const float* k[R];
    for_vectors<R, 1>([&](int r, int) { k[r] = piece.k[key + r]; });
    for (int64_t d = 0; d < tile.head_dim; d += kLine) {
      for_vectors<R, 1>([&](int r, int) {  // V of these keys, K of the next
        if (kStrips > 1 && r % kStrips != vector / kStripVectors) return;
        __builtin_prefetch(piece.v[key + r] + d);
        __builtin_prefetch(piece.k[key + R + r] + d);
      });
      const int64_t depth = tile.head_dim - d < kLine ? tile.head_dim - d : kLine;
      multiply_add(score, tile.q + d * kPitch + lane, depth, [&](int r, int64_t i) { return k[r][d + i]; });
    }
    if (late) {
      for_vectors<R, C>([&](int r, int c) {
        const int64_t first_seeing = piece.token[key + r] - tile.first_position - lane - c * kLanes;
        score[r][c] = lane_index() >= static_cast<float>(first_seeing) ? score[r][c] : broadcast(-kInfinity);
      });
    }
    if (early) {
      for_vectors<R, C>([&](int r, int c) {
        IntVec start;
        memcpy(&start, tile.row_start + lane + c * kLanes, sizeof start);
        score[r][c] = start <= piece.token[key + r] ? score[r][c] : broadcast(-kInfinity);
      });
    }
    Vec high[C];
    for_vectors<1, C>([&](int, int c) { high[c] = load(tile.max + lane + c * kLanes); });
    for_vectors<R, C>([&](int r, int c) {
      high[c] = max(high[c], score[r][c]);
      store(tile.scores + (key + r) * kPitch + lane + c * kLanes, score[r][c]);
    });
    for_vectors<1, C>([&](int, int c) { store(tile.max + lane + c * kLanes, high[c]); });
  });
}

// P^T = 2^(S^T - max) in place; brings sum up to date and sets rescale. A piece is summed from zero, here and in
// value_piece, so that rounding errors grow with the square root of the piece, not of the whole row.
void softmax_piece(const Tile& tile, const float* old_max, int64_t keys) {
  for (int64_t lane = 0; lane < tile.vectors * kLanes; lane += kLanes) {
    const Vec high = load(tile.max + lane);
    const Vec base = high == -kInfinity ? Vec{} : high;  // a lane without any key so far: 2^(-inf - 0) = 0
    const Vec rescale = exp2(load(old_max + lane) - base);
    Vec sum{};
    for (int64_t key = 0; key < keys; ++key) {
      float* p = tile.scores + key * kPitch + lane;
      const Vec weight = exp2(load(p) - base);
      sum += weight;
      store(p, weight);
    }
    store(tile.sum + lane, fma(load(tile.sum + lane), rescale, sum));
    store(tile.rescale + lane, rescale);
  }
}

// O^T = O^T * rescale + V^T P^T
[[gnu::flatten]] void value_piece(const Tile tile, const Piece& piece) {
  for_strips(tile.head_dim, tile.vectors, [&](auto rows, auto width, int64_t dim, int64_t vector) {
    constexpr int R = rows.value, C = width.value;
    const int64_t lane = vector * kLanes;
    float* out = tile.out + dim * kPitch + lane;
    Vec sum[R][C];
    for_vectors<R, C>([&](int r, int c) { sum[r][c] = Vec{}; });
    multiply_add(sum, tile.scores + lane, piece.keys, [&](int r, int64_t key) { return piece.v[key][dim + r]; });
    for_vectors<R, C>([&](int r, int c) {
      float* past = out + r * kPitch + c * kLanes;
      store(past, fma(load(past), load(tile.rescale + lane + c * kLanes), sum[r][c]));
    });
  });
}

// Points the piece at rows of K and V; bf16 rows are first widened into scratch.
void find_rows(const Tile&, Piece& piece, const float* k, int64_t k_stride, const float* v, int64_t v_stride) {
  for (int64_t i = 0; i < piece.keys; ++i) {
    piece.k[i] = k + piece.token[i] * k_stride;
    piece.v[i] = v + piece.token[i] * v_stride;
  }
}

void find_rows(const Tile& tile, Piece& piece, const BFloat16* k, int64_t k_stride, const BFloat16* v,
               int64_t v_stride) {
  const auto widen = [&](const BFloat16* from, float* to) {
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      store_first(to + d, load_first(from + d, tile.head_dim - d), tile.head_dim - d);
    }
    return to;
  };
  float* staged_k = tile.staged;
  float* staged_v = tile.staged + kPiece * tile.head_dim;
  for (int64_t i = 0; i < piece.keys; ++i) {
    piece.k[i] = widen(k + piece.token[i] * k_stride, staged_k + i * tile.head_dim);
    piece.v[i] = widen(v + piece.token[i] * v_stride, staged_v + i * tile.head_dim);
  }
}

// out[i, :] = O^T[:, i] / sum[i], lse[i] = ln sum_j exp(score); 0 and -inf for a query without keys.
template <class T>
void write_out(const Tile& tile, T* out, int64_t stride, float* lse) {
  for (int64_t first = 0; first < tile.queries; first += kLanes) {
    const Vec sum = load(tile.sum + first);
    const Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      Vec block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) {
        block[j] = d + j < tile.head_dim ? load(tile.out + (d + j) * kPitch + first) * inverse : Vec{};
      }
      transpose(block);
      for (int64_t i = 0; i < kLanes && first + i < tile.queries; ++i) {
        store_first(out + (first + i) * stride + d, block[i], tile.head_dim - d);
      }
    }
  }
  for (int64_t i = 0; i < tile.queries; ++i) lse[i] = tile.max[i] * kLn2 + __builtin_logf(tile.sum[i]);
}

// row_start of a tile's queries (other lanes repeat the first), its smallest and its largest.
struct Starts {
  int32_t row[kQueryLanes];
  int32_t first = 0, last = 0;

  Starts(const SparseAttention& call, const QueryTile& where) {
    if (call.row_start == nullptr) return;
    const int32_t* start = call.row_start + where.batch * call.row_start_stride + where.first_query;
    first = last = start[0];
    for (int64_t i = 0; i < kQueryLanes; ++i) {
      row[i] = start[i < where.queries ? i : 0];
      if (row[i] < first) first = row[i];
      if (row[i] > last) last = row[i];
    }
  }
};

template <class T>
void attend(const SparseAttention& call, const QueryTile& where, float* scratch) {
  const int64_t b = where.batch, h = where.head, g = h / (call.n_heads / call.n_groups);
  const auto row = [&](auto* base, const int64_t (&strides)[3], int64_t head, int64_t token) {
    return base + b * strides[0] + head * strides[1] + token * strides[2];
  };
  const auto slice = [&](const int32_t* base, const int64_t (&strides)[2]) {
    return base + b * strides[0] + h * strides[1];
  };
  const int64_t D = call.head_dim;
  const Starts starts(call, where);
  const Tile tile{.queries = where.queries,
                  .vectors = (where.queries + kLanes - 1) / kLanes,
                  .head_dim = D,
                  .first_position = where.first_query + call.q_offset,
                  .causal = call.causal,
                  .row_start = starts.row,
                  .last_start = starts.last,
                  .q = scratch,
                  .out = scratch + D * kPitch,
                  .scores = scratch + 2 * D * kPitch,
                  .max = scratch + (2 * D + kPiece) * kPitch,
                  .sum = scratch + (2 * D + kPiece + 1) * kPitch,
                  .rescale = scratch + (2 * D + kPiece + 2) * kPitch,
                  .staged = scratch + (2 * D + kPiece + 3) * kPitch};

  const int64_t plan_tile = where.first_query / call.q_block;
  const int32_t* ranges = slice(call.range_slice, call.range_slice_strides) + 2 * plan_tile;
  const int32_t* columns = slice(call.column_slice, call.column_slice_strides) + 2 * plan_tile;
  KeyWalk walk;
  walk.range = reinterpret_cast<const int32_t (*)[2]>(slice(call.ranges, call.ranges_strides)) + ranges[0];
  walk.ranges_end = walk.range + ranges[1];
  walk.column = slice(call.columns, call.columns_strides) + columns[0];
  walk.columns_end = walk.column + columns[1];
  walk.done = starts.first;
  while (walk.range < walk.ranges_end && (*walk.range)[1] <= walk.done) ++walk.range;
  while (walk.column < walk.columns_end && *walk.column < walk.done) ++walk.column;
  const int64_t hidden = tile.first_position + tile.queries;
  walk.limit = static_cast<int32_t>(!call.causal || hidden > call.n_k ? call.n_k : hidden < 0 ? 0 : hidden);

  const T* q = row(static_cast<const T*>(call.q), call.q_strides, h, where.first_query);
  const auto query = [&](int64_t i) { return i < where.queries ? q + i * call.q_strides[2] : nullptr; };
  pack_queries(where.queries, D, call.scale * kLog2E, query, tile.q);
  for (int64_t i = 0; i < kPitch; ++i) {
    tile.max[i] = -kInfinity;
    tile.sum[i] = 0.0f;
  }
  for (int64_t i = 0; i < D * kPitch; ++i) tile.out[i] = 0.0f;

  const T* k = row(static_cast<const T*>(call.k), call.k_strides, g, 0);
  const T* v = row(static_cast<const T*>(call.v), call.v_strides, g, 0);
  Piece piece;
  while ((piece.keys = walk.take(piece.token)) > 0) {
    find_rows(tile, piece, k, call.k_strides[2], v, call.v_strides[2]);
    for (int i = 0; i < kStripRows; ++i) piece.k[piece.keys + i] = piece.k[piece.keys - 1];
    float old_max[kPitch];
    memcpy(old_max, tile.max, sizeof old_max);
    score_piece(tile, piece);
    softmax_piece(tile, old_max, piece.keys);
    value_piece(tile, piece);
  }
  write_out(tile, row(static_cast<T*>(call.out), call.out_strides, h, where.first_query), call.out_strides[2],
            call.lse + (b * call.n_heads + h) * call.n_q + where.first_query);
}

}  // namespace

int64_t sparse_attention_scratch(const SparseAttention& call) {
  return (2 * call.head_dim + kPiece + 3) * kPitch + (call.bf16 ? 2 * kPiece * call.head_dim : 0);
}

void sparse_attention_tile(const SparseAttention& call, const QueryTile& tile, float* scratch) {
  if (call.bf16) {
    attend<BFloat16>(call, tile, scratch);
  } else {
    attend<float>(call, tile, scratch);
  }
}

}  // namespace scrimp::SCRIMP_ISA
