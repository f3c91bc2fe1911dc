// Instructions across the lanes of a warp: shfl, vote, match, redux, activemask, elect.
#include <bit>

#include "lanes.h"

namespace ptx {

namespace {

constexpr int kMembers = 5;  // mod that holds the operand index of the member mask

Mask members(const Exec& x, const Instr& in, int lane) { return x.in<u32>(in.op[in.mod[kMembers]])[lane]; }

// shfl: op = d, p, a, b, c, members; mod[0]: 0 up, 1 down, 2 bfly, 3 idx.
void shfl(Exec& x, const Instr& in, Mask mask) {
  u32 value[kLanes];
  Mask valid = 0;
  const u32* a = x.in<u32>(in.op[2]);
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    const int b = static_cast<int>(x.in<u32>(in.op[3])[i] & 31), c = static_cast<int>(x.in<u32>(in.op[4])[i]);
    const int clamp = c & 31, segment = (c >> 8) & 31;
    const int low = i & segment, high = low | (clamp & ~segment);
    int source = i;
    bool inside = false;
    switch (in.mod[0]) {
      case 0:
        source = i - b;
        inside = source >= high;
        break;
      case 1:
        source = i + b;
        inside = source <= high;
        break;
      case 2:
        source = i ^ b;
        inside = source <= high;
        break;
      default:
        source = low | (b & ~segment);
        inside = source <= high;
        break;
    }
    if (!inside) source = i;
    if (!on(mask & members(x, in, i), source))
      throw Fault(FaultKind::kInactiveLane, i, "shfl reads lane " + std::to_string(source) + ", which takes no part");
    value[i] = a[source];
    valid |= Mask{inside} << i;
  }
  u32* out = x.out<u32>(in.op[0]);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) out[i] = value[i];
  x.set_pred(in.op[1], valid, mask);
}

// vote: op = d, p, members; mod[0]: 0 all, 1 any, 2 uni, 3 ballot; mod[1] negates the source.
void vote(Exec& x, const Instr& in, Mask mask) {
  const Mask source = in.mod[1] ? ~x.pred(in.op[1]) : x.pred(in.op[1]);
  Mask result = 0;
  u32 ballot[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    const Mask group = members(x, in, i) & mask, yes = source & group;
    const bool answer[] = {yes == group, yes != 0, yes == 0 || yes == group, false};
    result |= Mask{answer[in.mod[0]]} << i;
    ballot[i] = yes;
  }
  if (in.mod[0] != 3) return x.set_pred(in.op[0], result, mask);
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = ballot[i];
}

// match: op = d, p, a, members; mod[0]: 1 all; mod[1]: 1 for 64-bit values.
void match(Exec& x, const Instr& in, Mask mask) {
  u64 value[kLanes];
  for (int i = 0; i < kLanes; ++i) value[i] = in.mod[1] ? x.in<u64>(in.op[2])[i] : x.in<u32>(in.op[2])[i];
  u32 result[kLanes] = {};
  Mask same = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    const Mask group = members(x, in, i) & mask;
    for (int j = 0; j < kLanes; ++j)
      if (on(group, j) && value[j] == value[i]) result[i] |= Mask{1} << j;
    const bool all = result[i] == group;
    same |= Mask{all} << i;
    if (in.mod[0] && !all) result[i] = 0;
  }
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = result[i];
  x.set_pred(in.op[1], same, mask);
}

// redux: op = d, a, members; mod[0]: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; mod[1]: signed.
void redux(Exec& x, const Instr& in, Mask mask) {
  const u32* a = x.in<u32>(in.op[1]);
  u32 result[kLanes];
  const auto join = [&](u32 p, u32 q) -> u32 {
    const bool less = in.mod[1] ? static_cast<i32>(p) < static_cast<i32>(q) : p < q;
    switch (in.mod[0]) {
      case 0:
        return p + q;
      case 1:
        return less ? p : q;
      case 2:
        return less ? q : p;
      case 3:
        return p & q;
      case 4:
        return p | q;
      default:
        return p ^ q;
    }
  };
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    Mask rest = members(x, in, i) & mask;
    u32 total = a[std::countr_zero(rest)];
    for (rest &= rest - 1; rest; rest &= rest - 1) total = join(total, a[std::countr_zero(rest)]);
    result[i] = total;
  }
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = result[i];
}

void activemask(Exec& x, const Instr& in, Mask mask) {
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) x.out<u32>(in.op[0])[i] = mask;
}

// elect: op = d, p, members: the lowest member is elected.
void elect(Exec& x, const Instr& in, Mask mask) {
  Mask elected = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    const int leader = std::countr_zero(members(x, in, i) & mask);
    x.out<u32>(in.op[0])[i] = static_cast<u32>(leader);
    elected |= Mask{leader == i} << i;
  }
  x.set_pred(in.op[1], elected, mask);
}

const Entry kEntries[] = {
    {"shfl", shfl}, {"vote", vote}, {"match", match}, {"redux", redux}, {"activemask", activemask}, {"elect", elect}};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
