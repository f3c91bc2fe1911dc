// f16 and bf16 arithmetic, single and packed: computed in f64, rounded once.
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

enum Mod { kFtz = 0, kSat = 1, kRelu = 2, kNan = 3 };

template <bool kBrain>
double decode(u32 bits) {
  return kBrain ? from_bf16(static_cast<u16>(bits)) : from_f16(static_cast<u16>(bits));
}
template <bool kBrain>
u32 encode(const Instr& in, double v) {
  const double tiny = kBrain ? 0x1p-126 : 0x1p-14;
  if (in.mod[kSat]) v = v != v ? 0.0 : std::fmin(std::fmax(v, 0.0), 1.0);
  if (in.mod[kRelu] && v < 0) v = 0.0;
  u32 bits = static_cast<u32>(round_to(v, kBrain ? kBf16 : kF16));
  if (in.mod[kFtz] && std::fabs(decode<kBrain>(bits)) < tiny) bits &= 0x8000;
  return bits;
}

double smaller(double a, double b) {
  if (a == b) return std::signbit(a) ? a : b;
  return std::fmin(a, b);
}
double larger(double a, double b) {
  if (a == b) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}

enum class Op { kAdd, kSub, kMul, kFma, kMin, kMax, kExp2, kTanh };

template <Op kOp>
double compute(const Instr& in, double a, double b, double c) {
  switch (kOp) {
    case Op::kAdd:
      return a + b;
    case Op::kSub:
      return a - b;
    case Op::kMul:
      return a * b;
    case Op::kFma:
      return fma_to_odd(a, b, c);
    case Op::kMin:
    case Op::kMax:
      if (in.mod[kNan] && (a != a || b != b)) return NAN;
      return kOp == Op::kMin ? smaller(a, b) : larger(a, b);
    case Op::kExp2:
      return std::exp2(a);
    case Op::kTanh:
      return std::tanh(a);
  }
}

template <Op kOp, bool kBrain, int kParts>
void half_op(Exec& x, const Instr& in, Mask mask) {
  constexpr int sources = kOp == Op::kFma ? 3 : (kOp == Op::kExp2 || kOp == Op::kTanh) ? 1 : 2;
  Result<u32> out(x, in.op[0], mask);
  const u32* a = x.in<u32>(in.op[1]);
  const u32* b = sources > 1 ? x.in<u32>(in.op[2]) : a;
  const u32* c = sources > 2 ? x.in<u32>(in.op[3]) : a;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    u32 bits = 0;
    for (int p = 0; p < kParts; ++p) {
      const int s = 16 * p;
      const double value =
          compute<kOp>(in, decode<kBrain>(a[i] >> s), decode<kBrain>(b[i] >> s), decode<kBrain>(c[i] >> s));
      bits |= encode<kBrain>(in, value) << s;
    }
    out.target[i] = bits;
  }
}

u32 neg16(u32 a) { return (a ^ 0x8000) & 0xFFFF; }
u32 neg16x2(u32 a) { return a ^ 0x80008000; }
u32 abs16(u32 a) { return a & 0x7FFF; }
u32 abs16x2(u32 a) { return a & 0x7FFF7FFF; }

#define HALF(name, op)                                                                                                \
  {name ".f16", half_op<op, false, 1>}, {name ".f16x2", half_op<op, false, 2>}, {name ".bf16", half_op<op, true, 1>}, \
  {                                                                                                                   \
    name ".bf16x2", half_op<op, true, 2>                                                                              \
  }
#define SIGN(name, f)                                                             \
  {name ".f16", map1<u32, u32, f##16>}, {name ".f16x2", map1<u32, u32, f##16x2>}, \
      {name ".bf16", map1<u32, u32, f##16>}, {                                    \
    name ".bf16x2", map1<u32, u32, f##16x2>                                       \
  }

const Entry kEntries[] = {
    HALF("add", Op::kAdd), HALF("sub", Op::kSub), HALF("mul", Op::kMul),  HALF("fma", Op::kFma),
    HALF("min", Op::kMin), HALF("max", Op::kMax), HALF("ex2", Op::kExp2), HALF("tanh", Op::kTanh),
    SIGN("neg", neg),      SIGN("abs", abs),
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
