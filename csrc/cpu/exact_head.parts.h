// exact_head on the CPU: one call's tensors, its hidden states as `linear` takes them, and as the screen sees them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "cpu/exact_head.h"
#include "cpu/linear.h"

namespace scrimp {

constexpr int64_t kItemTiles = 32;  // tiles that a thread screens at once

// The op's tensors, and the sizes of one call.
struct Head {
  const Tensor &weight, &codes, &scales, &error, &norm;
  const std::optional<Tensor>& basis;
  double slack;
  int64_t wide, k, M, K, V, groups, tiles, most;
  bool bf16;

  int64_t width() const { return groups * kScreenGroup; }
  int64_t element() const { return bf16 ? 2 : 4; }
  int64_t tile_bytes() const { return kScreenTile * kScreenGroup / 2 * (groups + wide); }
};

// Memory of this call alone; nothing is set.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : data(new T[std::max<int64_t>(count, 1)]) {}
  T* operator+(int64_t i) const { return data.get() + i; }
  std::unique_ptr<T[]> data;
};

// Hidden states, packed for `linear` one by one: their logits have the bits of the dense head.
struct Exact {
  const Head& head;
  int64_t pitch;
  Buffer<float> packed;

  Exact(const Head& head_in, const Rows& x) : head(head_in), pitch(head.K + kLinearPad), packed((pitch * head.M)) {
    for (int64_t m = 0; m < head.M; ++m) {
      const void* row = x.row(m);
      SCRIMP_KERNEL(linear_pack)
      ({.rows = 1, .inputs = head.K, .x = &row, .packed = packed + m * pitch, .bf16 = head.bf16});
    }
  }

  void prefetch(int64_t row) const {
    const int64_t bytes = head.K * head.element();
    const char* first = static_cast<const char*>(head.weight.data_ptr()) + row * head.weight.stride(0) * head.element();
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, 0, 2);
  }

  // Logits of hidden state m for `count` rows of the head from `first` on, or for those of `index`; at most
  // kLinearOutputs.
  void logits(int64_t m, int64_t first, const int32_t* index, int64_t count, float* out) const {
    uint16_t halves[kLinearOutputs];
    const int64_t stride = head.weight.stride(0);
    SCRIMP_KERNEL(linear)
    ({.rows = 1,
      .inputs = head.K,
      .outputs = count,
      .packed = packed + m * pitch,
      .weight = static_cast<const char*>(head.weight.data_ptr()) + first * stride * head.element(),
      .weight_stride = stride,
      .index = index,
      .bias = nullptr,
      .residual = nullptr,
      .residual_offset = 0,
      .out = head.bf16 ? static_cast<void*>(halves) : out,
      .out_stride = count,
      .bf16 = head.bf16});
    for (int64_t i = 0; head.bf16 && i < count; ++i)
      out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(halves[i]) << 16);
  }
};

// What the screen sees of the hidden states: integers and bounds, and with them the intervals of any tiles.
struct Screen {
  const Head& head;
  Buffer<int32_t> pieces, offset;
  std::vector<uint8_t> fine;  // [M / kScreenRows, groups]
  Buffer<float> step, bound;
  Buffer<float> totals;         // [M, tiles, 16], centres without the rows' scales
  Buffer<float> upper, centre;  // [M, tiles], the highest of a tile
  std::vector<char> usable;     // whether the bound is a number

  Screen(const Head& head_in, const Rows& x)
      : head(head_in),
        pieces(head.M * head.width() / 2),
        offset(head.M * head.groups),
        fine((head.M + kScreenRows - 1) / kScreenRows * head.groups),
        step(head.M * head.groups),
        bound(head.M),
        totals(head.M * head.tiles * kScreenTile),
        upper(head.M * head.tiles),
        centre(head.M * head.tiles),
        usable(head.M) {
    const int64_t D = head.width();
    Buffer<float> states(head.M * head.K), coordinates(head.M * D);
    std::vector<double> length(head.M);
    for (int64_t m = 0; m < head.M; ++m) {
      float* to = states + m * head.K;
      for (int64_t i = 0; i < head.K; ++i) {
        to[i] = head.bf16 ? __builtin_bit_cast(float, uint32_t{reinterpret_cast<const uint16_t*>(x.row(m))[i]} << 16)
                          : reinterpret_cast<const float*>(x.row(m))[i];
        length[m] += static_cast<double>(to[i]) * to[i];
      }
    }
    rotate(states + 0, coordinates + 0);
    for (int64_t m = 0; m < head.M; ++m) {
      const float* own = coordinates + m * D;
      usable[m] = std::isfinite(length[m]) && std::all_of(own, own + D, [](float h) { return std::fabs(h) < 1e30f; });
      if (!usable[m]) std::fill_n(coordinates + m * D, D, 0.0f);
      SCRIMP_VNNI_KERNEL(exact_head_state)
      ({.groups = head.groups,
        .wide = head.wide,
        .coordinates = own,
        .error = static_cast<const float*>(head.error.data_ptr()),
        .norm = static_cast<const float*>(head.norm.data_ptr()),
        .rest = head.slack * std::sqrt(length[m]),
        .pieces = pieces + m / kScreenRows * kScreenRows * D / 2 + m % kScreenRows,
        .stride = together(m),
        .fine = fine.data() + m / kScreenRows * head.groups,
        .offset = offset + m * head.groups,
        .step = step + m * head.groups,
        .bound = bound + m});
      usable[m] = usable[m] && std::isfinite(bound.data[m]);
    }
  }

  // coordinates = states R^T
  void rotate(const float* states, float* coordinates) const {
    const int64_t K = head.K, D = head.width();
    if (!head.basis) {
      for (int64_t m = 0; m < head.M; ++m) {
        std::copy_n(states + m * K, K, coordinates + m * D);
        std::fill_n(coordinates + m * D + K, D - K, 0.0f);
      }
      return;
    }
    const auto* basis = static_cast<const float*>(head.basis->data_ptr());
    for (int64_t first = 0; first < head.M; first += kLinearRows) {
      const int64_t rows = std::min(kLinearRows, head.M - first);
      const void* x[kLinearRows];
      for (int64_t m = 0; m < rows; ++m) x[m] = states + (first + m) * K;
      Buffer<float> packed(rows * (K + kLinearPad));
      SCRIMP_KERNEL(linear_pack)({.rows = rows, .inputs = K, .x = x, .packed = packed + 0, .bf16 = false});
      for_each_item(D / kLinearOutputs, [&](int64_t item, int64_t) {
        const int64_t n = item * kLinearOutputs;
        SCRIMP_KERNEL(linear)
        ({.rows = rows,
          .inputs = K,
          .outputs = kLinearOutputs,
          .packed = packed + 0,
          .weight = basis + n * K,
          .weight_stride = K,
          .index = nullptr,
          .bias = nullptr,
          .residual = nullptr,
          .residual_offset = 0,
          .out = coordinates + first * D + n,
          .out_stride = D,
          .bf16 = false});
      });
    }
  }

  // Hidden states that pass over a tile together with m.
  int64_t together(int64_t m) const { return std::min(kScreenRows, head.M - m / kScreenRows * kScreenRows); }

  ScreenBlock block(int64_t m, int64_t rows, int64_t tile, int64_t tiles) const {
    return {.rows = rows,
            .groups = head.groups,
            .wide = head.wide,
            .tiles = tiles,
            .pieces = pieces + m * head.width() / 2,
            .fine = fine.data() + m / kScreenRows * head.groups,
            .offset = offset + m * head.groups,
            .step = step + m * head.groups,
            .bound = bound + m,
            .codes = static_cast<const uint8_t*>(head.codes.data_ptr()) + tile * head.tile_bytes(),
            .scales = static_cast<const float*>(head.scales.data_ptr()) + tile * kScreenTile,
            .totals = totals + (m * head.tiles + tile) * kScreenTile,
            .upper = upper + m * head.tiles + tile,
            .centre = centre + m * head.tiles + tile,
            .best_stride = head.tiles};
  }

  // Fills `totals`, `upper` and `centre`.
  void scan() const {
    for_each_item((head.tiles + kItemTiles - 1) / kItemTiles, [&](int64_t item, int64_t) {
      const int64_t first = item * kItemTiles, count = std::min(kItemTiles, head.tiles - first);
      for (int64_t m = 0; m < head.M; m += kScreenRows)
        SCRIMP_VNNI_KERNEL(exact_head_screen)(block(m, together(m), first, count));
    });
  }

  // The middle of a row's interval where `by` is 0, its upper end where it is the bound.
  float at(int64_t m, int64_t row, float by) const {
    return static_cast<const float*>(head.scales.data_ptr())[row] * (*(totals + m* head.tiles* kScreenTile + row) + by);
  }

  int64_t rows_of(int64_t tile) const { return std::min(kScreenTile, head.V - tile * kScreenTile); }
};

}  // namespace scrimp
