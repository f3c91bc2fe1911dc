// Suffix automaton of a growing text: which places of it ended with its last tokens. No torch here.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace scrimp {

// States are the classes of substrings that end at the same places (Blumer et al. 1985); adding a token takes constant
// time on average. Each state keeps one place where its strings end, renewed whenever they come again.
class SuffixAutomaton {
 public:
  SuffixAutomaton() : states_(1) {}

  int64_t size() const { return size_; }

  void extend(int64_t token) {
    renew();
    const int64_t added = static_cast<int64_t>(states_.size());
    states_.push_back({.length = states_[last_].length + 1, .link = 0, .end = ++size_});
    int64_t at = last_;
    for (; at >= 0 && next(at, token) < 0; at = states_[at].link) connect(at, token, added);
    if (at >= 0) states_[added].link = link_target(at, token);
    last_ = added;
  }

  // Up to `count` pairs (equal tokens, where they ended before): the longest suffix first, every place once.
  std::vector<std::pair<int64_t, int64_t>> matches(int64_t count, int64_t shortest) const {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int64_t at = states_[last_].link; at > 0 && states_[at].length >= shortest; at = states_[at].link) {
      if (static_cast<int64_t>(found.size()) >= count) break;
      bool known = false;
      for (const auto& [length, end] : found) known |= end == states_[at].end;
      if (!known) found.push_back({states_[at].length, states_[at].end});
    }
    return found;
  }

 private:
  struct State {
    int64_t length = 0, link = -1, end = 0;
    std::vector<int64_t> tokens = {};  // of the edges, to copy them
  };

  static constexpr int kRenewed = 8;  // states whose place is renewed at a time

  // The strings of these states have just ended here.
  void renew() {
    int left = kRenewed;
    for (int64_t at = states_[last_].link; at > 0 && left--; at = states_[at].link) states_[at].end = size_;
  }

  int64_t next(int64_t state, int64_t token) const {
    const auto edge = edges_.find(key(state, token));
    return edge == edges_.end() ? -1 : edge->second;
  }

  void connect(int64_t state, int64_t token, int64_t target) {
    if (edges_.insert_or_assign(key(state, token), target).second) states_[state].tokens.push_back(token);
  }

  // The state of the string that reaches over the edge of `at`: split off where longer ones shared it.
  int64_t link_target(int64_t at, int64_t token) {
    const int64_t target = next(at, token), length = states_[at].length + 1;
    if (states_[target].length == length) return target;
    const int64_t copy = static_cast<int64_t>(states_.size());
    states_.push_back({.length = length, .link = states_[target].link, .end = states_[target].end});
    for (const int64_t each : std::vector<int64_t>(states_[target].tokens)) connect(copy, each, next(target, each));
    for (; at >= 0 && next(at, token) == target; at = states_[at].link) connect(at, token, copy);
    states_[target].link = copy;
    return copy;
  }

  static uint64_t key(int64_t state, int64_t token) { return static_cast<uint64_t>(state) << 32 | token; }

  std::vector<State> states_;
  std::unordered_map<uint64_t, int64_t> edges_;
  int64_t last_ = 0, size_ = 0;
};

}  // namespace scrimp
