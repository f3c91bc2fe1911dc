// How codes that are turned lie in memory.
#pragma once

#include <cstdint>

namespace scrimp {

constexpr int64_t kInt4Tile = 128;  // outputs whose codes of a channel are 64 bytes, side by side

}  // namespace scrimp
