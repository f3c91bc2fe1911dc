// What a hardware profiler would count about memory, per instruction.
#include <bit>

#include "state.h"

namespace ptx {

// Distinct 32-byte sectors of one warp access and the distinct bytes asked of them. An aligned
// access of at most 32 bytes lies in one sector.
void count_sectors(Exec& x, const Access& a, const uint8_t* bytes_per_lane) {
  uint64_t sector[kLanes];
  uint32_t asked[kLanes];
  int count = 0, last = 0;
  for (int i = 0; i < kLanes; ++i) {
    const int bytes = bytes_per_lane ? bytes_per_lane[i] : a.bytes;
    if (!on(a.mask, i) || bytes == 0) continue;
    const uint64_t key = a.address[i] >> 5;
    const uint32_t bits = (bytes >= 32 ? ~0u : ((1u << bytes) - 1)) << (a.address[i] & 31);
    if (count && sector[last] == key) {
      asked[last] |= bits;
      continue;
    }
    for (last = 0; last < count && sector[last] != key; ++last) {
    }
    if (last == count) {
      sector[count] = key;
      asked[count++] = 0;
    }
    asked[last] |= bits;
  }
  Profile& p = x.profile();
  p.sectors += count;
  for (int i = 0; i < count; ++i) p.useful += std::popcount(asked[i]);
}

// Passes of one shared access: 128 bytes at a time, so 8-byte accesses go by half warps and
// 16-byte accesses by quarter warps; in each pass a bank serves one 4-byte word.
void count_banks(Exec& x, const Access& a) {
  const int words = a.bytes <= 4 ? 1 : a.bytes / 4;
  const int lanes = kLanes / words;
  int64_t taken = 0, ideal = 0;
  for (int first = 0; first < kLanes; first += lanes) {
    uint64_t held[kLanes];  // the words of this pass, and how deep their banks are
    uint8_t depth[kLanes] = {};
    int count = 0, worst = 0;
    uint32_t banks = 0;
    for (int i = first; i < first + lanes; ++i) {
      if (!on(a.mask, i)) continue;
      for (int w = 0; w < words; ++w) {
        const uint64_t word = (a.address[i] >> 2) + w;
        const uint32_t bank = static_cast<uint32_t>(word & 31), bit = uint32_t{1} << bank;
        bool seen = false;
        if (banks & bit)  // usually free: only then look for the same word
          for (int k = 0; k < count && !seen; ++k) seen = held[k] == word;
        if (seen) continue;
        banks |= bit;
        held[count++] = word;
        worst = ++depth[bank] > worst ? depth[bank] : worst;
      }
    }
    taken += worst;
    ideal += worst > 0;
  }
  Profile& p = x.profile();
  p.wavefronts += taken;
  p.ideal += ideal;
  p.conflicted += taken > ideal;
}

void count_range(Exec& x, const Access& a, const uint8_t* bytes_per_lane) {
  Profile& p = x.profile();
  for (int i = 0; i < kLanes; ++i) {
    const int bytes = bytes_per_lane ? bytes_per_lane[i] : a.bytes;
    if (!on(a.mask, i) || bytes == 0) continue;
    const int64_t address = static_cast<int64_t>(a.address[i]);
    p.low = address < p.low ? address : p.low;
    p.high = address + bytes > p.high ? address + bytes : p.high;
  }
}

}  // namespace ptx
