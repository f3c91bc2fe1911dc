// Run-time choice among the copies of a kernel that were compiled per instruction set.
//
//   SCRIMP_DECLARE_KERNEL(void scale(float* x, long n, float by))    in <op>.h: declares every copy
//   SCRIMP_KERNEL(scale)(x, n, by)                                   in <op>.cpp: calls the chosen one
//
// and SCRIMP_DECLARE_VNNI_KERNEL, SCRIMP_VNNI_KERNEL for those of a <op>.vnni.kernel.cpp, which has one copy more.
#pragma once

#include "common/cpu_features.h"

namespace scrimp {

// The instruction set in use: the widest one, unless scrimp::_set_isa chose another.
Isa isa();

}  // namespace scrimp

#if defined(__x86_64__)
#define SCRIMP_DECLARE_KERNEL(...) \
  namespace scrimp::portable {     \
  __VA_ARGS__;                     \
  }                                \
  namespace scrimp::avx2 {         \
  __VA_ARGS__;                     \
  }                                \
  namespace scrimp::avx512 {       \
  __VA_ARGS__;                     \
  }
#define SCRIMP_KERNEL(name)                                          \
  (::scrimp::isa() >= ::scrimp::Isa::avx512 ? ::scrimp::avx512::name \
   : ::scrimp::isa() == ::scrimp::Isa::avx2 ? ::scrimp::avx2::name   \
                                            : ::scrimp::portable::name)
#define SCRIMP_DECLARE_VNNI_KERNEL(...) \
  SCRIMP_DECLARE_KERNEL(__VA_ARGS__)    \
  namespace scrimp::avx512vnni {        \
  __VA_ARGS__;                          \
  }
#define SCRIMP_VNNI_KERNEL(name) \
  (::scrimp::isa() == ::scrimp::Isa::avx512vnni ? ::scrimp::avx512vnni::name : SCRIMP_KERNEL(name))
#else
#define SCRIMP_DECLARE_KERNEL(...) \
  namespace scrimp::portable {     \
  __VA_ARGS__;                     \
  }
#define SCRIMP_KERNEL(name) ::scrimp::portable::name
#define SCRIMP_DECLARE_VNNI_KERNEL SCRIMP_DECLARE_KERNEL
#define SCRIMP_VNNI_KERNEL SCRIMP_KERNEL
#endif
