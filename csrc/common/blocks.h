// Sizes of launches.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace scrimp {

// The number of blocks of a launch of `op`, along the axis that takes most.
inline uint32_t blocks_of(const char* op, int64_t blocks) {
  SCRIMP_CHECK(blocks <= INT32_MAX, op, ": ", blocks, " blocks; one launch has at most ", INT32_MAX);
  return static_cast<uint32_t>(blocks);
}

}  // namespace scrimp
