// Runs the blocks of a launch one after the other: lockstep or warp by warp.
#pragma once

#include <random>

#include "state.h"

namespace ptx {

// Inside a warp the group of lanes with the lowest program counter runs, so that diverged lanes
// meet again; a group that reaches a warp-wide instruction waits (parked) for the missing lanes.
class Scheduler {
 public:
  explicit Scheduler(Launch& launch);
  void run();

  // Where execution stood when a fault was thrown.
  int32_t block[3] = {0, 0, 0};
  int32_t warp = 0;
  int32_t pc = 0;

 private:
  struct Barrier {
    int64_t expected = 0;
    int64_t arrived = 0;
    bool counted = false;
    uint32_t arrived_warps = 0, synced_warps = 0;
    int32_t pc = 0;
    int64_t count_true = 0, count_seen = 0;
  };

  void start_block();
  void start_warp(Warp& w);
  void run_block();
  void finish_block();
  bool ready(const Warp& w) const;
  void pick(Warp& w);
  void step(Warp& w, Exec& x);
  void branch(Warp& w, Mask taken, int32_t target);
  void indirect(Warp& w, Exec& x, const Instr& in, Mask mask);
  void leave(Warp& w, Mask mask);
  bool converged(Warp& w, Exec& x, const Instr& in, Mask mask);
  bool all_here(Warp& w, const Instr& in, Mask mask, Mask need);
  void barrier(Warp& w, Exec& x, const Instr& in, Mask mask);
  void open_if_complete(int id);
  void deliver(Warp& w, Group& g, const Barrier& b);
  [[noreturn]] void deadlock();
  int next_warp(int last);

  Launch& launch_;
  const Program& program_;
  const LaunchSettings& settings_;
  std::vector<Warp> warps_;
  std::vector<Exec> views_;
  Barrier barriers_[16];
  int64_t live_threads_ = 0;
  uint32_t exited_warps_ = 0;
  std::mt19937_64 random_;
};

}  // namespace ptx
