// What runs: blocks, warps, and the view of one warp that a handler gets.
#pragma once

#include <memory>

#include "memory.h"
#include "program.h"
#include "races.h"

namespace ptx {

// Counters of one instruction of the program, summed over warps and blocks.
struct Profile {
  int64_t warps = 0;        // issues
  int64_t threads = 0;      // lanes that executed it (guard true)
  int64_t bytes = 0;        // bytes moved by those lanes
  int64_t sectors = 0;      // 32-byte sectors requested (global)
  int64_t useful = 0;       // distinct bytes of them that were asked for
  int64_t wavefronts = 0;   // shared-memory passes taken
  int64_t ideal = 0;        // passes without bank conflicts
  int64_t conflicted = 0;   // accesses with at least one extra pass
  int64_t low = INT64_MAX;  // lowest address touched
  int64_t high = -1;        // one past the highest
  int64_t waits = 0;        // async waits executed
  int64_t before = 0;       // async bytes in flight before the wait, summed
  int64_t after = 0;        // ... and after it
  int64_t after_min = INT64_MAX;
  int64_t unwaited = 0;  // async copies (per lane) that no wait ever forced
};
constexpr int kProfileFields = 15;
static_assert(sizeof(Profile) == kProfileFields * sizeof(int64_t));

struct AsyncCopy {
  Mask mask;
  int bytes;
  int32_t pc;
  uint64_t shared[kLanes];
  uint64_t global[kLanes];
  uint8_t source_bytes[kLanes];  // the rest is filled with zeros
  uint32_t group[kLanes];
};

enum class GroupState : uint8_t { kReady, kParked, kBarrier };

// Lanes of a warp that share a program counter.
struct Group {
  int32_t pc = 0;
  Mask mask = 0;
  GroupState state = GroupState::kReady;
  int8_t barrier = -1;
};

struct Warp {
  int index = 0;
  Mask live = 0;
  std::vector<Group> groups;  // groups[0] is the running one
  std::vector<uint32_t> regs;
  std::vector<uint32_t> preds;
  std::vector<AsyncCopy> copies;
  uint32_t committed[kLanes] = {};
  std::vector<uint8_t> local;
};

struct LaunchSettings {
  int32_t grid[3], block[3];
  int32_t static_shared;   // all shared bytes, dynamic ones included
  int32_t dynamic_shared;  // for %dynamic_smem_size
  int32_t local_bytes;
  int32_t warp_order;  // 0: lockstep, 1: warp by warp
  int32_t check_races;
  int32_t check_uninitialised;
  int32_t param_bytes;
  int32_t buffer_count;
  int64_t seed;
  int64_t max_instructions;  // warp instructions of the launch
  const uint8_t* params;
  const uint64_t* buffer_bases;
  const uint64_t* buffer_sizes;
  uint8_t* const* buffer_hosts;
  const char* const* buffer_names;
};

struct Launch {
  const Program* program;
  const LaunchSettings* settings;
  GlobalMemory global;
  SharedMemory shared;
  RaceChecker races;
  Profile* profile;
  int64_t issued = 0;
};

struct Exec {
  Launch& launch;
  Warp* warp = nullptr;
  uint32_t* regs = nullptr;
  uint32_t* preds = nullptr;
  const uint32_t* consts = nullptr;
  Mask active = 0;  // lanes at this instruction, before the guard
  int32_t pc = 0;

  Profile& profile() { return launch.profile[pc]; }

  template <class T>
  const T* in(int32_t row) const {
    const uint32_t* base = row >= 0 ? regs + int64_t{row} * kLanes : consts + ~int64_t{row} * kLanes;
    return reinterpret_cast<const T*>(base);
  }
  template <class T>
  T* out(int32_t row) const {
    return reinterpret_cast<T*>(regs + int64_t{row} * kLanes);
  }
  Mask pred(int32_t slot) const { return preds[slot]; }
  void set_pred(int32_t slot, Mask value, Mask mask) { preds[slot] = (preds[slot] & ~mask) | (value & mask); }
};

inline bool on(Mask mask, int lane) { return (mask >> lane) & 1; }

}  // namespace ptx
