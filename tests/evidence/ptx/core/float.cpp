// f32 and f64 arithmetic. Approximate functions are computed exactly (to the last place of f32).
#include <cfenv>
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

// Modifiers of the careful variants.
enum Mod { kRound = 0, kFtz = 1, kSat = 2, kNan = 3 };

float flush(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }
double flush(double v) { return v; }
template <class T>
T saturate(T v) {
  return v != v ? T{0} : v < 0 ? T{0} : v > 1 ? T{1} : v;
}

template <class T>
T enter(const Instr& in, T v) {
  return in.mod[kFtz] ? flush(v) : v;
}
template <class T>
T leave(const Instr& in, T v) {
  if (in.mod[kFtz]) v = flush(v);
  return in.mod[kSat] ? saturate(v) : v;
}

template <class T>
T add(T a, T b) {
  return a + b;
}
template <class T>
T sub(T a, T b) {
  return a - b;
}
template <class T>
T mul(T a, T b) {
  return a * b;
}
template <class T>
T div(T a, T b) {
  return a / b;
}
template <class T>
T fma(T a, T b, T c) {
  return std::fma(a, b, c);
}

template <class T>
T smaller(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T, auto F>
T min_max(const Instr& in, T a, T b) {
  if (in.mod[kNan] && (a != a || b != b)) return std::numeric_limits<T>::quiet_NaN();
  return leave(in, F(enter(in, a), enter(in, b)));
}

// Directed rounding by the hardware's mode; volatile keeps the operation inside the scope.
struct Direction {
  int saved = -1;
  explicit Direction(int64_t mode) {
    if (mode == kRn) return;
    const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    saved = std::fegetround();
    std::fesetround(modes[mode & 3]);
  }
  ~Direction() {
    if (saved >= 0) std::fesetround(saved);
  }
};
template <class T, auto F>
T careful2(const Instr& in, T a, T b) {
  const Direction direction(in.mod[kRound]);
  volatile T u = enter(in, a), v = enter(in, b);
  volatile T r = F(u, v);
  return leave<T>(in, r);
}
template <class T, auto F>
T careful3(const Instr& in, T a, T b, T c) {
  const Direction direction(in.mod[kRound]);
  volatile T u = enter(in, a), v = enter(in, b), w = enter(in, c);
  volatile T r = F(u, v, w);
  return leave<T>(in, r);
}
template <class T, auto F>
T careful1(const Instr& in, T a) {
  const Direction direction(in.mod[kRound]);
  volatile T u = enter(in, a);
  volatile T r = F(u);
  return leave<T>(in, r);
}

template <class T>
T root(T a) {
  return std::sqrt(a);
}
template <class T>
T reciprocal(T a) {
  return T{1} / a;
}
template <class T>
T negate(T a) {
  return -a;
}
template <class T>
T absolute(T a) {
  return std::fabs(a);
}
template <class T>
T copysign(T a, T b) {
  return std::copysign(b, a);
}
float reciprocal_root(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
double reciprocal_root64(double a) { return 1.0 / std::sqrt(a); }
float exp2_of(float a) { return static_cast<float>(std::exp2(static_cast<double>(a))); }
float log2_of(float a) { return static_cast<float>(std::log2(static_cast<double>(a))); }
float sin_of(float a) { return static_cast<float>(std::sin(static_cast<double>(a))); }
float cos_of(float a) { return static_cast<float>(std::cos(static_cast<double>(a))); }
float tanh_of(float a) { return static_cast<float>(std::tanh(static_cast<double>(a))); }

template <class T>
void testp(Exec& x, const Instr& in, Mask mask) {
  const T* a = x.in<T>(in.op[1]);
  Mask result = 0;
  for (int i = 0; i < kLanes; ++i) {
    const int kind = std::fpclassify(a[i]);
    const bool is[] = {kind != FP_NAN && kind != FP_INFINITE,
                       kind == FP_INFINITE,
                       kind != FP_NAN,
                       kind == FP_NAN,
                       kind == FP_NORMAL,
                       kind == FP_SUBNORMAL};
    result |= Mask{is[in.mod[0]]} << i;
  }
  x.set_pred(in.op[0], result, mask);
}

#define PLAIN2(name, f) \
  {name ".f32", map2<float, float, f<float>>}, { name ".f64", map2<double, double, f<double>> }
#define CAREFUL2(name, f)                                                   \
  {name ".f32.careful", each2<float, float, careful2<float, f<float>>>}, {  \
    name ".f64.careful", each2<double, double, careful2<double, f<double>>> \
  }
#define CAREFUL1(name, f, g) \
  {name ".f32", each1<float, float, careful1<float, f>>}, { name ".f64", each1<double, double, careful1<double, g>> }

const Entry kEntries[] = {
    PLAIN2("add", add),
    PLAIN2("sub", sub),
    PLAIN2("mul", mul),
    PLAIN2("div", div),
    PLAIN2("min", smaller),
    PLAIN2("max", larger),
    PLAIN2("copysign", copysign),
    CAREFUL2("add", add),
    CAREFUL2("sub", sub),
    CAREFUL2("mul", mul),
    CAREFUL2("div", div),
    {"min.f32.careful", each2<float, float, min_max<float, smaller<float>>>},
    {"max.f32.careful", each2<float, float, min_max<float, larger<float>>>},
    {"fma.f32", map3<float, float, fma<float>>},
    {"fma.f64", map3<double, double, fma<double>>},
    {"fma.f32.careful", each3<float, float, careful3<float, fma<float>>>},
    {"fma.f64.careful", each3<double, double, careful3<double, fma<double>>>},
    {"neg.f32", map1<float, float, negate<float>>},
    {"neg.f64", map1<double, double, negate<double>>},
    {"abs.f32", map1<float, float, absolute<float>>},
    {"abs.f64", map1<double, double, absolute<double>>},
    {"neg.f32.careful", each1<float, float, careful1<float, negate<float>>>},
    {"abs.f32.careful", each1<float, float, careful1<float, absolute<float>>>},
    CAREFUL1("sqrt", root<float>, root<double>),
    CAREFUL1("rcp", reciprocal<float>, reciprocal<double>),
    CAREFUL1("rsqrt", reciprocal_root, reciprocal_root64),
    {"ex2.f32", each1<float, float, careful1<float, exp2_of>>},
    {"lg2.f32", each1<float, float, careful1<float, log2_of>>},
    {"sin.f32", each1<float, float, careful1<float, sin_of>>},
    {"cos.f32", each1<float, float, careful1<float, cos_of>>},
    {"tanh.f32", each1<float, float, careful1<float, tanh_of>>},
    {"testp.f32", testp<float>},
    {"testp.f64", testp<double>},
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
