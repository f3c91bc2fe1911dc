// ld, st, atom, red over every state space.
#include <bit>

#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

// ld, st: mods mirror decode.py.
enum Mod { kSpace = 0, kBytes = 1, kCount = 2, kForm = 3, kWide = 4, kOffset = 5 };

Access access(Exec& x, const Instr& in, Mask mask, Touch touch, int32_t row, const uint8_t* data = nullptr) {
  Access a;
  a.space = static_cast<Space>(in.mod[kSpace]);
  a.touch = touch;
  a.bytes = static_cast<int>(in.mod[kBytes] * in.mod[kCount]);
  a.mask = mask;
  a.data = data;
  addresses(x, a, row, in.mod[kWide], in.mod[kOffset]);
  resolve(x, a);
  return a;
}

// The value of one element as the destination register holds it; form: sign, register bytes << 8.
template <class T, class S>
void load_element(Exec& x, const Access& a, int32_t row, int offset, bool is_signed, int64_t reg_bytes) {
  for (int i = 0; i < kLanes; ++i) {
    if (!on(a.mask, i)) continue;
    T raw;
    std::memcpy(&raw, a.host[i] + offset, sizeof raw);
    if (reg_bytes == 8) {
      x.out<u64>(row)[i] = is_signed ? static_cast<u64>(static_cast<i64>(static_cast<S>(raw))) : u64{raw};
    } else {
      const u32 v = is_signed ? static_cast<u32>(static_cast<i32>(static_cast<S>(raw))) : static_cast<u32>(raw);
      x.out<u32>(row)[i] = reg_bytes == 2 ? v & 0xFFFF : v;
    }
  }
}

void load(Exec& x, const Instr& in, Mask mask) {
  const int count = static_cast<int>(in.mod[kCount]), bytes = static_cast<int>(in.mod[kBytes]);
  const Access a = access(x, in, mask, Touch::kRead, in.op[count]);
  const bool is_signed = in.mod[kForm] & 1;
  const int64_t reg = in.mod[kForm] >> 8;
  for (int e = 0; e < count; ++e) {
    switch (bytes) {
      case 1:
        load_element<uint8_t, int8_t>(x, a, in.op[e], e, is_signed, reg);
        break;
      case 2:
        load_element<u16, i16>(x, a, in.op[e], 2 * e, is_signed, reg);
        break;
      case 4:
        load_element<u32, i32>(x, a, in.op[e], 4 * e, is_signed, reg);
        break;
      default:
        load_element<u64, i64>(x, a, in.op[e], 8 * e, is_signed, reg);
        break;
    }
  }
}

void store(Exec& x, const Instr& in, Mask mask) {
  const int count = static_cast<int>(in.mod[kCount]), bytes = static_cast<int>(in.mod[kBytes]);
  const bool wide = (in.mod[kForm] >> 8) == 8;
  const int each = bytes * count;
  uint8_t data[kLanes * 32];
  for (int e = 0; e < count; ++e) {
    for (int i = 0; i < kLanes; ++i) {
      const u64 v = wide ? x.in<u64>(in.op[1 + e])[i] : x.in<u32>(in.op[1 + e])[i];
      std::memcpy(data + i * each + e * bytes, &v, bytes);  // little endian
    }
  }
  const Access a = access(x, in, mask, Touch::kWrite, in.op[0], data);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) std::memcpy(a.host[i], data + i * each, each);
}

// atom, red: op = d, address, b, c; the mods differ from ld in the form.
enum AtomMod { kAtomOp = 2, kAtomForm = 3 };  // form: type | returns << 8
enum Type { kS8, kU8, kS16, kU16, kS32, kU32, kS64, kU64, kHalf, kBrain, kFloat, kDouble, kTensor, kHalf2, kBrain2 };
enum AtomOp { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class T>
T integer_op(int64_t op, T old, T b, T c) {
  switch (op) {
    case kAdd:
      return static_cast<T>(static_cast<u64>(old) + static_cast<u64>(b));
    case kMin:
      return old < b ? old : b;
    case kMax:
      return old > b ? old : b;
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kCas:
      return old == b ? c : old;
    case kInc:
      return old >= b ? T{0} : static_cast<T>(old + 1);
    case kDec:
      return old == 0 || old > b ? b : static_cast<T>(old - 1);
    default:
      return b;
  }
}
template <class T>
T float_op(int64_t op, T old, T b) {
  return op == kAdd ? old + b : op == kMin ? std::fmin(old, b) : op == kMax ? std::fmax(old, b) : b;
}
u64 half_op(int64_t op, u64 old, u64 b, bool brain) {
  const auto decode = [brain](u64 v) {
    return static_cast<double>(brain ? from_bf16(static_cast<u16>(v)) : from_f16(static_cast<u16>(v)));
  };
  return round_to(float_op<double>(op, decode(old), decode(b)), brain ? kBf16 : kF16);
}

u64 combine(int64_t type, int64_t op, u64 old, u64 b, u64 c) {
  const auto cast32 = [](float v) { return u64{std::bit_cast<u32>(v)}; };
  const auto f32 = [](u64 v) { return std::bit_cast<float>(static_cast<u32>(v)); };
  const auto f64 = [](u64 v) { return std::bit_cast<double>(v); };
  switch (type) {
    case kS32:
      return static_cast<u32>(integer_op<i32>(op, static_cast<i32>(old), static_cast<i32>(b), static_cast<i32>(c)));
    case kU32:
      return integer_op<u32>(op, static_cast<u32>(old), static_cast<u32>(b), static_cast<u32>(c));
    case kU16:
      return integer_op<u16>(op, static_cast<u16>(old), static_cast<u16>(b), static_cast<u16>(c));
    case kS64:
      return static_cast<u64>(integer_op<i64>(op, static_cast<i64>(old), static_cast<i64>(b), static_cast<i64>(c)));
    case kU64:
      return integer_op<u64>(op, old, b, c);
    case kFloat:
      return cast32(float_op<float>(op, f32(old), f32(b)));
    case kDouble:
      return std::bit_cast<u64>(float_op<double>(op, f64(old), f64(b)));
    case kHalf:
      return half_op(op, old, b, false);
    case kBrain:
      return half_op(op, old, b, true);
    case kHalf2:
      return half_op(op, old >> 16, b >> 16, false) << 16 | half_op(op, old, b, false);
    default:
      return half_op(op, old >> 16, b >> 16, true) << 16 | half_op(op, old, b, true);
  }
}

// Lanes go one after the other, in order.
void atomic(Exec& x, const Instr& in, Mask mask) {
  Instr plain = in;
  plain.mod[kCount] = 1;
  const Access a = access(x, plain, mask, Touch::kAtomic, in.op[1]);
  const size_t bytes = static_cast<size_t>(in.mod[kBytes]);
  const int64_t type = in.mod[kAtomForm] & 255, op = in.mod[kAtomOp];
  const bool returns = in.mod[kAtomForm] >> 8;
  const auto operand = [&](int32_t row, int i) { return bytes == 8 ? x.in<u64>(row)[i] : u64{x.in<u32>(row)[i]}; };
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    u64 old = 0;
    std::memcpy(&old, a.host[i], bytes);
    const u64 value = combine(type, op, old, operand(in.op[2], i), op == kCas ? operand(in.op[3], i) : 0);
    std::memcpy(a.host[i], &value, bytes);
    if (!returns) continue;
    if (bytes == 8)
      x.out<u64>(in.op[0])[i] = old;
    else
      x.out<u32>(in.op[0])[i] = static_cast<u32>(old);
  }
}

const Entry kEntries[] = {{"ld", load}, {"st", store}, {"atom", atomic}};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
