// Memories: named, bounds-checked global buffers and poisoned shared memory.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// Windows of the generic address space; shared and local addresses are offsets into theirs.
constexpr uint64_t kWindowMask = ~uint64_t{0xFFFFFFFF};
constexpr uint64_t kSharedWindow = 0x7E0000000000;
constexpr uint64_t kLocalWindow = 0x7D0000000000;
constexpr uint64_t kParamWindow = 0x7C0000000000;
// The first addresses of shared memory are never valid, so that a lost base is seen.
constexpr uint64_t kSharedBase = 1024;
constexpr uint8_t kPoison = 0xFF;  // NaN in every float format

// Mirrors decode.py.
enum Space : int64_t { kGeneric = 0, kGlobal = 1, kShared = 2, kLocal = 3, kParam = 4 };
enum class Touch { kRead, kWrite, kAtomic };

// Whether [offset, offset + bytes) lies in [0, size); a negative offset arrives as a huge one.
inline bool within(uint64_t offset, uint64_t bytes, uint64_t size) { return bytes <= size && offset <= size - bytes; }

struct Buffer {
  uint64_t base, size;
  uint8_t* host;
  std::string name;
};

class GlobalMemory {
 public:
  void add(const Buffer& buffer) { buffers_.push_back(buffer); }
  // The host pointer of [address, address + bytes) or a fault that says where it points.
  uint8_t* at(uint64_t address, uint64_t bytes, int lane) {
    if (last_ && within(address - last_->base, bytes, last_->size)) return last_->host + (address - last_->base);
    return find(address, bytes, lane);
  }

 private:
  uint8_t* find(uint64_t address, uint64_t bytes, int lane);
  std::vector<Buffer> buffers_;
  const Buffer* last_ = nullptr;
};

class SharedMemory {
 public:
  void resize(uint64_t bytes) { data_.assign(bytes, kPoison); }
  void poison() { std::fill(data_.begin(), data_.end(), kPoison); }
  uint64_t size() const { return data_.size(); }
  uint8_t* at(uint64_t address, uint64_t bytes, int lane) {
    const uint64_t offset = address - kSharedBase;
    if (!within(offset, bytes, data_.size())) out_of_bounds(address, bytes, lane);
    return data_.data() + offset;
  }

 private:
  [[noreturn]] void out_of_bounds(uint64_t address, uint64_t bytes, int lane) const;
  std::vector<uint8_t> data_;
};

// One access of a warp: addresses in, host pointers out, after every check and count.
struct Access {
  Space space;
  Touch touch;
  int bytes;
  Mask mask;
  uint64_t address[kLanes];
  uint8_t* host[kLanes];
  const uint8_t* data = nullptr;  // of a store: `bytes` bytes a lane
};
void resolve(Exec& x, Access& a);
// Addresses of an operand: row (64 or 32 bits wide) plus offset.
void addresses(Exec& x, Access& a, int32_t row, bool wide, int64_t offset);

// Counters (counters.cpp).
void count_sectors(Exec& x, const Access& a, const uint8_t* bytes_per_lane);
void count_banks(Exec& x, const Access& a);
void count_range(Exec& x, const Access& a, const uint8_t* bytes_per_lane);

}  // namespace ptx
