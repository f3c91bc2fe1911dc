// tree_accept, the loops: argmax of logits / temperature + noise.
#include "cpu/tree_accept.h"

#include <math.h>

#include "common/gumbel.h"
#include "common/simd.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// The scores of kLanes (or the last n) tokens from i on; what is beyond the last is -inf.
template <class T>
SCRIMP_INLINE Vec scores(const T* x, int64_t i, int64_t count, bool divide, Vec temperature) {
  const bool whole = i + kLanes <= count;
  const Vec logits = whole ? load(x + i) : load_first(x + i, count - i);
  const Vec score = divide ? logits / temperature : logits;
  return whole ? score : lane_index() < broadcast(static_cast<float>(count - i)) ? score : broadcast(-INFINITY);
}

// A number that the noise does not exceed: g <= -log(1 - u), as -log u >= 1 - u; so bits of 1 - u tell it.
double noise_bound(uint64_t bits) {
  const uint64_t rest = (uint64_t{1} << 52) - 1 - bits;
  return kLn2 * (rest ? __builtin_clzll(rest) - 11 : 53) + 1e-9;
}

template <class T>
int64_t first_of(const T* x, int64_t count, bool divide, Vec temperature, float value) {
  for (int64_t i = 0;; i += kLanes) {
    const Vec score = scores(x, i, count, divide, temperature);
    for (int lane = 0; lane < kLanes; ++lane)
      if (score[lane] == value) return i + lane;
  }
}

template <class T>
int64_t choose(const TokenChoice& choice) {
  const T* x = static_cast<const T*>(choice.logits);
  const bool divide = choice.temperature > 0;
  const Vec temperature = broadcast(choice.temperature);
  Vec high = broadcast(-INFINITY);
  IntVec nan{};
  for (int64_t i = 0; i < choice.count; i += kLanes) {
    const Vec score = scores(x, i, choice.count, divide, temperature);
    nan |= score != score;
    high = score > high ? score : high;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (nan[lane]) return -1;
  const float best = highest_lane(high);
  if (best == -INFINITY) return -1;
  int64_t token = first_of(x, choice.count, divide, temperature, best);
  if (!divide || best == INFINITY) return token;

  double drawn = best + gumbel(noise_bits(choice.key, token));
  for (int64_t i = 0; i < choice.count; i += kLanes) {
    const Vec score = scores(x, i, choice.count, divide, temperature);
    for (int64_t lane = 0; lane < kLanes && i + lane < choice.count; ++lane) {
      const double own = score[lane];
      const uint64_t hashed = noise_bits(choice.key, i + lane);
      if (own + noise_bound(hashed) < drawn) continue;
      const double value = own + gumbel(hashed);
      if (value > drawn || (value == drawn && i + lane < token)) {
        drawn = value;
        token = i + lane;
      }
    }
  }
  return token;
}

}  // namespace

int64_t choose_token(const TokenChoice& choice) {
  return choice.bf16 ? choose<BFloat16>(choice) : choose<float>(choice);
}

}  // namespace scrimp::SCRIMP_ISA
