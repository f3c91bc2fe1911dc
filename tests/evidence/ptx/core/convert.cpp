// cvt: fast rows for the common conversions, one exact general form for the others.
#include <algorithm>
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

// Types and flags mirror decode.py.
enum Type { kS8, kU8, kS16, kU16, kS32, kU32, kS64, kU64, kHalf, kBrain, kFloat, kDouble, kTensor };
enum Mod { kDst = 0, kSrc = 1, kRound = 2, kFlags = 3, kDstBytes = 4, kSrcBytes = 5 };
enum Flag { kSat = 1, kSatFinite = 2, kRelu = 4, kFtz = 8, kToInteger = 16 };

bool is_float(int64_t type) { return type >= kHalf; }
int bits_of(int64_t type) {
  constexpr int bits[] = {8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 32};
  return bits[type];
}
bool is_signed(int64_t type) { return type == kS8 || type == kS16 || type == kS32 || type == kS64; }

double decode_float(int64_t type, u64 raw) {
  switch (type) {
    case kHalf:
      return from_f16(static_cast<u16>(raw));
    case kBrain:
      return from_bf16(static_cast<u16>(raw));
    case kDouble:
      return std::bit_cast<double>(raw);
    default:
      return std::bit_cast<float>(static_cast<u32>(raw));
  }
}
__int128 decode_integer(int64_t type, u64 raw) {
  const int drop = 64 - bits_of(type);
  if (is_signed(type)) return static_cast<i64>(raw << drop) >> drop;
  return (raw << drop) >> drop;
}

const Format& format_of(int64_t type) {
  switch (type) {
    case kHalf:
      return kF16;
    case kBrain:
      return kBf16;
    case kDouble:
      return kF64;
    case kTensor:
      return kTf32;
    default:
      return kF32;
  }
}

double to_integral(double v, int64_t mode) {
  switch (mode) {
    case kRz:
      return std::trunc(v);
    case kRm:
      return std::floor(v);
    case kRp:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

u64 encode_float(const Instr& in, double v) {
  const int64_t type = in.mod[kDst], flags = in.mod[kFlags];
  const Format& f = format_of(type);
  if (flags & kSat) v = v != v ? 0.0 : std::clamp(v, 0.0, 1.0);
  if ((flags & kRelu) && v < 0) v = 0.0;
  if (flags & kToInteger) v = to_integral(v, in.mod[kRound]);
  u64 bits = round_to(v, f, flags & kToInteger ? int64_t{kRn} : in.mod[kRound]);
  const u64 magnitude = bits & ~f.sign();
  if ((flags & kSatFinite) && magnitude == f.infinity()) bits -= 1;
  if ((flags & kFtz) && type == kFloat && magnitude < (u64{1} << 23)) bits &= f.sign();
  return type == kTensor ? bits << 13 : bits;
}

u64 clamp_to(int64_t type, __int128 v) {
  const int bits = bits_of(type);
  const __int128 one = 1;
  const __int128 low = is_signed(type) ? -(one << (bits - 1)) : 0;
  const __int128 high = (one << (is_signed(type) ? bits - 1 : bits)) - 1;
  return static_cast<u64>(std::clamp(v, low, high));
}
u64 float_to_integer(const Instr& in, double v) {
  const int64_t type = in.mod[kDst];
  if (v != v) {
    const bool zero = in.mod[kSrc] != kDouble && bits_of(type) != 64;
    return zero ? 0 : u64{1} << (bits_of(type) - 1);
  }
  const double r = std::clamp(to_integral(v, in.mod[kRound]), -0x1p100, 0x1p100);
  return clamp_to(type, static_cast<__int128>(r));
}

u64 convert(const Instr& in, u64 raw) {
  const int64_t dst = in.mod[kDst], src = in.mod[kSrc];
  if (is_float(src)) {
    double v = decode_float(src, raw);
    if ((in.mod[kFlags] & kFtz) && src == kFloat && std::fabs(v) < 0x1p-126) v = std::copysign(0.0, v);
    return is_float(dst) ? encode_float(in, v) : float_to_integer(in, v);
  }
  const __int128 v = decode_integer(src, raw);
  if (is_float(dst)) {
    const u64 magnitude = static_cast<u64>(v < 0 ? -v : v);
    return round_pack(v < 0, magnitude, 0, format_of(dst), in.mod[kRound]);
  }
  return in.mod[kFlags] & kSat ? clamp_to(dst, v) : static_cast<u64>(v);
}

void general(Exec& x, const Instr& in, Mask mask) {
  const int64_t dst = in.mod[kDst];
  const int drop = 64 - bits_of(dst);
  const u64 keep = in.mod[kDstBytes] == 8 ? ~u64{0} : (u64{1} << (8 * in.mod[kDstBytes])) - 1;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    u64 v = convert(in, in.mod[kSrcBytes] == 8 ? x.in<u64>(in.op[1])[i] : x.in<u32>(in.op[1])[i]);
    v = is_signed(dst) ? static_cast<u64>(static_cast<i64>(v << drop) >> drop) : (v << drop) >> drop;
    if (in.mod[kDstBytes] == 8)
      x.out<u64>(in.op[0])[i] = v & keep;
    else
      x.out<u32>(in.op[0])[i] = static_cast<u32>(v & keep);
  }
}

// Two floats into one packed word: the first operand is the upper half.
void general_pair(Exec& x, const Instr& in, Mask mask) {
  const u32 *high = x.in<u32>(in.op[1]), *low = x.in<u32>(in.op[2]);
  Result<u32> out(x, in.op[0], mask);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) out.target[i] = static_cast<u32>(convert(in, high[i]) << 16 | convert(in, low[i]));
}

// Integer rows of 32 bits: mod[0] is the distance of the field from the top, mod[1] its sign,
// mod[2] the mask of the destination register.
void narrow(Exec& x, const Instr& in, Mask mask) {
  Result<u32> out(x, in.op[0], mask);
  const u32* a = x.in<u32>(in.op[1]);
  const int drop = static_cast<int>(in.mod[0]);
  const u32 keep = static_cast<u32>(in.mod[2]);
  u32* o = out.target;
  if (in.mod[1]) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) o[i] = static_cast<u32>(static_cast<i32>(a[i] << drop) >> drop) & keep;
  } else {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) o[i] = ((a[i] << drop) >> drop) & keep;
  }
}

u32 pair_bf16(u32 a, u32 b) { return u32{to_bf16(std::bit_cast<float>(a))} << 16 | to_bf16(std::bit_cast<float>(b)); }
u32 pair_f16(u32 a, u32 b) { return u32{to_f16(std::bit_cast<float>(a))} << 16 | to_f16(std::bit_cast<float>(b)); }

const Entry kEntries[] = {
    {"cvt", general},
    {"cvt.pair", general_pair},
    {"cvt.narrow", narrow},
    {"cvt.64.s32", map1<i64, i32, [](i32 a) -> i64 { return a; }>},
    {"cvt.64.u32", map1<u64, u32, [](u32 a) -> u64 { return a; }>},
    {"cvt.32.64", map1<u32, u64, [](u64 a) -> u32 { return static_cast<u32>(a); }>},
    {"cvt.f32.s32", map1<float, i32, [](i32 a) -> float { return static_cast<float>(a); }>},
    {"cvt.f32.u32", map1<float, u32, [](u32 a) -> float { return static_cast<float>(a); }>},
    {"cvt.f32.f16", map1<float, u16, from_f16>},
    {"cvt.f32.bf16", map1<float, u16, from_bf16>},
    {"cvt.bf16.f32", map1<u16, float, to_bf16>},
    {"cvt.f16.f32", map1<u16, float, [](float a) -> u16 { return to_f16(a); }>},
    {"cvt.bf16x2.f32", map2<u32, u32, pair_bf16>},
    {"cvt.f16x2.f32", map2<u32, u32, pair_f16>},
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
