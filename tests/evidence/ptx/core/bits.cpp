// Bits and moves: logic, shifts, fields, permutes, counts, mov, selp, address windows.
#include <bit>

#include "lanes.h"

namespace ptx {

namespace {

template <class T>
T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<u64>(a) << (n & 63));
}
template <class T>
T shift_right(T a, u32 n) {
  constexpr u32 bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> (n >= bits ? bits - 1 : n));
  else
    return n >= bits ? T{0} : static_cast<T>(a >> (n & (bits - 1)));
}

template <bool kClamp>
u32 funnel_left(u32 low, u32 high, u32 c) {
  const u32 n = kClamp ? (c > 32 ? 32 : c) : c & 31;
  return static_cast<u32>((((u64{high} << 32) | low) << n) >> 32);
}
template <bool kClamp>
u32 funnel_right(u32 low, u32 high, u32 c) {
  const u32 n = kClamp ? (c > 32 ? 32 : c) : c & 31;
  return static_cast<u32>(((u64{high} << 32) | low) >> n);
}

// bfe: position and length are the low 8 bits; beyond the top a signed field repeats the sign.
template <class T>
void bfe(Exec& x, const Instr& in, Mask mask) {
  constexpr int bits = 8 * sizeof(T);
  Result<T> out(x, in.op[0], mask);
  const T* a = x.in<T>(in.op[1]);
  const u32 *b = x.in<u32>(in.op[2]), *c = x.in<u32>(in.op[3]);
  for (int i = 0; i < kLanes; ++i) {
    const int pos = static_cast<int>(b[i] & 255), len = static_cast<int>(c[i] & 255);
    const bool is_signed = std::is_signed_v<T>;
    const int top = pos + len - 1 < bits - 1 ? pos + len - 1 : bits - 1;
    const bool sign = is_signed && len > 0 && ((static_cast<u64>(a[i]) >> top) & 1);
    u64 value = 0;
    if (pos < bits) value = (static_cast<u64>(static_cast<std::make_unsigned_t<T>>(a[i]))) >> pos;
    const int have = len < bits - pos ? len : (bits - pos > 0 ? bits - pos : 0);
    const u64 keep = have >= 64 ? ~u64{0} : (u64{1} << have) - 1;
    value &= keep;
    if (sign) value |= ~keep;
    out.target[i] = static_cast<T>(value);
  }
}

template <class T>
void bfi(Exec& x, const Instr& in, Mask mask) {
  constexpr int bits = 8 * sizeof(T);
  Result<T> out(x, in.op[0], mask);
  const T *a = x.in<T>(in.op[1]), *b = x.in<T>(in.op[2]);
  const u32 *c = x.in<u32>(in.op[3]), *d = x.in<u32>(in.op[4]);
  for (int i = 0; i < kLanes; ++i) {
    const int pos = static_cast<int>(c[i] & 255), len = static_cast<int>(d[i] & 255);
    u64 field = len >= 64 ? ~u64{0} : (u64{1} << len) - 1;
    field = pos >= bits ? 0 : field << pos;
    const u64 inserted = pos >= bits ? 0 : static_cast<u64>(a[i]) << pos;
    out.target[i] = static_cast<T>((inserted & field) | (static_cast<u64>(b[i]) & ~field));
  }
}

// prmt: mod[0] is the mode, 0 for the general form.
u32 permute(const Instr& in, u32 a, u32 b, u32 c) {
  const u64 bytes = (u64{b} << 32) | a;
  const int s = static_cast<int>(c & 3);
  u32 selector = c;
  switch (in.mod[0]) {
    case 1:
      selector = s | (s + 1) << 4 | (s + 2) << 8 | (s + 3) << 12;
      break;  // f4e
    case 2:
      selector = s | ((s + 7) & 7) << 4 | ((s + 6) & 7) << 8 | ((s + 5) & 7) << 12;
      break;  // b4e
    case 3:
      selector = s * 0x1111;
      break;  // rc8
    case 4:
      selector = s | std::max(s, 1) << 4 | std::max(s, 2) << 8 | 3 << 12;
      break;  // ecl
    case 5:
      selector = 0 | std::min(s, 1) << 4 | std::min(s, 2) << 8 | s << 12;
      break;  // ecr
    case 6:
      selector = (c & 1) ? 0x3232 : 0x1010;
      break;  // rc16
    default:
      break;
  }
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 nibble = (selector >> (4 * i)) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

void lop3(Exec& x, const Instr& in, Mask mask) {
  Result<u32> out(x, in.op[0], mask);
  const u32 *a = x.in<u32>(in.op[1]), *b = x.in<u32>(in.op[2]), *c = x.in<u32>(in.op[3]);
  for (int i = 0; i < kLanes; ++i) {
    u32 value = 0;
    for (int k = 0; k < 8; ++k) {
      if (!((in.mod[0] >> k) & 1)) continue;
      value |= (k & 4 ? a[i] : ~a[i]) & (k & 2 ? b[i] : ~b[i]) & (k & 1 ? c[i] : ~c[i]);
    }
    out.target[i] = value;
  }
}

template <class T>
u32 find_top(const Instr& in, T a) {  // bfind: mod[0] asks for the shift amount
  using U = std::make_unsigned_t<T>;
  const U value = a < 0 ? static_cast<U>(~a) : static_cast<U>(a);
  if (value == 0) return ~u32{0};
  const int position = 8 * int{sizeof(T)} - 1 - std::countl_zero(value);
  return static_cast<u32>(in.mod[0] ? 8 * int{sizeof(T)} - 1 - position : position);
}

u32 reverse(u32 a) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= ((a >> i) & 1) << (31 - i);
  return r;
}
u64 reverse64(u64 a) { return u64{reverse(static_cast<u32>(a))} << 32 | reverse(static_cast<u32>(a >> 32)); }

template <class T>
void select(Exec& x, const Instr& in, Mask mask) {
  Result<T> out(x, in.op[0], mask);
  const T *a = x.in<T>(in.op[1]), *b = x.in<T>(in.op[2]);
  const Mask p = in.mod[0] ? ~x.pred(in.op[3]) : x.pred(in.op[3]);
  T* o = out.target;
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) o[i] = (p >> i) & 1 ? a[i] : b[i];
}

template <class T, class C>
T choose(T a, T b, C c) {
  return c >= 0 ? a : b;
}
template <class T, class C>
void slct(Exec& x, const Instr& in, Mask mask) {
  map3<T, T, choose<T, C>, C>(x, in, mask);
}

// Packing: mod[0] is the element size in bytes, mod[1] the element count.
void pack(Exec& x, const Instr& in, Mask mask) {
  const int bits = static_cast<int>(in.mod[0]) * 8;
  u64 value[kLanes] = {};
  for (int e = 0; e < in.mod[1]; ++e) {
    for (int i = 0; i < kLanes; ++i) {
      const u64 part = bits == 64 ? x.in<u64>(in.op[1 + e])[i] : x.in<u32>(in.op[1 + e])[i];
      value[i] |= (part & ((u64{1} << bits) - 1)) << (bits * e);
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    if (bits * in.mod[1] == 64)
      x.out<u64>(in.op[0])[i] = value[i];
    else
      x.out<u32>(in.op[0])[i] = static_cast<u32>(value[i]);
  }
}

void unpack(Exec& x, const Instr& in, Mask mask) {
  const int bits = static_cast<int>(in.mod[0]) * 8, count = static_cast<int>(in.mod[1]);
  const int32_t source = in.op[count];
  u64 value[kLanes];
  for (int i = 0; i < kLanes; ++i) value[i] = bits * count == 64 ? x.in<u64>(source)[i] : x.in<u32>(source)[i];
  for (int e = 0; e < count; ++e)
    for (int i = 0; i < kLanes; ++i)
      if (on(mask, i)) x.out<u32>(in.op[e])[i] = static_cast<u32>((value[i] >> (bits * e)) & ((u64{1} << bits) - 1));
}

// Predicate logic: mod[i] negates source i.
Mask source(const Exec& x, const Instr& in, int i) { return in.mod[i] ? ~x.pred(in.op[1 + i]) : x.pred(in.op[1 + i]); }
void pred_and(Exec& x, const Instr& in, Mask m) { x.set_pred(in.op[0], source(x, in, 0) & source(x, in, 1), m); }
void pred_or(Exec& x, const Instr& in, Mask m) { x.set_pred(in.op[0], source(x, in, 0) | source(x, in, 1), m); }
void pred_xor(Exec& x, const Instr& in, Mask m) { x.set_pred(in.op[0], source(x, in, 0) ^ source(x, in, 1), m); }
void pred_not(Exec& x, const Instr& in, Mask m) { x.set_pred(in.op[0], ~source(x, in, 0), m); }
void pred_mov(Exec& x, const Instr& in, Mask m) { x.set_pred(in.op[0], source(x, in, 0), m); }

// cvta: mod[0] the window to add (to generic) or, with mod[1], to remove.
u64 cvta(const Instr& in, u64 a) {
  const u64 window = static_cast<u64>(in.mod[0]);
  if (!window) return a;
  return in.mod[1] ? a & ~kWindowMask : a | window;
}
void isspacep(Exec& x, const Instr& in, Mask mask) {
  Mask result = 0;
  for (int i = 0; i < kLanes; ++i) {
    const u64 window = x.in<u64>(in.op[1])[i] & kWindowMask;
    const bool other = window == kSharedWindow || window == kLocalWindow || window == kParamWindow;
    result |= Mask{in.mod[0] ? window == static_cast<u64>(in.mod[0]) : !other} << i;
  }
  x.set_pred(in.op[0], result, mask);
}
void nothing(Exec&, const Instr&, Mask) {}
void trap(Exec&, const Instr&, Mask mask) {
  throw Fault(FaultKind::kTrap, std::countr_zero(mask), "the kernel trapped");
}

#define LOGIC(name, expression)                                                   \
  {name ".32", map2<u32, u32, [](u32 a, u32 b) -> u32 { return expression; }>}, { \
    name ".64", map2<u64, u64, [](u64 a, u64 b) -> u64 { return expression; }>    \
  }
#define SHIFT(name, T, f) {name, map2<T, T, f<T>, u32>}

const Entry kEntries[] = {
    LOGIC("and", a& b),
    LOGIC("or", a | b),
    LOGIC("xor", a ^ b),
    {"not.16", map1<u16, u16, [](u16 a) -> u16 { return static_cast<u16>(~a); }>},
    {"not.32", map1<u32, u32, [](u32 a) -> u32 { return ~a; }>},
    {"not.64", map1<u64, u64, [](u64 a) -> u64 { return ~a; }>},
    {"cnot.32", map1<u32, u32, [](u32 a) -> u32 { return a == 0; }>},
    {"cnot.64", map1<u64, u64, [](u64 a) -> u64 { return a == 0; }>},
    SHIFT("shl.16", u16, shift_left),
    SHIFT("shl.32", u32, shift_left),
    SHIFT("shl.64", u64, shift_left),
    SHIFT("shr.u16", u16, shift_right),
    SHIFT("shr.u32", u32, shift_right),
    SHIFT("shr.u64", u64, shift_right),
    SHIFT("shr.s16", i16, shift_right),
    SHIFT("shr.s32", i32, shift_right),
    SHIFT("shr.s64", i64, shift_right),
    {"shf.l.wrap", map3<u32, u32, funnel_left<false>>},
    {"shf.l.clamp", map3<u32, u32, funnel_left<true>>},
    {"shf.r.wrap", map3<u32, u32, funnel_right<false>>},
    {"shf.r.clamp", map3<u32, u32, funnel_right<true>>},
    {"bfe.u32", bfe<u32>},
    {"bfe.s32", bfe<i32>},
    {"bfe.u64", bfe<u64>},
    {"bfe.s64", bfe<i64>},
    {"bfi.32", bfi<u32>},
    {"bfi.64", bfi<u64>},
    {"prmt", each3<u32, u32, permute>},
    {"lop3", lop3},
    {"popc.32", map1<u32, u32, [](u32 a) -> u32 { return std::popcount(a); }>},
    {"popc.64", map1<u32, u64, [](u64 a) -> u32 { return std::popcount(a); }>},
    {"clz.32", map1<u32, u32, [](u32 a) -> u32 { return std::countl_zero(a); }>},
    {"clz.64", map1<u32, u64, [](u64 a) -> u32 { return std::countl_zero(a); }>},
    {"brev.32", map1<u32, u32, reverse>},
    {"brev.64", map1<u64, u64, reverse64>},
    {"bfind.u32", each1<u32, u32, find_top<u32>>},
    {"bfind.s32", each1<u32, i32, find_top<i32>>},
    {"bfind.u64", each1<u32, u64, find_top<u64>>},
    {"bfind.s64", each1<u32, i64, find_top<i64>>},
    {"selp.32", select<u32>},
    {"selp.64", select<u64>},
    {"slct.32.s32", slct<u32, i32>},
    {"slct.64.s32", slct<u64, i32>},
    {"slct.32.f32", slct<u32, float>},
    {"slct.64.f32", slct<u64, float>},
    {"mov.32", map1<u32, u32, [](u32 a) -> u32 { return a; }>},
    {"mov.64", map1<u64, u64, [](u64 a) -> u64 { return a; }>},
    {"pack", pack},
    {"unpack", unpack},
    {"and.pred", pred_and},
    {"or.pred", pred_or},
    {"xor.pred", pred_xor},
    {"not.pred", pred_not},
    {"mov.pred", pred_mov},
    {"cvta", each1<u64, u64, cvta>},
    {"isspacep", isspacep},
    {"nop", nothing},
    {"trap", trap},
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
