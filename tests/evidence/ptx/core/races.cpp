#include "races.h"

#include <algorithm>
#include <bit>

namespace ptx {

namespace {
constexpr uint32_t kTimeShift = 7, kCommonBit = 64, kAtomicBit = 32, kWarpBits = 31;
constexpr uint32_t kLastTime = (uint32_t{1} << (32 - kTimeShift)) - (uint32_t{1} << 20);
}  // namespace

void RaceChecker::resize(uint64_t bytes, int warps, bool races, bool uninitialised) {
  races_ = races;
  uninitialised_ = uninitialised;
  writes_.assign(bytes, 0);
  reads_.assign(bytes, Reads{0, 0});
  pending_.assign(bytes, 0);
  writers_.assign(bytes, 0);
  seen_.assign(size_t{kWarps} * kWarps, UINT32_MAX);
  snapshot_.assign(size_t{kWarps} * kWarps, 0);
  left_.assign(kWarps, 0);
  lowest_.assign(kWarps, 0);
  warps_ = warps;
}

void RaceChecker::start_block() {
  ++time_;
  if (time_ > kLastTime) {
    std::fill(writes_.begin(), writes_.end(), 0);
    std::fill(reads_.begin(), reads_.end(), Reads{0, 0});
    time_ = 1;
  }
  std::fill(pending_.begin(), pending_.end(), 0);
  block_start_ = time_;
  for (int w = 0; w < warps_; ++w) {
    lowest_[w] = time_;
    for (int u = 0; u < warps_; ++u) seen_[w * kWarps + u] = u == w ? UINT32_MAX : time_;
  }
}

void RaceChecker::arrive(int warp, bool goes_on) {
  left_[warp] = time_ + 1;
  if (goes_on) ++time_;  // what the warp does from now on is later
  std::copy_n(&seen_[warp * kWarps], kWarps, &snapshot_[warp * kWarps]);
}

void RaceChecker::release(uint32_t arrived, uint32_t synced) {
  ++time_;
  uint32_t merged[kWarps] = {};
  for (int u = 0; u < warps_; ++u) {
    if (!((arrived >> u) & 1)) continue;
    for (int v = 0; v < warps_; ++v)
      if (v != u) merged[v] = std::max(merged[v], snapshot_[u * kWarps + v]);
    merged[u] = std::max(merged[u], left_[u]);
  }
  for (int w = 0; w < warps_; ++w) {
    if (!((synced >> w) & 1)) continue;
    lowest_[w] = UINT32_MAX;
    for (int u = 0; u < warps_; ++u) {
      if (u == w) continue;
      uint32_t& seen = seen_[w * kWarps + u];
      seen = std::max(seen, merged[u]);
      lowest_[w] = std::min(lowest_[w], seen);
    }
  }
}

void RaceChecker::report(uint64_t offset, int warp, int lane, const char* what, int other) const {
  std::string text = std::string(what) + " shared byte +" + std::to_string(offset) + " by warp " +
                     std::to_string(warp) + ", not ordered by a barrier with warp " + std::to_string(other);
  throw Fault(FaultKind::kRace, lane, text);
}

void RaceChecker::async_report(uint64_t offset, int warp, int lane, const char* what) const {
  std::string text = std::string(what) + " shared byte +" + std::to_string(offset) + " by warp " +
                     std::to_string(warp) + " while a cp.async of warp " + std::to_string(pending_[offset] - 1) +
                     " into it is in flight";
  throw Fault(FaultKind::kAsyncRace, lane, text);
}

void RaceChecker::check_written(uint64_t offset, int bytes, int lane) const {
  for (uint64_t o = offset; uninitialised_ && o < offset + bytes; ++o)
    if (!pending_[o] && (writes_[o] >> kTimeShift) < block_start_)
      throw Fault(FaultKind::kUninitialised, lane, "read of shared byte +" + std::to_string(o) + " that nobody wrote");
}

// The warps whose write a byte holds: more than one when they wrote the same value.
uint32_t RaceChecker::writers_of(uint64_t offset) const {
  const uint32_t entry = writes_[offset];
  return entry & kCommonBit ? writers_[offset] : uint32_t{1} << (entry & kWarpBits);
}

// A warp of the set whose access at that time is not ordered before what `warp` does, or -1.
int RaceChecker::unordered(uint32_t time, uint32_t set, int warp) const {
  if (time < block_start_) return -1;
  for (uint32_t rest = set; rest; rest &= rest - 1)
    if (!ordered(time, warp, std::countr_zero(rest))) return std::countr_zero(rest);
  return -1;
}

void RaceChecker::slow_read(uint64_t offset, int bytes, int warp, int lane) {
  check_written(offset, bytes, lane);
  for (uint64_t o = offset; races_ && o < offset + bytes; ++o) {
    if (pending_[o]) async_report(o, warp, lane, "read of");
    const uint32_t set = writers_of(o);
    if ((set >> warp) & 1) continue;
    const int other = unordered(writes_[o] >> kTimeShift, set, warp);
    if (other >= 0) report(o, warp, lane, "read of", other);
  }
}

// The loops below look for anything odd in all bytes at once; only then the exact check runs.
template <int kBytes>
bool RaceChecker::note_read(uint64_t offset, int count, int warp) {
  const int bytes = kBytes ? kBytes : count;
  const uint32_t self = static_cast<uint32_t>(warp), bit = uint32_t{1} << warp, now = time_;
  const uint32_t lowest = lowest_[warp], start = block_start_;
  const uint32_t* w = &writes_[offset];
  const uint8_t* p = &pending_[offset];
  Reads* r = &reads_[offset];
  uint32_t odd = 0;
#pragma GCC ivdep
  for (int i = 0; i < bytes; ++i) {
    const uint32_t time = w[i] >> kTimeShift;
    odd |= uint32_t{time < start} | (uint32_t{time >= lowest} & uint32_t{(w[i] & kWarpBits) != self}) | p[i];
  }
#pragma GCC ivdep
  for (int i = 0; i < bytes; ++i) {
    const bool replace = r[i].time < lowest;
    r[i].warps = (replace ? 0 : r[i].warps) | bit;
    r[i].time = now;
  }
  return odd;
}

void RaceChecker::read(uint64_t offset, int bytes, int warp, int lane) {
  if (!races_ && !uninitialised_) return;
  const bool odd = bytes == 16  ? note_read<16>(offset, bytes, warp)
                   : bytes == 4 ? note_read<4>(offset, bytes, warp)
                                : note_read<0>(offset, bytes, warp);
  if (odd) slow_read(offset, bytes, warp, lane);
}

// Exact check of a write, byte by byte. Compilers let several warps store the same value to the same
// place (a tensor that is replicated over warps): such writes count as one write of all of them.
void RaceChecker::check_write(uint64_t offset, int bytes, int warp, int lane, bool atomic, const uint8_t* held,
                              const uint8_t* data) {
  if (atomic) check_written(offset, bytes, lane);
  const char* what = atomic ? "atomic on" : "write to";
  for (int i = 0; i < bytes; ++i) {
    const uint64_t o = offset + i;
    if (races_ && pending_[o]) async_report(o, warp, lane, what);
    const uint32_t entry = writes_[o], set = writers_of(o);
    int other = unordered(entry >> kTimeShift, set, warp);
    if (atomic && (entry & kAtomicBit)) other = -1;
    const bool common = other >= 0 && data && held[i] == data[i];
    if (races_ && other >= 0 && !common) report(o, warp, lane, what, other);
    const int reader = unordered(reads_[o].time, common ? reads_[o].warps & ~set : reads_[o].warps, warp);
    if (races_ && reader >= 0) report(o, warp, lane, what, reader);
    writers_[o] = set | uint32_t{1} << warp;
    writes_[o] = common ? entry_of(warp, false) | kCommonBit : entry_of(warp, atomic);
  }
}

uint32_t RaceChecker::entry_of(int warp, bool atomic) const {
  return (time_ << kTimeShift) | (atomic ? kAtomicBit : 0) | static_cast<uint32_t>(warp);
}

template <int kBytes>
bool RaceChecker::odd_write(uint64_t offset, int count, int warp, bool atomic) const {
  const int bytes = kBytes ? kBytes : count;
  const uint32_t self = static_cast<uint32_t>(warp), bit = uint32_t{1} << warp, lowest = lowest_[warp];
  const uint32_t first = atomic ? block_start_ : 0;
  const uint32_t* w = &writes_[offset];
  const uint8_t* p = &pending_[offset];
  const Reads* r = &reads_[offset];
  uint32_t odd = 0;
  for (int i = 0; i < bytes; ++i) {
    const uint32_t time = w[i] >> kTimeShift;
    odd |= uint32_t{time < first} | (uint32_t{time >= lowest} & uint32_t{(w[i] & kWarpBits) != self}) | p[i];
    odd |= uint32_t{r[i].time >= lowest} & uint32_t{(r[i].warps & ~bit) != 0};
  }
  return odd;
}

bool RaceChecker::odd_write(uint64_t offset, int bytes, int warp, bool atomic) const {
  return bytes == 16  ? odd_write<16>(offset, bytes, warp, atomic)
         : bytes == 4 ? odd_write<4>(offset, bytes, warp, atomic)
                      : odd_write<0>(offset, bytes, warp, atomic);
}

void RaceChecker::write(uint64_t offset, int bytes, int warp, int lane, bool atomic, const uint8_t* held,
                        const uint8_t* data) {
  if (!races_ && !uninitialised_) return;
  if (odd_write(offset, bytes, warp, atomic))
    check_write(offset, bytes, warp, lane, atomic, held, data);
  else
    std::fill_n(&writes_[offset], bytes, entry_of(warp, atomic));
  std::fill_n(&reads_[offset], bytes, Reads{0, 0});
}

void RaceChecker::async_issue(uint64_t offset, int bytes, int warp, int lane) {
  if (!races_ && !uninitialised_) return;
  if (odd_write(offset, bytes, warp, false)) check_write(offset, bytes, warp, lane, false, nullptr, nullptr);
  std::fill_n(&pending_[offset], bytes, static_cast<uint8_t>(1 + warp));
}

void RaceChecker::async_arrive(uint64_t offset, int bytes, int warp) {
  if (!races_ && !uninitialised_) return;
  std::fill_n(&pending_[offset], bytes, uint8_t{0});
  std::fill_n(&writes_[offset], bytes, entry_of(warp, false));
  std::fill_n(&reads_[offset], bytes, Reads{0, 0});
}

}  // namespace ptx
