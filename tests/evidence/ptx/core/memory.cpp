#include "memory.h"

#include <bit>
#include <cstdio>

#include "state.h"

namespace ptx {

namespace {

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

void check_alignment(const Access& a) {
  uint64_t odd = 0;
  const uint64_t low = static_cast<uint64_t>(a.bytes) - 1;
  for (int i = 0; i < kLanes; ++i) odd |= on(a.mask, i) ? a.address[i] & low : 0;
  if (!odd) return;
  for (int i = 0; i < kLanes; ++i)
    if (on(a.mask, i) && (a.address[i] & low))
      throw Fault(FaultKind::kMisaligned, i,
                  "address " + hex(a.address[i]) + " is not a multiple of " + std::to_string(a.bytes));
}

void resolve_global(Exec& x, Access& a) {
  for (int i = 0; i < kLanes; ++i)
    if (on(a.mask, i)) a.host[i] = x.launch.global.at(a.address[i], a.bytes, i);
  count_sectors(x, a, nullptr);
}

void resolve_shared(Exec& x, Access& a) {
  RaceChecker& races = x.launch.races;
  const int warp = x.warp->index;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(a.mask, i)) continue;
    a.host[i] = x.launch.shared.at(a.address[i], a.bytes, i);
    const uint64_t offset = a.address[i] - kSharedBase;
    if (a.touch == Touch::kRead)
      races.read(offset, a.bytes, warp, i);
    else
      races.write(offset, a.bytes, warp, i, a.touch == Touch::kAtomic, a.host[i],
                  a.data ? a.data + i * a.bytes : nullptr);
  }
  count_banks(x, a);
}

void resolve_local(Exec& x, Access& a) {
  const uint64_t size = x.launch.settings->local_bytes;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(a.mask, i)) continue;
    if (!within(a.address[i], a.bytes, size))
      throw Fault(FaultKind::kOutOfBounds, i,
                  "local address " + hex(a.address[i]) + " of " + std::to_string(size) + " bytes");
    a.host[i] = x.warp->local.data() + i * size + a.address[i];
  }
}

void resolve_param(Exec& x, Access& a) {
  const LaunchSettings& s = *x.launch.settings;
  for (int i = 0; i < kLanes; ++i) {
    if (!on(a.mask, i)) continue;
    if (a.touch != Touch::kRead || !within(a.address[i], a.bytes, s.param_bytes))
      throw Fault(FaultKind::kOutOfBounds, i, "parameter address " + hex(a.address[i]));
    a.host[i] = const_cast<uint8_t*>(s.params) + a.address[i];
  }
}

// Generic addresses: each lane goes to the space of its window.
void resolve_generic(Exec& x, Access& a) {
  const std::pair<uint64_t, Space> windows[] = {
      {kSharedWindow, kShared}, {kLocalWindow, kLocal}, {kParamWindow, kParam}};
  Mask rest = a.mask;
  for (const auto& [window, space] : windows) {
    Access part = a;
    part.mask = 0;
    for (int i = 0; i < kLanes; ++i)
      if (on(rest, i) && (a.address[i] & kWindowMask) == window) part.mask |= Mask{1} << i;
    if (!part.mask) continue;
    rest &= ~part.mask;
    part.space = space;
    for (int i = 0; i < kLanes; ++i) part.address[i] &= ~kWindowMask;
    resolve(x, part);
    for (int i = 0; i < kLanes; ++i)
      if (on(part.mask, i)) a.host[i] = part.host[i];
  }
  if (!rest) return;
  Access part = a;
  part.mask = rest;
  part.space = kGlobal;
  resolve(x, part);
  for (int i = 0; i < kLanes; ++i)
    if (on(rest, i)) a.host[i] = part.host[i];
}

}  // namespace

uint8_t* GlobalMemory::find(uint64_t address, uint64_t bytes, int lane) {
  const Buffer* nearest = nullptr;
  for (const Buffer& b : buffers_) {
    if (within(address - b.base, bytes, b.size)) {
      last_ = &b;
      return b.host + (address - b.base);
    }
    if (address >= b.base && (!nearest || b.base > nearest->base)) nearest = &b;
  }
  std::string text = "global address " + hex(address);
  if (!nearest && !buffers_.empty()) nearest = &buffers_.front();
  if (nearest) {
    const int64_t offset = static_cast<int64_t>(address - nearest->base);
    text += ": " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of buffer '" +
            nearest->name + "' of " + std::to_string(nearest->size) + " bytes";
  }
  throw Fault(FaultKind::kOutOfBounds, lane, text);
}

void SharedMemory::out_of_bounds(uint64_t address, uint64_t bytes, int lane) const {
  throw Fault(FaultKind::kOutOfBounds, lane,
              "shared address " + hex(address) + ": " + std::to_string(bytes) + " bytes at offset " +
                  std::to_string(static_cast<int64_t>(address - kSharedBase)) + " of " + std::to_string(data_.size()) +
                  " bytes");
}

void addresses(Exec& x, Access& a, int32_t row, bool wide, int64_t offset) {
  if (wide) {
    const uint64_t* r = x.in<uint64_t>(row);
    for (int i = 0; i < kLanes; ++i) a.address[i] = r[i] + static_cast<uint64_t>(offset);
  } else {
    const uint32_t* r = x.in<uint32_t>(row);
    for (int i = 0; i < kLanes; ++i) a.address[i] = static_cast<uint32_t>(r[i] + static_cast<uint64_t>(offset));
  }
}

void resolve(Exec& x, Access& a) {
  check_alignment(a);
  switch (a.space) {
    case kGeneric:
      return resolve_generic(x, a);
    case kGlobal:
      resolve_global(x, a);
      break;
    case kShared:
      resolve_shared(x, a);
      break;
    case kLocal:
      resolve_local(x, a);
      break;
    case kParam:
      resolve_param(x, a);
      break;
  }
  x.profile().bytes += int64_t{a.bytes} * std::popcount(a.mask);
  count_range(x, a, nullptr);
}

}  // namespace ptx
