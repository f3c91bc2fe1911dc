// Lane-wise maps: the loop every arithmetic instruction is made of.
#pragma once

#include "state.h"

namespace ptx {

// How a value lies in a row: 16-bit and 8-bit values live in the low bits of a 32-bit word.
template <class T>
struct Lane {
  using Word = T;
};
template <>
struct Lane<uint16_t> {
  using Word = uint32_t;
};
template <>
struct Lane<int16_t> {
  using Word = uint32_t;
};

template <class T>
inline T get(const typename Lane<T>::Word& word) {
  return static_cast<T>(word);
}
template <class T>
inline typename Lane<T>::Word put(T value) {
  if constexpr (sizeof(T) == 2)
    return static_cast<uint16_t>(value);
  else
    return value;
}

// A result row: written in place when all lanes are on, else blended from a scratch row.
template <class W>
struct Result {
  alignas(64) W scratch[kLanes];
  W* row;
  W* target;
  Mask mask;
  Result(Exec& x, int32_t index, Mask m) : row(x.out<W>(index)), target(m == kFull ? row : scratch), mask(m) {}
  ~Result() {
    if (mask == kFull) return;
    for (int i = 0; i < kLanes; ++i)
      if (on(mask, i)) row[i] = scratch[i];
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
};

// D: result type, S: source type; F is a captureless function object.
template <class D, class S, auto F>
void map1(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  auto* o = out.target;
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) o[i] = put<D>(F(get<S>(a[i])));
}

template <class D, class S, auto F, class S2 = S>
void map2(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  const auto* b = x.in<typename Lane<S2>::Word>(in.op[2]);
  auto* o = out.target;
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) o[i] = put<D>(F(get<S>(a[i]), get<S2>(b[i])));
}

template <class D, class S, auto F, class S3 = S>
void map3(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  const auto* b = x.in<typename Lane<S>::Word>(in.op[2]);
  const auto* c = x.in<typename Lane<S3>::Word>(in.op[3]);
  auto* o = out.target;
#pragma GCC ivdep
  for (int i = 0; i < kLanes; ++i) o[i] = put<D>(F(get<S>(a[i]), get<S>(b[i]), get<S3>(c[i])));
}

// The same with the modifiers at hand, one lane after the other.
template <class D, class S, auto F>
void each1(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) out.target[i] = put<D>(F(in, get<S>(a[i])));
}

template <class D, class S, auto F>
void each2(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  const auto* b = x.in<typename Lane<S>::Word>(in.op[2]);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) out.target[i] = put<D>(F(in, get<S>(a[i]), get<S>(b[i])));
}

template <class D, class S, auto F>
void each3(Exec& x, const Instr& in, Mask mask) {
  Result<typename Lane<D>::Word> out(x, in.op[0], mask);
  const auto* a = x.in<typename Lane<S>::Word>(in.op[1]);
  const auto* b = x.in<typename Lane<S>::Word>(in.op[2]);
  const auto* c = x.in<typename Lane<S>::Word>(in.op[3]);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) out.target[i] = put<D>(F(in, get<S>(a[i]), get<S>(b[i]), get<S>(c[i])));
}

using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

}  // namespace ptx
