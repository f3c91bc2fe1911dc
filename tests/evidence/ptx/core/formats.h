// Floating-point formats and exact rounding between them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

// Mirrors decode.py.
enum Rounding : int64_t { kRn = 0, kRz = 1, kRm = 2, kRp = 3, kRna = 4 };

struct Format {
  int mantissa;  // stored bits
  int exponent;  // bits
  uint64_t nan;  // canonical
  constexpr int bias() const { return (1 << (exponent - 1)) - 1; }
  constexpr int lowest() const { return 1 - bias(); }
  constexpr uint64_t infinity() const { return ((uint64_t{1} << exponent) - 1) << mantissa; }
  constexpr uint64_t sign() const { return uint64_t{1} << (mantissa + exponent); }
};
constexpr Format kF16{10, 5, 0x7FFF};
constexpr Format kBf16{7, 8, 0x7FFF};
constexpr Format kF32{23, 8, 0x7FFFFFFF};
constexpr Format kF64{52, 11, 0x7FFFFFFFFFFFFFFF};
constexpr Format kTf32{10, 8, 0x3FFFF};  // upper 19 bits of a float

// The bits of (-1)^negative * m * 2^e rounded to the format; overflow goes by the mode.
inline uint64_t round_pack(bool negative, uint64_t m, int e, const Format& f, int64_t mode) {
  const uint64_t sign = negative ? f.sign() : 0;
  if (m == 0) return sign;
  const int top = 63 - std::countl_zero(m);
  const int scale = top + e > f.lowest() ? top + e : f.lowest();
  const int drop = scale - f.mantissa - e;  // low bits of m that do not fit
  uint64_t kept = drop <= 0 ? m << -drop : (drop > 63 ? 0 : m >> drop);
  if (drop > 0) {
    const uint64_t rest = drop > 63 ? m : m & ((uint64_t{1} << drop) - 1);
    const uint64_t half = drop > 64 ? ~uint64_t{0} : uint64_t{1} << (drop - 1);
    bool up = false;
    switch (mode) {
      case kRn:
        up = drop <= 64 && (rest > half || (rest == half && (kept & 1)));
        break;
      case kRna:
        up = drop <= 64 && rest >= half;
        break;
      case kRm:
        up = rest && negative;
        break;
      case kRp:
        up = rest && !negative;
        break;
      default:
        break;
    }
    kept += up;
  }
  if (scale - f.lowest() > 2 * f.bias())
    kept = ~uint64_t{0} >> 1;  // far beyond the largest
  else
    kept += static_cast<uint64_t>(scale - f.lowest()) << f.mantissa;
  if (kept >= f.infinity()) {
    const bool inward = mode == kRz || (mode == kRm && !negative) || (mode == kRp && negative);
    kept = f.infinity() - inward;
  }
  return sign | kept;
}

inline uint64_t round_to(double value, const Format& f, int64_t mode = kRn) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const bool negative = bits >> 63;
  if (value != value) return f.nan;
  const int field = static_cast<int>((bits >> 52) & 2047);
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  if (field == 2047) return f.infinity() | (negative ? f.sign() : 0);
  return round_pack(negative, field ? fraction | (uint64_t{1} << 52) : fraction, (field ? field : 1) - 1075, f, mode);
}

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return value != value ? 0x7FFF : static_cast<uint16_t>(rounded);
}

inline float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7FFF;
  if (rest >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // Scaling by 2^112 is exact and also normalises the subnormal numbers.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}
inline uint16_t to_f16(double value) { return static_cast<uint16_t>(round_to(value, kF16)); }

// a * b + c rounded once to odd, so that a second rounding to a shorter format is exact.
inline double fma_to_odd(double a, double b, double c) {
  const double p = a * b;  // exact for factors of at most 26 bits
  const double s = p + c;
  if (!std::isfinite(s)) return s;
  const double v = s - p, error = (p - (s - v)) + (c - v);
  const uint64_t bits = std::bit_cast<uint64_t>(s);
  if (error == 0 || (bits & 1)) return s;
  return std::bit_cast<double>((error > 0) == (s > 0) ? bits + 1 : bits - 1);
}

}  // namespace ptx
