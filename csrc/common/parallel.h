// Work sharing over torch's own threads: respects torch.set_num_threads and brings no second runtime.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "common/team.h"

namespace scrimp {

// Threads that a loop over `items` may use: the worker argument of for_each_item is below this number.
inline int64_t worker_count(int64_t items) {
  return std::min<int64_t>(items, Team::mine ? Team::mine->size() : torch::stable::get_num_threads());
}

// The same for items that together take `operations`: a thread is worth waking for some ten microseconds of work, and
// one that is awake for one.
inline int64_t worker_count(int64_t items, int64_t operations) {
  return std::min(worker_count(items), operations / (Team::mine ? 50000 : 500000) + 1);
}

// Calls work(item, worker) for every item of [0, items). Items are handed out in order, one at a time, so
// that which thread gets an item depends on timing: the result must not. `work` must not throw.
template <class Work>
void for_each_item(int64_t items, int64_t workers, const Work& work) {
  if (workers <= 1) {
    for (int64_t item = 0; item < items; ++item) work(item, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto share = [&](int64_t worker) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item, worker);
  };
  if (Team::mine) return Team::mine->share(workers, share);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) share(worker);
  });
}

template <class Work>
void for_each_item(int64_t items, const Work& work) {
  for_each_item(items, worker_count(items), work);
}

}  // namespace scrimp
