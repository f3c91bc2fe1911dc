// Special registers (%tid, %laneid ...) are ordinary rows, filled when a warp starts.
#pragma once

#include "state.h"

namespace ptx {

void fill_special_rows(const Program& program, const LaunchSettings& settings, const int32_t block[3], Warp& w);

}  // namespace ptx
