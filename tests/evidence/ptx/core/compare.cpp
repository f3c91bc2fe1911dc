// setp and set. Python reduces every comparison to eq, ne, lt, le and num (no NaN), possibly
// with operands swapped and the result inverted.
#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

// setp: op = p, q, a, b, c; mod[0] inverts, mod[1] combines with c (1 and, 2 or, 3 xor), mod[2]
// negates c. q gets the combination with the inverted comparison.
void deliver(Exec& x, const Instr& in, Mask mask, Mask result) {
  if (in.mod[0]) result = ~result;
  Mask other = ~result;
  if (in.mod[1]) {
    const Mask c = in.mod[2] ? ~x.pred(in.op[4]) : x.pred(in.op[4]);
    const auto combine = [&](Mask r) { return in.mod[1] == 1 ? r & c : in.mod[1] == 2 ? r | c : r ^ c; };
    result = combine(result);
    other = combine(other);
  }
  x.set_pred(in.op[0], result, mask);
  x.set_pred(in.op[1], other, mask);
}

// The comparisons of one warp as a mask.
template <class T, auto F>
Mask compare(const Exec& x, int32_t left, int32_t right) {
  const auto* a = x.in<typename Lane<T>::Word>(left);
  const auto* b = x.in<typename Lane<T>::Word>(right);
  Mask result = 0;
  for (int i = 0; i < kLanes; ++i) result |= Mask{F(get<T>(a[i]), get<T>(b[i]))} << i;
  return result;
}
template <bool kBrain, auto F>
Mask compare_half(const Exec& x, int32_t left, int32_t right, int shift) {
  const u32 *a = x.in<u32>(left), *b = x.in<u32>(right);
  const auto decode = [shift](u32 v) {
    const u16 bits = static_cast<u16>(v >> shift);
    return kBrain ? from_bf16(bits) : from_f16(bits);
  };
  Mask result = 0;
  for (int i = 0; i < kLanes; ++i) result |= Mask{F(decode(a[i]), decode(b[i]))} << i;
  return result;
}

template <class T, auto F>
void setp(Exec& x, const Instr& in, Mask mask) {
  deliver(x, in, mask, compare<T, F>(x, in.op[2], in.op[3]));
}
template <bool kBrain, auto F>
void setp_half(Exec& x, const Instr& in, Mask mask) {
  deliver(x, in, mask, compare_half<kBrain, F>(x, in.op[2], in.op[3], 0));
}
template <bool kBrain, auto F>
void setp_half2(Exec& x, const Instr& in, Mask mask) {
  const Mask flip = in.mod[0] ? kFull : 0;
  const Mask low = compare_half<kBrain, F>(x, in.op[2], in.op[3], 0) ^ flip;
  const Mask high = compare_half<kBrain, F>(x, in.op[2], in.op[3], 16) ^ flip;
  x.set_pred(in.op[0], low, mask);
  x.set_pred(in.op[1], high, mask);
}

// set: op = d, a, b; mod[0] inverts, mod[1] is the word for true.
template <class T, auto F>
void set(Exec& x, const Instr& in, Mask mask) {
  const Mask result = compare<T, F>(x, in.op[1], in.op[2]) ^ (in.mod[0] ? kFull : 0);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = on(result, i) ? static_cast<u32>(in.mod[1]) : 0;
}
template <bool kBrain, auto F>
void set_half2(Exec& x, const Instr& in, Mask mask) {  // true words of 16 bits each
  const Mask flip = in.mod[0] ? kFull : 0;
  const Mask low = compare_half<kBrain, F>(x, in.op[1], in.op[2], 0) ^ flip;
  const Mask high = compare_half<kBrain, F>(x, in.op[1], in.op[2], 16) ^ flip;
  const u32 yes = static_cast<u32>(in.mod[1]) & 0xFFFF;
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = (on(low, i) ? yes : 0) | (on(high, i) ? yes << 16 : 0);
}

template <class T>
bool eq(T a, T b) {
  return a == b;
}
template <class T>
bool ne(T a, T b) {
  return a < b || a > b;
}
template <class T>
bool lt(T a, T b) {
  return a < b;
}
template <class T>
bool le(T a, T b) {
  return a <= b;
}
template <class T>
bool num(T a, T b) {
  return a == a && b == b;
}

#define ORDER(kind, type, T)                                                                                    \
  {kind ".eq." type, setp<T, eq<T>>}, {kind ".ne." type, setp<T, ne<T>>}, {kind ".lt." type, setp<T, lt<T>>}, { \
    kind ".le." type, setp<T, le<T>>                                                                            \
  }
#define SET(type, T)                                                                                   \
  {"set.eq." type, set<T, eq<T>>}, {"set.ne." type, set<T, ne<T>>}, {"set.lt." type, set<T, lt<T>>}, { \
    "set.le." type, set<T, le<T>>                                                                      \
  }
#define HALVES(kind, type, f, brain)                                                      \
  {kind ".eq." type, f<brain, eq<float>>}, {kind ".ne." type, f<brain, ne<float>>},       \
      {kind ".lt." type, f<brain, lt<float>>}, {kind ".le." type, f<brain, le<float>>}, { \
    kind ".num." type, f<brain, num<float>>                                               \
  }

const Entry kEntries[] = {
    ORDER("setp", "u16", u16),
    ORDER("setp", "s16", i16),
    ORDER("setp", "u32", u32),
    ORDER("setp", "s32", i32),
    ORDER("setp", "u64", u64),
    ORDER("setp", "s64", i64),
    ORDER("setp", "f32", float),
    ORDER("setp", "f64", double),
    {"setp.num.f32", setp<float, num<float>>},
    {"setp.num.f64", setp<double, num<double>>},
    HALVES("setp", "f16", setp_half, false),
    HALVES("setp", "bf16", setp_half, true),
    HALVES("setp", "f16x2", setp_half2, false),
    HALVES("setp", "bf16x2", setp_half2, true),
    SET("u16", u16),
    SET("s16", i16),
    SET("u32", u32),
    SET("s32", i32),
    SET("u64", u64),
    SET("s64", i64),
    SET("f32", float),
    SET("f64", double),
    {"set.num.f32", set<float, num<float>>},
    HALVES("set", "f16x2", set_half2, false),
    HALVES("set", "bf16x2", set_half2, true),
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
