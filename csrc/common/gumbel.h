// Gumbel noise that is a function of (seed, position, token) alone, as in ops/_noise.py.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SCRIMP_ON_DEVICES __host__ __device__
#else
#define SCRIMP_ON_DEVICES
#endif

namespace scrimp {

// The finaliser of splitmix64 and its step.
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;
SCRIMP_ON_DEVICES constexpr uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

SCRIMP_ON_DEVICES static inline uint64_t noise_key(int64_t seed, uint64_t position) {
  return mix(mix(static_cast<uint64_t>(seed)) + position * kGamma);
}

SCRIMP_ON_DEVICES static inline uint64_t noise_bits(uint64_t key, int64_t token) {
  return mix(key + static_cast<uint64_t>(token + 1) * kGamma) >> 12;
}

// The noise of 52 hashed bits: g = -log(-log u) with u = (bits + 1/2) / 2^52; the logarithm is the device's.
SCRIMP_ON_DEVICES static inline double gumbel(uint64_t bits) {
  return -log(-log((static_cast<double>(bits) + 0.5) * 0x1p-52));
}

}  // namespace scrimp
