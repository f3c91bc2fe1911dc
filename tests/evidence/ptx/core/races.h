// Shared-memory race checker by warp and barrier epoch.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace ptx {

// Time is one counter that advances when a barrier opens, and when a warp arrives at one without
// waiting. seen_[w][u] is the time before which everything that warp u did is ordered before what
// warp w does now. Each byte of
// shared memory remembers its last write (time, warp) and its last reads (time, warps; concurrent
// reads share the latest time, which is exact unless barriers of warp subsets interleave); two
// accesses of different warps of which one writes must be ordered by barriers. Bytes that an
// asynchronous copy will fill are pending from issue to wait: nobody may touch them.
class RaceChecker {
 public:
  void resize(uint64_t bytes, int warps, bool races, bool uninitialised);
  void start_block();
  void read(uint64_t offset, int bytes, int warp, int lane);
  // `held` is what memory holds now, `data` what will be written (null: unknown, taken as different).
  void write(uint64_t offset, int bytes, int warp, int lane, bool atomic, const uint8_t* held, const uint8_t* data);
  void async_issue(uint64_t offset, int bytes, int warp, int lane);
  void async_arrive(uint64_t offset, int bytes, int warp);

  void arrive(int warp, bool goes_on);              // a warp reaches a barrier, or exits
  void release(uint32_t arrived, uint32_t synced);  // the barrier opens; masks of warps

 private:
  struct Reads {
    uint32_t time, warps;
  };
  bool ordered(uint32_t time, int warp, int other) const { return time < seen_[warp * kWarps + other]; }
  void check_written(uint64_t offset, int bytes, int lane) const;
  template <int kBytes>
  bool note_read(uint64_t offset, int count, int warp);
  template <int kBytes>
  bool odd_write(uint64_t offset, int count, int warp, bool atomic) const;
  bool odd_write(uint64_t offset, int bytes, int warp, bool atomic) const;
  void slow_read(uint64_t offset, int bytes, int warp, int lane);
  void check_write(uint64_t offset, int bytes, int warp, int lane, bool atomic, const uint8_t* held,
                   const uint8_t* data);
  uint32_t writers_of(uint64_t offset) const;
  int unordered(uint32_t time, uint32_t set, int warp) const;
  uint32_t entry_of(int warp, bool atomic) const;
  [[noreturn]] void report(uint64_t offset, int warp, int lane, const char* what, int other) const;
  [[noreturn]] void async_report(uint64_t offset, int warp, int lane, const char* what) const;

  static constexpr int kWarps = 32;
  std::vector<uint32_t> writes_;   // time << 7 | common << 6 | atomic << 5 | warp
  std::vector<uint32_t> writers_;  // of common writes: every warp that wrote the value
  std::vector<Reads> reads_;
  std::vector<uint8_t> pending_;                  // 1 + warp of the copy in flight
  std::vector<uint32_t> seen_, snapshot_, left_;  // left_: time at which a warp last arrived
  std::vector<uint32_t> lowest_;                  // the smallest seen_ of a warp
  uint32_t time_ = 1, block_start_ = 1;
  int warps_ = 0;
  bool races_ = true, uninitialised_ = true;
};

}  // namespace ptx
