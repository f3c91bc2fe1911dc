// exact_head on the CPU: what the driver hands to the kernels.
#pragma once

#include <cstdint>

#include "common/dispatch.h"

namespace scrimp {

constexpr int64_t kScreenGroup = 64;  // coordinates that share a step of the hidden state, and a bound
constexpr int64_t kScreenTile = 16;   // rows of the head that lie interleaved
constexpr int64_t kScreenRows = 8;    // hidden states of one pass over a tile at most

// One hidden state in the coordinates of the screen, and how it is seen by the integers.
struct ScreenState {
  int64_t groups, wide;
  const float* coordinates;  // [64 groups]
  const float* error;        // [groups]
  const float* norm;         // [groups]
  double rest;               // what the bound holds besides
  int32_t* pieces;           // [32 groups], every stride: integers of 16 bits, as the instruction set wants them
  int64_t stride;
  uint8_t* fine;    // [groups]: set to 1 where an integer needs its lower byte, left as it is elsewhere
  int32_t* offset;  // [groups]: what the codes' offset adds to a sum of products
  float* step;      // [groups]
  float* bound;     // one
};

// Hidden states, at most kScreenRows, against tiles one after the other.
struct ScreenBlock {
  int64_t rows, groups, wide, tiles;
  const int32_t* pieces;  // [32 groups, rows]
  const uint8_t* fine;    // [groups]: whether some state's integers have lower bytes
  const int32_t* offset;  // [rows, groups]
  const float* step;      // [rows, groups]
  const float* bound;     // [rows]
  const uint8_t* codes;   // [tiles, bytes of a tile]
  const float* scales;    // [tiles, 16]
  float* totals;          // [rows, tiles, 16], a row every 16 best_stride: centres without the rows' scales
  float* upper;           // [rows, tiles], a row every best_stride: a tile's highest upper end
  float* centre;          // like upper: its highest centre
  int64_t best_stride;
};

}  // namespace scrimp

// exact_head_state turns coordinates into integers and the bound, exact_head_screen computes upper ends of intervals.
SCRIMP_DECLARE_VNNI_KERNEL(void exact_head_state(const ScreenState& state);
                           void exact_head_screen(const ScreenBlock& block))
