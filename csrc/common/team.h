// Threads that stay awake from loop to loop, for a call that is made of many loops of microseconds each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

namespace scrimp {

// One parallel region: its first thread leads, the others wait for work of it, spinning. The leader waits for those
// that have taken some and for nobody else, so a thread that the system has put aside delays nothing.
class Team {
 public:
  // Calls lead() on this thread; its loops are shared among torch's threads.
  template <class Lead>
  static void run(const Lead& lead) {
    const int64_t size = torch::stable::get_num_threads();
    if (size <= 1 || mine) return lead();
    Team team(size);
    std::exception_ptr error;
    torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.follow(begin);
      mine = &team;
      try {
        lead();
      } catch (...) {
        error = std::current_exception();
      }
      mine = nullptr;
      team.state_.store(kEnded, std::memory_order_release);
    });
    if (error) std::rethrow_exception(error);
  }

  // The team that this thread leads.
  static inline thread_local Team* mine = nullptr;

  int64_t size() const { return size_; }

  // Calls work(worker) on this thread, as worker 0, and on those below `workers` that come while it goes on.
  template <class Work>
  void share(int64_t workers, const Work& work) {
    work_ = &work;
    call_ = [](const void* any, int64_t worker) { (*static_cast<const Work*>(any))(worker); };
    workers_ = workers;
    // Nobody is inside: the last loop waited for all.
    const uint64_t open = (state_.load(std::memory_order_relaxed) / kRound + 1) * kRound + kOpen;
    state_.store(open, std::memory_order_release);
    work(0);
    for (uint64_t state = state_.fetch_and(~kOpen, std::memory_order_acquire); state % kOpen != 0;) {
      rest();
      state = state_.load(std::memory_order_acquire);
    }
  }

 private:
  // state_: the number of threads inside, whether others may enter, and the number of the loop.
  static constexpr uint64_t kOpen = uint64_t{1} << 16, kRound = uint64_t{1} << 17, kEnded = ~uint64_t{0};

  explicit Team(int64_t size) : size_(size) {}

  void follow(int64_t worker) {
    uint64_t done = 0;
    for (int64_t spins = 1;; ++spins) {
      uint64_t state = state_.load(std::memory_order_acquire);
      if (state == kEnded) return;
      if (state / kRound == done || !(state & kOpen) ||
          !state_.compare_exchange_strong(state, state + 1, std::memory_order_acquire)) {
        spins % kPatience == 0 ? std::this_thread::yield() : rest();
        continue;
      }
      if (worker < workers_) call_(work_, worker);
      done = state / kRound;
      state_.fetch_sub(1, std::memory_order_release);
      spins = 0;
    }
  }

  static void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static constexpr int64_t kPatience = 1 << 14;  // spins before another process may have the core

  const int64_t size_;
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int64_t workers_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
};

}  // namespace scrimp
