// Tensor-core instructions: mma.sync, ldmatrix, stmatrix, movmatrix.
#include <algorithm>

#include "formats.h"
#include "lanes.h"

namespace ptx {

namespace {

// Fragments of every m16n8 shape: lane = 4 * group + quad, E elements a register.
//   A register i: row = group + 8 * (i & 1), column = E * quad + 4 * E * (i >> 1) + e
//   B register i: row = E * quad + 4 * E * i + e, column = group
//   C, D: rows group and group + 8, columns 2 * quad and 2 * quad + 1
constexpr int kM = 16, kN = 8;
enum Mod { kHalfOut = 0, kHalfIn = 1, kSaturate = 2, kSignA = 3, kSignB = 4 };

typedef double Row __attribute__((vector_size(kN * sizeof(double))));
typedef int32_t IntRow __attribute__((vector_size(kN * sizeof(int32_t))));

struct Half {
  static constexpr int kPer = 2;
  static double decode(u32 word, int e, bool) { return from_f16(static_cast<u16>(word >> (16 * e))); }
};
struct Brain {
  static constexpr int kPer = 2;
  static double decode(u32 word, int e, bool) { return from_bf16(static_cast<u16>(word >> (16 * e))); }
};
struct Tensor {  // the hardware ignores the low 13 bits
  static constexpr int kPer = 1;
  static double decode(u32 word, int, bool) { return std::bit_cast<float>(word & ~u32{0x1FFF}); }
};
template <int kBits>
struct Int {
  static constexpr int kPer = 32 / kBits;
  static i32 decode(u32 word, int e, bool is_signed) {
    const u32 top = word << (32 - kBits - kBits * e);
    return is_signed ? static_cast<i32>(top) >> (32 - kBits) : static_cast<i32>(top >> (32 - kBits));
  }
};

template <class In, int kK, class T, class V>
struct Operands {
  static constexpr int kE = In::kPer, kRegsA = kM * kK / 32 / kE, kRegsB = kK * kN / 32 / kE;
  alignas(64) T a[kK][kM];  // transposed: a column of A is contiguous
  alignas(64) T b[kK][kN];
  Operands(Exec& x, const Instr& in, int first) {
    for (int r = 0; r < kRegsA; ++r) {
      const u32* row = x.in<u32>(in.op[first + r]);
      for (int e = 0; e < kE; ++e) {
        T value[kLanes];
        for (int i = 0; i < kLanes; ++i) value[i] = In::decode(row[i], e, in.mod[kSignA]);
        for (int i = 0; i < kLanes; ++i) a[kE * (i & 3) + 4 * kE * (r >> 1) + e][(i >> 2) + 8 * (r & 1)] = value[i];
      }
    }
    for (int r = 0; r < kRegsB; ++r) {
      const u32* row = x.in<u32>(in.op[first + kRegsA + r]);
      for (int e = 0; e < kE; ++e) {
        T value[kLanes];
        for (int i = 0; i < kLanes; ++i) value[i] = In::decode(row[i], e, in.mod[kSignB]);
        for (int i = 0; i < kLanes; ++i) b[kE * (i & 3) + 4 * kE * r + e][i >> 2] = value[i];
      }
    }
  }
  void multiply(V (&sum)[kM]) const {
    for (int k = 0; k < kK; ++k) {
      V row;
      std::memcpy(&row, b[k], sizeof row);
      for (int m = 0; m < kM; ++m) sum[m] += row * a[k][m];
    }
  }
};

// Products are exact in f64; the sum is taken in f64 and rounded once. Hardware sums with less.
template <class In, int kK>
void mma_float(Exec& x, const Instr& in, Mask) {
  using Input = Operands<In, kK, double, Row>;
  const int outs = in.mod[kHalfOut] ? 2 : 4, c = outs + Input::kRegsA + Input::kRegsB;
  const Input input(x, in, outs);
  Row sum[kM];
  for (int i = 0; i < kLanes; ++i) {
    const int g = i >> 2, q = 2 * (i & 3);
    for (int h = 0; h < 4; ++h) {
      float value;
      if (in.mod[kHalfIn])
        value = from_f16(static_cast<u16>(x.in<u32>(in.op[c + (h >> 1)])[i] >> (16 * (h & 1))));
      else
        value = x.in<float>(in.op[c + h])[i];
      sum[g + 8 * (h >> 1)][q + (h & 1)] = value;
    }
  }
  input.multiply(sum);
  for (int i = 0; i < kLanes; ++i) {
    const int g = i >> 2, q = 2 * (i & 3);
    for (int h = 0; h < 2; ++h) {
      const double low = sum[g + 8 * h][q], high = sum[g + 8 * h][q + 1];
      if (in.mod[kHalfOut]) {
        x.out<u32>(in.op[h])[i] = u32{to_f16(high)} << 16 | to_f16(low);
      } else {
        x.out<float>(in.op[2 * h])[i] = static_cast<float>(low);
        x.out<float>(in.op[2 * h + 1])[i] = static_cast<float>(high);
      }
    }
  }
}

template <int kBits, int kK>
void mma_int(Exec& x, const Instr& in, Mask) {
  using Input = Operands<Int<kBits>, kK, i32, IntRow>;
  const Input input(x, in, 4);
  const int c = 4 + Input::kRegsA + Input::kRegsB;
  IntRow sum[kM] = {};
  input.multiply(sum);  // at most 64 * 2^14: no overflow
  i32 result[4][kLanes];
  for (int h = 0; h < 4; ++h) {
    const i32* old = x.in<i32>(in.op[c + h]);
    for (int i = 0; i < kLanes; ++i) {
      const i64 total = i64{old[i]} + sum[(i >> 2) + 8 * (h >> 1)][2 * (i & 3) + (h & 1)];
      const i64 kept = in.mod[kSaturate] ? std::clamp<i64>(total, INT32_MIN, INT32_MAX) : total;
      result[h][i] = static_cast<i32>(kept);
    }
  }
  for (int h = 0; h < 4; ++h) std::copy_n(result[h], kLanes, x.out<i32>(in.op[h]));
}

// f64 m8n8k4: A (group, quad), B (quad, group), C (group, 2 * quad + h).
void mma_double(Exec& x, const Instr& in, Mask) {
  const double *a = x.in<double>(in.op[2]), *b = x.in<double>(in.op[3]);
  double result[2][kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int h = 0; h < 2; ++h) {
      double sum = x.in<double>(in.op[4 + h])[i];
      for (int k = 0; k < 4; ++k) sum = std::fma(a[(i & ~3) + k], b[4 * (2 * (i & 3) + h) + k], sum);
      result[h][i] = sum;
    }
  for (int h = 0; h < 2; ++h) std::copy_n(result[h], kLanes, x.out<double>(in.op[h]));
}

// ldmatrix, stmatrix: mod[0] matrices, mod[1] transposed, mod[2] wide, mod[3] offset, mod[4] space.
// Lanes 8 * m .. 8 * m + 7 give the row addresses of matrix m.
Access matrix_rows(Exec& x, const Instr& in, Touch touch, int32_t address) {
  Access a;
  a.space = static_cast<Space>(in.mod[4]);
  a.touch = touch;
  a.bytes = 16;
  a.mask = in.mod[0] == 4 ? kFull : (Mask{1} << (8 * in.mod[0])) - 1;
  addresses(x, a, address, in.mod[2], in.mod[3]);
  resolve(x, a);
  return a;
}
// Where element e of a lane lies in an 8x8 matrix of 16-bit values.
std::pair<int, int> place(int lane, int e, bool transposed) {
  const int major = lane >> 2, minor = 2 * (lane & 3) + e;
  return transposed ? std::pair(minor, major) : std::pair(major, minor);
}

void ldmatrix(Exec& x, const Instr& in, Mask) {
  const int count = static_cast<int>(in.mod[0]);
  const Access a = matrix_rows(x, in, Touch::kRead, in.op[count]);
  for (int m = 0; m < count; ++m) {
    u16 matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], a.host[8 * m + r], 16);
    u32* out = x.out<u32>(in.op[m]);
    for (int i = 0; i < kLanes; ++i) {
      const auto [r0, c0] = place(i, 0, in.mod[1]);
      const auto [r1, c1] = place(i, 1, in.mod[1]);
      out[i] = u32{matrix[r1][c1]} << 16 | matrix[r0][c0];
    }
  }
}

void stmatrix(Exec& x, const Instr& in, Mask) {
  const int count = static_cast<int>(in.mod[0]);
  const Access a = matrix_rows(x, in, Touch::kWrite, in.op[0]);
  for (int m = 0; m < count; ++m) {
    const u32* value = x.in<u32>(in.op[1 + m]);
    for (int i = 0; i < kLanes; ++i)
      for (int e = 0; e < 2; ++e) {
        const auto [r, c] = place(i, e, in.mod[1]);
        const u16 half = static_cast<u16>(value[i] >> (16 * e));
        std::memcpy(a.host[8 * m + r] + 2 * c, &half, 2);
      }
  }
}

void movmatrix(Exec& x, const Instr& in, Mask) {
  u16 matrix[8][8];
  const u32* a = x.in<u32>(in.op[1]);
  for (int i = 0; i < kLanes; ++i)
    for (int e = 0; e < 2; ++e) matrix[i >> 2][2 * (i & 3) + e] = static_cast<u16>(a[i] >> (16 * e));
  u32* out = x.out<u32>(in.op[0]);
  for (int i = 0; i < kLanes; ++i) {
    const auto [r0, c0] = place(i, 0, true);
    const auto [r1, c1] = place(i, 1, true);
    out[i] = u32{matrix[r1][c1]} << 16 | matrix[r0][c0];
  }
}

const Entry kEntries[] = {
    {"mma.m16n8k16.f16", mma_float<Half, 16>},
    {"mma.m16n8k8.f16", mma_float<Half, 8>},
    {"mma.m16n8k16.bf16", mma_float<Brain, 16>},
    {"mma.m16n8k8.bf16", mma_float<Brain, 8>},
    {"mma.m16n8k8.tf32", mma_float<Tensor, 8>},
    {"mma.m16n8k4.tf32", mma_float<Tensor, 4>},
    {"mma.m16n8k32.i8", mma_int<8, 32>},
    {"mma.m16n8k16.i8", mma_int<8, 16>},
    {"mma.m16n8k64.i4", mma_int<4, 64>},
    {"mma.m16n8k32.i4", mma_int<4, 32>},
    {"mma.m8n8k4.f64", mma_double},
    {"ldmatrix", ldmatrix},
    {"stmatrix", stmatrix},
    {"movmatrix", movmatrix},
};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
