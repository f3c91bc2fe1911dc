// Integer arithmetic: add, sub, mul, mad, div, rem, min, max, abs, neg, carries, dp4a, sad.
#include <algorithm>

#include "lanes.h"

namespace ptx {

namespace {

template <class T>
T add(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
}
template <class T>
T sub(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(static_cast<U>(a) - static_cast<U>(b)));
}
template <class T>
T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}

// The next wider type of a product.
template <class T>
struct Wider;
template <>
struct Wider<i16> {
  using type = i32;
};
template <>
struct Wider<u16> {
  using type = u32;
};
template <>
struct Wider<i32> {
  using type = i64;
};
template <>
struct Wider<u32> {
  using type = u64;
};
template <>
struct Wider<i64> {
  using type = __int128;
};
template <>
struct Wider<u64> {
  using type = unsigned __int128;
};
template <class T>
using wider = typename Wider<T>::type;

template <class T>
wider<T> mul_wide(T a, T b) {
  return static_cast<wider<T>>(a) * static_cast<wider<T>>(b);
}
template <class T>
T mul_hi(T a, T b) {
  return static_cast<T>(mul_wide(a, b) >> (8 * sizeof(T)));
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add<T>(mul_lo<T>(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add<T>(mul_hi<T>(a, b), c);
}
template <class T>
wider<T> mad_wide(T a, T b, wider<T> c) {
  return add<wider<T>>(mul_wide<T>(a, b), c);
}

// Division by zero gives all ones, the remainder then is the dividend.
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return sub<T>(0, a);
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T negate(T a) {
  return sub<T>(0, a);
}
template <class T>
T absolute(T a) {
  return a < 0 ? negate<T>(a) : a;
}

i32 add_sat(i32 a, i32 b) { return static_cast<i32>(std::clamp<i64>(i64{a} + b, INT32_MIN, INT32_MAX)); }
i32 sub_sat(i32 a, i32 b) { return static_cast<i32>(std::clamp<i64>(i64{a} - b, INT32_MIN, INT32_MAX)); }
template <class T>
T mul24(T a, T b) {
  const auto cut = [](T v) { return static_cast<T>(static_cast<T>(static_cast<u32>(v) << 8) >> 8); };
  return mul_lo<T>(cut(a), cut(b));
}
template <class T>
T mad24(T a, T b, T c) {
  return add<T>(mul24<T>(a, b), c);
}
template <class T>
T sad(T a, T b, T c) {
  return add<T>(c, a < b ? sub<T>(b, a) : sub<T>(a, b));
}

// dp4a: mod[0], mod[1] tell whether a and b are signed.
u32 dp4a(const Instr& in, u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; ++i) {
    const u32 x = (a >> (8 * i)) & 255, y = (b >> (8 * i)) & 255;
    c += (in.mod[0] ? static_cast<u32>(i32{static_cast<int8_t>(x)}) : x) *
         (in.mod[1] ? static_cast<u32>(i32{static_cast<int8_t>(y)}) : y);
  }
  return c;
}

// Carries: op[4] is the carry row, mod[0] adds the carry in, mod[1] writes the carry out.
template <class T, class Sum>
void with_carry(Exec& x, const Instr& in, Mask mask, bool subtract, Sum addend) {
  Result<T> out(x, in.op[0], mask);
  uint32_t* carry = x.out<uint32_t>(in.op[4]);
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    const auto [left, right] = addend(i);
    const u32 c = in.mod[0] ? carry[i] & 1 : 0;
    using Wide = wider<T>;
    const Wide sum = subtract ? Wide{left} - right - c : Wide{left} + right + c;
    out.target[i] = static_cast<T>(sum);
    if (in.mod[1]) carry[i] = static_cast<u32>((sum >> (8 * sizeof(T))) & 1);
  }
}
template <class T, bool kSubtract>
void carry2(Exec& x, const Instr& in, Mask mask) {
  const T *a = x.in<T>(in.op[1]), *b = x.in<T>(in.op[2]);
  with_carry<T>(x, in, mask, kSubtract, [&](int i) { return std::pair<T, T>(a[i], b[i]); });
}
template <class T, class Factor, bool kHigh>
void carry3(Exec& x, const Instr& in, Mask mask) {
  const T *a = x.in<T>(in.op[1]), *b = x.in<T>(in.op[2]), *c = x.in<T>(in.op[3]);
  with_carry<T>(x, in, mask, false, [&](int i) {
    const auto u = static_cast<Factor>(a[i]), v = static_cast<Factor>(b[i]);
    return std::pair<T, T>(static_cast<T>(kHigh ? mul_hi<Factor>(u, v) : mul_lo<Factor>(u, v)), c[i]);
  });
}

#define UNSIGNED(name, map, f) \
  {name ".16", map<u16, u16, f<u16>>}, {name ".32", map<u32, u32, f<u32>>}, { name ".64", map<u64, u64, f<u64>> }
#define SIGNED(name, map, f) \
  {name ".s16", map<i16, i16, f<i16>>}, {name ".s32", map<i32, i32, f<i32>>}, { name ".s64", map<i64, i64, f<i64>> }
#define BOTH(name, map, f)                                                                            \
  SIGNED(name, map, f), {name ".u16", map<u16, u16, f<u16>>}, {name ".u32", map<u32, u32, f<u32>>}, { \
    name ".u64", map<u64, u64, f<u64>>                                                                \
  }
#define WIDE(type, T) \
  {"mul.wide." type, map2<wider<T>, T, mul_wide<T>>}, { "mad.wide." type, map3<wider<T>, T, mad_wide<T>, wider<T>> }

const Entry kEntries[] = {
    UNSIGNED("add", map2, add),
    UNSIGNED("sub", map2, sub),
    UNSIGNED("mul.lo", map2, mul_lo),
    UNSIGNED("mad.lo", map3, mad_lo),
    BOTH("mul.hi", map2, mul_hi),
    BOTH("mad.hi", map3, mad_hi),
    WIDE("s16", i16),
    WIDE("u16", u16),
    WIDE("s32", i32),
    WIDE("u32", u32),
    BOTH("div", map2, divide),
    BOTH("rem", map2, remainder),
    BOTH("min", map2, smaller),
    BOTH("max", map2, larger),
    SIGNED("neg", map1, negate),
    SIGNED("abs", map1, absolute),
    BOTH("sad", map3, sad),
    {"add.sat.s32", map2<i32, i32, add_sat>},
    {"sub.sat.s32", map2<i32, i32, sub_sat>},
    {"mul24.lo.s32", map2<i32, i32, mul24<i32>>},
    {"mul24.lo.u32", map2<u32, u32, mul24<u32>>},
    {"mad24.lo.s32", map3<i32, i32, mad24<i32>>},
    {"mad24.lo.u32", map3<u32, u32, mad24<u32>>},
    {"dp4a", each3<u32, u32, dp4a>},
    {"addc.32", carry2<u32, false>},
    {"addc.64", carry2<u64, false>},
    {"subc.32", carry2<u32, true>},
    {"subc.64", carry2<u64, true>},
    {"madc.lo.32", carry3<u32, u32, false>},
    {"madc.lo.64", carry3<u64, u64, false>},
    {"madc.hi.u32", carry3<u32, u32, true>},
    {"madc.hi.s32", carry3<u32, i32, true>},
    {"madc.hi.u64", carry3<u64, u64, true>},
    {"madc.hi.s64", carry3<u64, i64, true>},
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
