// The instruction sets that kernels are compiled for, and which of them this processor has.
#pragma once

namespace scrimp {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

inline constexpr const char* isa_names[] = {"portable", "avx2", "avx512", "avx512vnni"};

#if defined(SCRIMP_EMULATE_VNNI)
inline constexpr bool emulate_vnni = true;  // the kernels for VNNI do without its instruction
#else
inline constexpr bool emulate_vnni = false;
#endif

// The widest instruction set that both the processor and the operating system support.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return emulate_vnni || __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace scrimp
