// Block barriers: bar.sync, bar.arrive, bar.red and the barrier.cta forms.
#include <bit>

#include "scheduler.h"

namespace ptx {

void Scheduler::barrier(Warp& w, Exec& x, const Instr& in, Mask mask) {
  Group& g = w.groups[0];
  if (!mask) {
    ++g.pc;
    return;
  }
  const int lane = std::countr_zero(mask);
  const uint32_t id = x.in<uint32_t>(in.op[BarrierForm::kId])[lane];
  if (id >= 16) throw Fault(FaultKind::kInvalid, lane, "barrier " + std::to_string(id) + " does not exist");
  Barrier& b = barriers_[id];
  const bool counted = in.mod[BarrierForm::kCounted];
  if (b.arrived == 0) {
    b.counted = counted;
    b.pc = x.pc;
    if (counted) b.expected = x.in<uint32_t>(in.op[BarrierForm::kCount])[lane];
  } else if (!counted && b.pc != x.pc) {
    throw Fault(FaultKind::kDivergentBarrier, lane,
                "other warps wait at the barrier of line " + std::to_string(program_.code[b.pc].line));
  }
  const bool whole = counted && in.mod[BarrierForm::kAligned];
  b.arrived += whole ? kLanes : std::popcount(mask);
  b.arrived_warps |= uint32_t{1} << w.index;
  launch_.races.arrive(w.index, in.mod[BarrierForm::kKind] == BarrierForm::kArrive);
  if (in.mod[BarrierForm::kKind] == BarrierForm::kReduce) {
    const Mask source = x.pred(in.op[BarrierForm::kSource]);
    b.count_true += std::popcount((in.mod[BarrierForm::kNegated] ? ~source : source) & mask);
    b.count_seen += std::popcount(mask);
  }
  if (in.mod[BarrierForm::kKind] == BarrierForm::kArrive) {
    ++g.pc;
  } else {
    b.synced_warps |= uint32_t{1} << w.index;
    const Mask stay = g.mask & ~mask;
    if (stay) w.groups.push_back(Group{g.pc + 1, stay});
    w.groups[0].mask = mask;
    w.groups[0].state = GroupState::kBarrier;
    w.groups[0].barrier = static_cast<int8_t>(id);
  }
  open_if_complete(static_cast<int>(id));
}

void Scheduler::open_if_complete(int id) {
  Barrier& b = barriers_[id];
  if (b.arrived < (b.counted ? b.expected : live_threads_)) return;
  for (Warp& w : warps_)
    for (Group& g : w.groups)
      if (g.state == GroupState::kBarrier && g.barrier == id) deliver(w, g, b);
  launch_.races.release(b.arrived_warps | (b.counted ? 0 : exited_warps_), b.synced_warps);
  b = Barrier{};
}

// Lanes leave the barrier, with the result of a reduction where one was asked.
void Scheduler::deliver(Warp& w, Group& g, const Barrier& b) {
  const Instr& in = program_.code[g.pc];
  if (in.mod[BarrierForm::kKind] == BarrierForm::kReduce) {
    Exec& x = views_[w.index];
    const int32_t result = in.op[BarrierForm::kResult];
    if (in.mod[BarrierForm::kReduction] == BarrierForm::kPopc) {
      uint32_t* out = x.out<uint32_t>(result);
      for (int i = 0; i < kLanes; ++i)
        if (on(g.mask, i)) out[i] = static_cast<uint32_t>(b.count_true);
    } else {
      const bool all = in.mod[BarrierForm::kReduction] == BarrierForm::kAnd;
      x.set_pred(result, (all ? b.count_true == b.count_seen : b.count_true > 0) ? kFull : 0, g.mask);
    }
  }
  g.state = GroupState::kReady;
  g.barrier = -1;
  ++g.pc;
}

void Scheduler::deadlock() {
  const Group* held = nullptr;
  std::string who;
  for (const Warp& w : warps_) {
    for (const Group& g : w.groups) {
      if (!held || (held->state == GroupState::kBarrier && g.state == GroupState::kParked)) {
        held = &g;
        warp = w.index;
        pc = g.pc;
      }
      char text[80];
      std::snprintf(text, sizeof text, " warp %d lanes %08x at line %d;", w.index, g.mask, program_.code[g.pc].line);
      if (who.size() < 600) who += text;
    }
  }
  const bool at_barrier = program_.code[pc].flow == Flow::kBarrier;
  throw Fault(at_barrier ? FaultKind::kDivergentBarrier : FaultKind::kDeadlock,
              held ? std::countr_zero(held->mask) : -1, "nobody can go on:" + who);
}

}  // namespace ptx
