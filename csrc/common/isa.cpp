// scrimp::_set_isa: which copy of the kernels runs. Tests use it to cover every path in one process.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "common/check.h"
#include "common/dispatch.h"

namespace scrimp {

static std::atomic<Isa> chosen{detect_isa()};

Isa isa() { return chosen.load(std::memory_order_relaxed); }

// Returns the instruction set that was in use before.
static int64_t set_isa(int64_t wanted) {
  const auto best = static_cast<int64_t>(detect_isa());
  SCRIMP_CHECK(wanted >= 0 && wanted <= best, "_set_isa: instruction set ", wanted,
               " is not available; this processor runs 0 to ", best, " (", isa_names[best], ")");
  return static_cast<int64_t>(chosen.exchange(static_cast<Isa>(wanted)));
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CompositeImplicitAutograd, m) { m.impl("_set_isa", TORCH_BOX(&scrimp::set_isa)); }
