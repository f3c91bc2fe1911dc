// cp.async: copies wait in a queue and happen as late as the program allows, at the wait that
// forces them.
#include <algorithm>
#include <bit>

#include "lanes.h"

namespace ptx {

namespace {

// cp.async: op = shared, global, size row or predicate; mods mirror decode.py.
enum Mod { kBytes = 0, kSharedWide = 1, kGlobalWide = 2, kSharedOffset = 3, kGlobalOffset = 4, kPartial = 5 };
enum Partial { kWhole = 0, kSourceSize = 1, kIgnore = 2, kNotIgnore = 3 };

void copy_async(Exec& x, const Instr& in, Mask mask) {
  Warp& w = *x.warp;
  AsyncCopy copy{};
  copy.mask = mask;
  copy.bytes = static_cast<int>(in.mod[kBytes]);
  copy.pc = x.pc;
  Access from, to;
  addresses(x, to, in.op[0], in.mod[kSharedWide], in.mod[kSharedOffset]);
  addresses(x, from, in.op[1], in.mod[kGlobalWide], in.mod[kGlobalOffset]);
  to.mask = from.mask = mask;
  to.bytes = from.bytes = copy.bytes;
  const uint64_t low = static_cast<uint64_t>(copy.bytes) - 1;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(mask, i)) continue;
    int64_t size = copy.bytes;
    if (in.mod[kPartial] == kSourceSize) size = x.in<u32>(in.op[2])[i];
    if (in.mod[kPartial] >= kIgnore && on(x.pred(in.op[2]), i) == (in.mod[kPartial] == kIgnore)) size = 0;
    if (size > copy.bytes) throw Fault(FaultKind::kInvalid, i, "cp.async source size exceeds the copy size");
    if ((to.address[i] & low) || (size && (from.address[i] & low)))
      throw Fault(FaultKind::kMisaligned, i, "cp.async addresses are not multiples of " + std::to_string(copy.bytes));
    if ((to.address[i] & kWindowMask) == kSharedWindow) to.address[i] &= ~kWindowMask;
    copy.source_bytes[i] = static_cast<uint8_t>(size);
    copy.shared[i] = to.address[i];
    copy.global[i] = from.address[i];
    copy.group[i] = w.committed[i];
    if (size) x.launch.global.at(from.address[i], static_cast<uint64_t>(size), i);
    x.launch.shared.at(to.address[i], copy.bytes, i);
    x.launch.races.async_issue(to.address[i] - kSharedBase, copy.bytes, w.index, i);
  }
  count_sectors(x, from, copy.source_bytes);
  count_banks(x, to);
  count_range(x, from, copy.source_bytes);
  x.profile().bytes += int64_t{copy.bytes} * std::popcount(mask);
  w.copies.push_back(copy);
}

void perform(Exec& x, const AsyncCopy& c, Mask lanes) {
  for (int i = 0; i < kLanes; ++i) {
    if (!on(lanes, i)) continue;
    uint8_t* to = x.launch.shared.at(c.shared[i], c.bytes, i);
    const int have = c.source_bytes[i];
    if (have) std::memcpy(to, x.launch.global.at(c.global[i], have, i), have);
    std::memset(to + have, 0, c.bytes - have);
    x.launch.races.async_arrive(c.shared[i] - kSharedBase, c.bytes, x.warp->index);
  }
}

int64_t in_flight(const Warp& w) {
  int64_t bytes = 0;
  for (const AsyncCopy& c : w.copies)
    for (int i = 0; i < kLanes; ++i) bytes += on(c.mask, i) ? c.source_bytes[i] : 0;
  return bytes;
}

// Everything of a lane but its newest `keep` committed groups; all of it when keep is negative.
void wait_for(Exec& x, Mask mask, int64_t keep) {
  Warp& w = *x.warp;
  Profile& p = x.profile();
  ++p.waits;
  p.before += in_flight(w);
  for (AsyncCopy& c : w.copies) {
    Mask due = 0;
    for (int i = 0; i < kLanes; ++i)
      if (on(mask & c.mask, i) && (keep < 0 || int64_t{c.group[i]} < int64_t{w.committed[i]} - keep))
        due |= Mask{1} << i;
    perform(x, c, due);
    c.mask &= ~due;
  }
  std::erase_if(w.copies, [](const AsyncCopy& c) { return c.mask == 0; });
  const int64_t left = in_flight(w);
  p.after += left;
  p.after_min = std::min(p.after_min, left);
}

void commit(Exec& x, const Instr&, Mask mask) {
  for (int i = 0; i < kLanes; ++i)
    if (on(mask, i)) ++x.warp->committed[i];
}
void wait_group(Exec& x, const Instr& in, Mask mask) { wait_for(x, mask, in.mod[0]); }
void wait_all(Exec& x, const Instr&, Mask mask) { wait_for(x, mask, -1); }

const Entry kEntries[] = {{"cp.async", copy_async},
                          {"cp.async.commit", commit},
                          {"cp.async.wait_group", wait_group},
                          {"cp.async.wait_all", wait_all}};
const Registrar kRegistrar(kEntries);

}  // namespace
}  // namespace ptx
