// vq_sample, the loops: argmax of logits / temperature + noise over the tokens that filters keep.
//
// Logits are looked up again in every pass and never stored. A token can only win if the complement of its uniform
// number, 1 - u, is at most exp(score - best so far): -log(-log u) >= t means 1 - u <= 1 - exp(-exp(-t)) <= exp(-t).
// Where a token has the score of its code, these exponentials are a table over the codes, so that a token costs a hash,
// a gather and a comparison, many tokens at a time; few are left to be looked at precisely.
#include "cpu/vq_sample.h"

#include <math.h>

#include "common/gumbel.h"
#include "common/vq_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int64_t kBlock = 32 * kLanes;  // tokens after which candidates are looked at
constexpr int64_t kAhead = 1024;         // tokens whose codes are prefetched
constexpr int kHalf = kLanes / 2;
constexpr float kSlack = 1.0001f;  // more than the rounding of a candidate's test
constexpr float kLeastNoise = 4;   // more than -log(-log u) of the smallest u, 2^-53, is below 0

typedef uint64_t KeyVec __attribute__((vector_size(4 * kLanes)));

SCRIMP_INLINE bool any_lane(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= mask[i];
  return any != 0;
#endif
}

// Logits as the op vq_logits gives them, divided by the temperature.
template <class T>
struct Scores {
  TokenLogits<T> logits;
  float temperature;

  SCRIMP_INLINE Vec scaled(Vec logit) const {
    const Vec rounded = round_to<T>(logit);
    return temperature > 0 ? rounded / broadcast(temperature) : rounded;
  }

  float one(int64_t v) const { return scaled(broadcast(logits.one(v)))[0]; }

  float of_code(int64_t code) const { return scaled(load_first(logits.scores + code, 1))[0]; }

  // Of codes k, k + 1, ...; -inf behind the last of `count`.
  SCRIMP_INLINE Vec codes(int64_t k, int64_t count) const {
    if (k + kLanes <= count) return scaled(load(logits.scores + k));
    Vec some = broadcast(-INFINITY);
    for (int i = 0; k + i < count; ++i) some[i] = of_code(k + i);
    return some;
  }

  // Of tokens v, v + 1, ...; -inf behind the last one.
  SCRIMP_INLINE Vec lanes(int64_t v) const {
    if (v + kLanes <= logits.tokens) return scaled(logits.lanes(v));
    Vec some = broadcast(-INFINITY);
    for (int i = 0; v + i < logits.tokens; ++i) some[i] = one(v + i);
    return some;
  }
};

// ---- filters: kept are scores above `low`, and those at `low` of tokens up to `last` ----

struct Cut {
  float low = -INFINITY;
  int64_t last = INT64_MAX;

  bool keeps(float score, int64_t token) const { return score > low || (score == low && token <= last); }
};

// Numbers in the order of floats; both zeros are one.
uint32_t rank(float x) {
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

float score_of(uint32_t rank) {
  const uint32_t bits = rank >> 31 ? rank & 0x7fffffffu : ~rank;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The highest score such that all from it on weigh at least wanted(weight of all); `above` is what is above it.
template <class Visit, class Weigh, class Wanted>
float lowest_kept(const Visit& visit, const Weigh& weigh, const Wanted& wanted, double& above) {
  uint32_t low = 0, known = 0;  // of the rank of the result: its bits, and which of them are known
  double target = -1;
  above = 0;
  constexpr int kShifts[] = {21, 10, 0};  // 11 bits at a time
  for (const int shift : kShifts) {
    double bins[2048] = {};
    visit([&](float score, int64_t count) {
      const uint32_t place = rank(score);
      if ((place & known) == low) bins[place >> shift & 2047] += weigh(score, count);
    });
    if (target < 0) {
      double all = 0;
      for (const double bin : bins) all += bin;
      target = wanted(all);
    }
    uint32_t bin = 2047;
    while (bin > 0 && above + bins[bin] < target) above += bins[bin--];
    low |= bin << shift;
    known = ~uint32_t{0} << shift;
  }
  return low < rank(-INFINITY) ? -INFINITY : score_of(low);
}

template <class T>
Cut find_cut(const VqRow& row, const Scores<T>& scores, float best) {
  Cut cut;
  // Tokens of a code without bias have one score, so that codes and their counts say everything.
  const auto visit = [&](const auto& body) {
    if (row.counts) {
      for (int64_t k = 0; k < row.codebook; ++k)
        if (row.counts[k]) body(scores.of_code(k), row.counts[k]);
    } else {
      for (int64_t v = 0; v < row.tokens; ++v) body(scores.one(v), 1);
    }
  };
  double above;
  if (0 < row.top_k && row.top_k < row.tokens) {
    const auto one_each = [](float, int64_t count) { return static_cast<double>(count); };
    cut.low = lowest_kept(visit, one_each, [&](double) { return static_cast<double>(row.top_k); }, above);
  }
  if (row.top_p < 1) {
    const auto mass = [&](float score) { return exp(static_cast<double>(score) - static_cast<double>(best)); };
    const auto weigh = [&, low = cut.low](float score, int64_t count) {
      return score >= low ? mass(score) * static_cast<double>(count) : 0;
    };
    double target = 0;
    const auto wanted = [&](double all) { return target = row.top_p * all; };
    cut.low = lowest_kept(visit, weigh, wanted, above);
    double missing = target - above;
    for (int64_t v = 0; v < row.tokens && missing > 0; v += kLanes) {
      const IntVec equal = scores.lanes(v) == broadcast(cut.low);
      for (int64_t i = 0; any_lane(equal) && i < kLanes && missing > 0; ++i) {
        if (!equal[i]) continue;
        missing -= mass(cut.low);
        cut.last = v + i;
      }
    }
  }
  const float low = best + row.log_min_p;
  return low > cut.low ? Cut{low} : cut;
}

// ---- the draw ----

// Numbers of 31 bits for tokens first, first + 1, ..., kLanes at each call: 1 - u in units of 2^-31, rounded down.
class Complements {
 public:
  Complements(uint64_t key, int64_t first) {
    for (int i = 0; i < kHalf; ++i) low_[i] = key + static_cast<uint64_t>(first + 1 + i) * kGamma;
    high_ = low_ + kHalf * kGamma;
  }

  SCRIMP_INLINE Vec next() {
    const BitsVec a = (BitsVec)mixed(low_), b = (BitsVec)mixed(high_);
    low_ += kLanes * kGamma;
    high_ += kLanes * kGamma;
#if defined(__AVX512F__)
    const BitsVec top = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
    const BitsVec top = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    const BitsVec top = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
    return __builtin_convertvector((IntVec)(~top >> 1), Vec);
  }

 private:
  // The hash but for its last step, which leaves the upper 31 bits as they are.
  SCRIMP_INLINE static KeyVec mixed(KeyVec value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    return (value ^ (value >> 27)) * 0x94D049BB133111EB;
  }

  KeyVec low_, high_;
};

// What the comparison of a complement's 31 bits with exp(score - bar) is multiplied with.
constexpr float kUnits = 0x1p31f * kSlack;

// The token of the largest score + noise among those kept; `token` is one of them.
template <class T>
int64_t draw(const VqRow& row, const Scores<T>& scores, const Cut& cut, int64_t token) {
  const auto drawn_by = [&](int64_t v) { return static_cast<double>(scores.one(v)) + gumbel(noise_bits(row.key, v)); };
  double drawn = drawn_by(token);
  int32_t may_win[kBlock];
  Complements complements(row.key, 0);
  for (int64_t first = 0; first < row.tokens; first += kBlock) {
    const int64_t last = first + kBlock < row.tokens ? first + kBlock : row.tokens;
    const Vec bar = broadcast(nextafterf(static_cast<float>(drawn), -INFINITY));
    IntVec some{};
    for (int64_t v = first; v < last; v += kLanes) {
      const Vec weight = exp2((scores.lanes(v) - bar) * kLog2E) * kUnits;
      const IntVec candidates = complements.next() <= weight;
      memcpy(may_win + (v - first), &candidates, sizeof candidates);
      some |= candidates;
    }
    for (int64_t v = first; any_lane(some) && v < last; ++v) {
      if (!may_win[v - first] || !cut.keeps(scores.one(v), v)) continue;
      const double value = drawn_by(v);
      if (value > drawn || (value == drawn && v < token)) {
        drawn = value;
        token = v;
      }
    }
  }
  return token;
}

// The first token of the largest score of all, -1 where there is NaN or nothing above -inf.
template <class T>
int64_t first_of_best(const VqRow& row, const Scores<T>& scores) {
  Vec high = broadcast(-INFINITY);
  IntVec nan{};
  for (int64_t v = 0; v < row.tokens; v += kLanes) {
    const Vec score = scores.lanes(v);
    nan |= score != score;
    high = max(score, high);
  }
  for (int i = 0; i < kLanes; ++i)
    if (nan[i]) return -1;
  const float best = highest_lane(high);
  if (best == -INFINITY) return -1;
  int64_t token = 0;
  while (scores.one(token) != best) ++token;
  return token;
}

template <class T>
Scores<T> scores_of(const VqRow& row) {
  return {{static_cast<const T*>(row.scores), row.codes, static_cast<const T*>(row.bias), row.levels, row.tokens},
          row.temperature};
}

template <class T>
int64_t sample(const VqRow& row) {
  const Scores<T> scores = scores_of<T>(row);
  const int64_t token = first_of_best(row, scores);
  if (token < 0 || row.temperature == 0) return token;
  const float best = scores.one(token);
  return best == INFINITY ? token : draw(row, scores, find_cut(row, scores, best), token);
}

// ---- tokens that have the score of their code ----

template <class T>
bool start(const VqRow& row, VqChoice& choice) {
  const Scores<T> scores = scores_of<T>(row);
  Vec high = broadcast(-INFINITY);
  IntVec nan{};
  for (int64_t k = 0; k < row.codebook; k += kLanes) {
    Vec score = scores.codes(k, row.codebook);
    for (int i = 0; row.counts && i < kLanes; ++i)
      if (k + i < row.codebook && !row.counts[k + i]) score[i] = -INFINITY;
    nan |= score != score;
    high = max(score, high);
  }
  const float best = highest_lane(high);
  if (any_lane(nan) || !(__builtin_fabsf(best) < INFINITY)) return false;
  const Cut cut = row.temperature > 0 ? find_cut(row, scores, best) : Cut{best};
  choice.low = cut.low;
  choice.last = cut.last;
  choice.bar = row.temperature > 0 ? best - kLeastNoise : 0;
  for (int64_t k = 0; k < row.codebook; k += kLanes) {
    const Vec score = scores.codes(k, row.codebook);
    const Vec weight = exp2((score - broadcast(choice.bar)) * kLog2E);
    store_first(choice.weights + k, score >= cut.low ? weight : broadcast(-1.0f), row.codebook - k);
  }
  return true;
}

// The codes of tokens v, v + 1, ..., those of the last token behind it; one outside the codebook becomes the last one
// and sets `outside`.
SCRIMP_INLINE BitsVec codes_of(const VqRow& row, int64_t v, IntVec& outside) {
  BitsVec code;
  if (v + kLanes <= row.tokens) {
    memcpy(&code, row.codes + v, sizeof code);
  } else {
    for (int i = 0; i < kLanes; ++i)
      code[i] = static_cast<uint32_t>(row.codes[v + i < row.tokens ? v + i : row.tokens - 1]);
  }
  const BitsVec most = BitsVec{} + static_cast<uint32_t>(row.codebook - 1);
  outside |= code > most;
  return code < most ? code : most;
}

// Adds tokens [first, last) to the best so far; false where a code is outside the codebook.
template <class T>
bool add_tokens(const VqRow& row, const VqChoice& choice, int64_t first, int64_t last, VqBest& best) {
  const Scores<T> scores = scores_of<T>(row);
  const Cut cut{choice.low, choice.last};
  const bool greedy = row.temperature == 0;
  int32_t may_win[kBlock];
  Complements complements(row.key, first);
  for (; first < last; first += kBlock) {
    const int64_t end = first + kBlock < last ? first + kBlock : last;
    const auto ahead = static_cast<float>(static_cast<double>(choice.bar) - best.value);
    const Vec units = exp2(broadcast(ahead * kLog2E)) * kUnits;
    IntVec some{}, outside{};
    for (int64_t v = first; v < end; v += kLanes) {
      __builtin_prefetch(row.codes + v + kAhead);
      const BitsVec code = codes_of(row, v, outside);
      if (greedy && best.token < v) continue;
      int32_t index[kLanes];
      memcpy(index, &code, sizeof code);
      const Vec weight = gather(static_cast<const float*>(choice.weights), index);
      const IntVec candidates = greedy ? weight > 0.0f : complements.next() <= weight * units;
      memcpy(may_win + (v - first), &candidates, sizeof candidates);
      some |= candidates;
    }
    if (any_lane(outside)) return false;
    for (int64_t v = first; any_lane(some) && v < end; ++v) {
      if (!may_win[v - first] || !cut.keeps(scores.one(v), v)) continue;
      const double value = greedy ? 0 : static_cast<double>(scores.one(v)) + gumbel(noise_bits(row.key, v));
      if (value > best.value || (value == best.value && v < best.token)) best = {value, v};
    }
  }
  return true;
}

}  // namespace

int64_t vq_sample(const VqRow& row) { return row.bf16 ? sample<BFloat16>(row) : sample<float>(row); }

bool vq_sample_start(const VqRow& row, VqChoice& choice) {
  return row.bf16 ? start<BFloat16>(row, choice) : start<float>(row, choice);
}

bool vq_sample_add(const VqRow& row, const VqChoice& choice, int64_t first, int64_t last, VqBest& best) {
  return row.bf16 ? add_tokens<BFloat16>(row, choice, first, last, best)
                  : add_tokens<float>(row, choice, first, last, best);
}

}  // namespace scrimp::SCRIMP_ISA
