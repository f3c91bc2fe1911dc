#include "scheduler.h"

#include <algorithm>
#include <bit>

#include "special.h"

namespace ptx {

namespace {
constexpr int kSlice = 200000;  // instructions before another warp gets its turn (spin loops)
constexpr uint32_t kPoisonWord = 0xDEADBEEF;
}  // namespace

Scheduler::Scheduler(Launch& launch)
    : launch_(launch), program_(*launch.program), settings_(*launch.settings), random_(settings_.seed) {
  const int threads = settings_.block[0] * settings_.block[1] * settings_.block[2];
  const int count = (threads + kLanes - 1) / kLanes;
  warps_.resize(count);
  views_.reserve(count);
  launch_.shared.resize(settings_.static_shared);
  launch_.races.resize(settings_.static_shared, count, settings_.check_races, settings_.check_uninitialised);
  for (int i = 0; i < count; ++i) {
    Warp& w = warps_[i];
    w.index = i;
    w.regs.resize(size_t{kLanes} * program_.rows);
    w.preds.resize(program_.preds);
    w.local.resize(size_t{kLanes} * settings_.local_bytes);
    views_.push_back(Exec{launch_, &w, w.regs.data(), w.preds.data(), program_.consts.data()});
  }
}

void Scheduler::run() {
  for (block[2] = 0; block[2] < settings_.grid[2]; ++block[2])
    for (block[1] = 0; block[1] < settings_.grid[1]; ++block[1])
      for (block[0] = 0; block[0] < settings_.grid[0]; ++block[0]) {
        start_block();
        run_block();
        finish_block();
      }
}

void Scheduler::start_block() {
  launch_.shared.poison();
  launch_.races.start_block();
  live_threads_ = int64_t{settings_.block[0]} * settings_.block[1] * settings_.block[2];
  exited_warps_ = 0;
  for (Barrier& b : barriers_) b = Barrier{};
  for (Warp& w : warps_) start_warp(w);
}

void Scheduler::start_warp(Warp& w) {
  const int64_t left = live_threads_ - int64_t{w.index} * kLanes;
  w.live = left >= kLanes ? kFull : (Mask{1} << left) - 1;
  w.groups.assign(1, Group{0, w.live});
  std::fill(w.regs.begin(), w.regs.end(), kPoisonWord);
  std::fill(w.preds.begin(), w.preds.end(), 0);
  w.preds[kPredTrue] = kFull;
  w.copies.clear();
  std::fill(std::begin(w.committed), std::end(w.committed), 0);
  std::fill(w.local.begin(), w.local.end(), kPoison);
  fill_special_rows(program_, settings_, block, w);
}

void Scheduler::finish_block() {
  for (Warp& w : warps_) {
    for (const AsyncCopy& c : w.copies) launch_.profile[c.pc].unwaited += std::popcount(c.mask);
    w.copies.clear();
  }
}

bool Scheduler::ready(const Warp& w) const {
  for (const Group& g : w.groups)
    if (g.state == GroupState::kReady) return true;
  return false;
}

void Scheduler::run_block() {
  if (settings_.warp_order == 0) {
    while (true) {
      bool moved = false;
      for (size_t i = 0; i < warps_.size(); ++i) {
        if (!ready(warps_[i])) continue;
        step(warps_[i], views_[i]);
        moved = true;
      }
      if (moved) continue;
      if (live_threads_ == 0) return;
      deadlock();
    }
  }
  for (int i = -1;;) {
    i = next_warp(i);
    if (i < 0) {
      if (live_threads_ == 0) return;
      deadlock();
    }
    for (int n = 0; n < kSlice && ready(warps_[i]); ++n) step(warps_[i], views_[i]);
  }
}

int Scheduler::next_warp(int last) {
  std::vector<int> able;
  for (int i = 0; i < static_cast<int>(warps_.size()); ++i)
    if (ready(warps_[i])) able.push_back(i);
  if (able.empty()) return -1;
  if (settings_.seed) return able[random_() % able.size()];
  for (int i : able)
    if (i > last) return i;
  return able.front();
}

// Merge groups that met, then bring the ready group with the lowest program counter to the front.
void Scheduler::pick(Warp& w) {
  std::vector<Group>& g = w.groups;
  for (size_t i = 0; i < g.size(); ++i) {
    if (g[i].state == GroupState::kBarrier) continue;
    for (size_t j = g.size() - 1; j > i; --j) {
      if (g[j].state == GroupState::kBarrier || g[j].pc != g[i].pc) continue;
      g[i].mask |= g[j].mask;
      g[i].state = GroupState::kReady;
      g.erase(g.begin() + static_cast<std::ptrdiff_t>(j));
    }
  }
  size_t best = g.size();
  for (size_t i = 0; i < g.size(); ++i)
    if (g[i].state == GroupState::kReady && (best == g.size() || g[i].pc < g[best].pc)) best = i;
  std::swap(g[0], g[best]);
}

void Scheduler::step(Warp& w, Exec& x) {
  if (w.groups.size() > 1) pick(w);
  Group& g = w.groups[0];
  const Instr& in = program_.code[g.pc];
  warp = w.index;
  pc = x.pc = g.pc;
  x.active = g.mask;
  Mask mask = g.mask;
  if (in.guard >= 0) mask &= in.negated ? ~w.preds[in.guard] : w.preds[in.guard];
  if (in.flow >= Flow::kBarrier && mask && !converged(w, x, in, mask)) return;
  Profile& p = launch_.profile[g.pc];
  ++p.warps;
  p.threads += std::popcount(mask);
  if (++launch_.issued > settings_.max_instructions)
    throw Fault(FaultKind::kLimit, -1, "instruction limit reached: an endless loop, or raise max_instructions");
  switch (in.flow) {
    case Flow::kNext:
    case Flow::kAligned:
    case Flow::kMembers:
      if (mask) in.run(x, in, mask);
      ++g.pc;
      return;
    case Flow::kBranch:
      return branch(w, mask, static_cast<int32_t>(in.mod[0]));
    case Flow::kIndirect:
      return indirect(w, x, in, mask);
    case Flow::kExit:
      return leave(w, mask);
    case Flow::kBarrier:
      return barrier(w, x, in, mask);
  }
}

void Scheduler::branch(Warp& w, Mask taken, int32_t target) {
  Group& g = w.groups[0];
  if (taken == g.mask) {
    g.pc = target;
    return;
  }
  ++g.pc;
  if (!taken) return;
  g.mask &= ~taken;
  w.groups.push_back(Group{target, taken});
}

void Scheduler::indirect(Warp& w, Exec& x, const Instr& in, Mask mask) {
  const uint32_t* index = x.in<uint32_t>(in.op[0]);
  const Mask stay = w.groups[0].mask & ~mask;
  const int32_t next = w.groups[0].pc + 1;
  w.groups.erase(w.groups.begin());
  if (stay) w.groups.push_back(Group{next, stay});
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    if (index[i] >= static_cast<uint64_t>(in.mod[1]))
      throw Fault(FaultKind::kInvalid, i, "brx.idx index " + std::to_string(index[i]) + " out of range");
    w.groups.push_back(Group{program_.jumps[in.mod[0] + index[i]], Mask{1} << i});
  }
  pick(w);
}

void Scheduler::leave(Warp& w, Mask mask) {
  Group& g = w.groups[0];
  w.live &= ~mask;
  live_threads_ -= std::popcount(mask);
  g.mask &= ~mask;
  ++g.pc;
  if (!g.mask) w.groups.erase(w.groups.begin());
  for (Group& other : w.groups)
    if (other.state == GroupState::kParked) other.state = GroupState::kReady;
  if (!w.live) {
    exited_warps_ |= uint32_t{1} << w.index;
    launch_.races.arrive(w.index, false);
  }
  for (int id = 0; id < 16; ++id)
    if (barriers_[id].arrived && !barriers_[id].counted) open_if_complete(id);
}

// Warp-wide instructions: true when every lane that must be here is here.
bool Scheduler::converged(Warp& w, Exec& x, const Instr& in, Mask mask) {
  if (in.flow == Flow::kAligned) return all_here(w, in, mask, w.live);
  if (in.flow == Flow::kBarrier) return !in.mod[BarrierForm::kAligned] || all_here(w, in, mask, w.live);
  const uint32_t* members = x.in<uint32_t>(in.op[in.mod[5]]);
  Mask need = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    if (!on(members[i], i)) throw Fault(FaultKind::kInactiveLane, i, "lane is not in its own member mask");
    need |= members[i];
  }
  return all_here(w, in, mask, need & w.live);
}

bool Scheduler::all_here(Warp& w, const Instr& in, Mask mask, Mask need) {
  const Mask absent = need & ~mask;
  if (!absent) return true;
  Group& g = w.groups[0];
  if (absent & g.mask) {
    const FaultKind kind = in.flow == Flow::kBarrier ? FaultKind::kDivergentBarrier : FaultKind::kInactiveLane;
    throw Fault(kind, std::countr_zero(absent & g.mask), "predicate switches off a lane that must take part");
  }
  g.state = GroupState::kParked;
  return false;
}

}  // namespace ptx
