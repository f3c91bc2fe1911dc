// Working memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace scrimp {

// Cuts one allocation into arrays, each on a cache line of its own. A small one lies on the stack.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t at = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  void allocate() {
    if (size_ <= kSmall) return;
    large_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
    if (!large_) throw std::bad_alloc();
    data_ = large_.get();
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  static constexpr int64_t kSmall = 32768;

  int64_t size_ = 64;
  std::unique_ptr<char, void (*)(void*)> large_{nullptr, std::free};
  alignas(64) char small_[kSmall];
  char* data_ = small_;
};

}  // namespace scrimp
