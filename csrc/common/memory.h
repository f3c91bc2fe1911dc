// Working memory of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace scrimp {

// Cuts one allocation into arrays, each on a cache line of its own.
class Memory {
 public:
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t at = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  void allocate() {
    data_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
    if (!data_) throw std::bad_alloc();
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data_.get() + offset);
  }

 private:
  std::unique_ptr<char, void (*)(void*)> data_{nullptr, std::free};
  int64_t size_ = 64;
};

}  // namespace scrimp
