#include "special.h"

namespace ptx {

namespace {

// Order mirrors decode.py.
enum Special {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kMaskEq,
  kMaskLe,
  kMaskLt,
  kMaskGe,
  kMaskGt,
  kDynamicShared,
  kTotalShared,
  kZero32,
  kZero64,
  kCarry,
};

uint32_t value_of(int kind, const LaunchSettings& s, const int32_t block[3], int warp, int lane) {
  const int thread = warp * kLanes + lane, x = s.block[0], y = s.block[1];
  const uint32_t bit = uint32_t{1} << lane;
  switch (kind) {
    case kTidX:
      return thread % x;
    case kTidY:
      return thread / x % y;
    case kTidZ:
      return thread / (x * y);
    case kNtidX:
    case kNtidY:
    case kNtidZ:
      return s.block[kind - kNtidX];
    case kCtaidX:
    case kCtaidY:
    case kCtaidZ:
      return block[kind - kCtaidX];
    case kNctaidX:
    case kNctaidY:
    case kNctaidZ:
      return s.grid[kind - kNctaidX];
    case kLaneid:
      return lane;
    case kWarpid:
      return warp;
    case kNwarpid:
      return (x * y * s.block[2] + kLanes - 1) / kLanes;
    case kMaskEq:
      return bit;
    case kMaskLe:
      return bit | (bit - 1);
    case kMaskLt:
      return bit - 1;
    case kMaskGe:
      return ~(bit - 1);
    case kMaskGt:
      return ~(bit | (bit - 1));
    case kDynamicShared:
      return s.dynamic_shared;
    case kTotalShared:
      return s.static_shared;
    default:
      return 0;
  }
}

}  // namespace

void fill_special_rows(const Program& program, const LaunchSettings& settings, const int32_t block[3], Warp& w) {
  for (const SpecialRow& special : program.specials) {
    uint32_t* row = w.regs.data() + int64_t{special.row} * kLanes;
    const int words = special.kind == kZero64 ? 2 * kLanes : kLanes;
    for (int i = 0; i < words; ++i) row[i] = value_of(special.kind, settings, block, w.index, i % kLanes);
  }
}

}  // namespace ptx
