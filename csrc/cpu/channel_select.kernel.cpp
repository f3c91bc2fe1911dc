// channel_select, the loops: score, cut, keep, list. A row's sums have a fixed order of their own.
#include "cpu/channel_select.h"

#include "common/simd.h"
#include "common/with_type.h"

namespace scrimp::SCRIMP_ISA {
namespace {

constexpr int kBins = 2048;  // of the first digit of a score's bits: sign 0, exponent, two bits of the mantissa
constexpr int kChains = 16;  // of a sum, so that it is short

typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

SCRIMP_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SCRIMP_INLINE Vec absolute(Vec x) { return (Vec)((BitsVec)x & 0x7fffffff); }

// Many short sums instead of a long one, which would be less exact.
SCRIMP_INLINE float sum_chains(Vec (&sum)[kChains]) {
  for (int chains = kChains / 2; chains; chains /= 2) {
    for (int c = 0; c < chains; ++c) sum[c] += sum[c + chains];
  }
  return sum_lanes(sum[0]);
}

// x - center of channels [i, i + n), zeros behind them
template <class T>
SCRIMP_INLINE Vec moved(const SelectRow& row, const T* input, int64_t i, int64_t n) {
  const Vec x = load_first(input + i, n);
  return row.center ? x - load_first(row.center + i, n) : x;
}

template <class T>
void score(const SelectRow& row, const T* input) {
  for (int64_t i = 0; i < row.channels; i += kLanes) {
    const int64_t n = row.channels - i;
    const Vec x = moved(row, input, i, n);
    store_first(row.score + i, absolute(row.scale ? x * load_first(row.scale + i, n) : x), n);
  }
}

template <class T>
void keep(const SelectRow& row, const T* input, SelectCut cut) {
  const Vec level = broadcast(cut.score);
  Vec dropped[kChains] = {}, all[kChains] = {};
  IntVec channel;
  for (int lane = 0; lane < kLanes; ++lane) channel[lane] = lane;
  for (int64_t i = 0; i < row.channels; i += kLanes, channel += kLanes) {
    const int64_t n = row.channels - i;
    const int chain = i / kLanes % kChains;
    const Vec score = load_first(row.score + i, n), judged = load_first(row.judged + i, n);
    const IntVec tied = (judged == level) & (channel <= cut.last);
    const IntVec chosen = ~(judged <= level) | tied;
    store_first(static_cast<T*>(row.kept) + i, chosen ? moved(row, input, i, n) : Vec{}, n);
    const Vec lost = chosen ? Vec{} : score;  // squared as it is: 0 times an infinite score would be NaN
    dropped[chain] = fma(lost, lost, dropped[chain]);
    all[chain] = fma(score, score, all[chain]);
    const ByteVec bytes = __builtin_convertvector(chosen, ByteVec);
    memcpy(row.mask + i, &bytes, n < kLanes ? n : kLanes);
  }
  row.energy[0] = sum_chains(dropped);
  row.energy[1] = sum_chains(all);
}

float mean(const float* score, int64_t channels) {
  Vec sum[kChains] = {};
  for (int64_t i = 0; i < channels; i += kLanes) sum[i / kLanes % kChains] += load_first(score + i, channels - i);
  return sum_chains(sum) / static_cast<float>(channels);
}

// The cut at which the weights of the kept scores, the largest first, reach `target`: digit by digit of the bits, which
// order scores as their values do, NaN highest.
template <class Sum, class Weight>
SelectCut reach(const float* score, int64_t channels, Sum target, Weight weight) {
  Sum above = 0;
  uint32_t found = 0;
  for (int shift = 20; shift >= 0; shift -= 10) {
    const int width = shift == 20 ? 11 : 10;
    Sum bins[kBins] = {};
    int lowest = kBins - 1, bin = 0;
    for (int64_t i = 0; i < channels; ++i) {
      const uint32_t bits = bits_of(score[i]);
      if (bits >> (shift + width) != found) continue;
      const int at = bits >> shift & ((1 << width) - 1);
      bins[at] += weight(score[i]);
      lowest = at < lowest ? at : lowest;
      bin = at > bin ? at : bin;
    }
    for (; bin > lowest && above + bins[bin] < target; --bin) above += bins[bin];
    found = found << width | bin;
  }
  SelectCut cut{0.0f, -1};
  memcpy(&cut.score, &found, sizeof found);
  if (cut.score != cut.score) return {__builtin_inff(), -1};  // those that are NaN, which are kept anyway, are enough
  for (int64_t i = 0; i < channels && above < target; ++i) {
    if (bits_of(score[i]) != found) continue;
    above += weight(score[i]);
    cut.last = static_cast<int32_t>(i);
  }
  return cut;
}

SelectCut top_k(const float* score, int64_t channels, float level) {
  if (level >= static_cast<float>(channels)) return kSelectAll;
  if (!(level > 0)) return {__builtin_inff(), -1};
  return reach(score, channels, static_cast<int64_t>(__builtin_ceilf(level)), [](float) { return int64_t{1}; });
}

SelectCut top_p(const float* score, int64_t channels, float level) {
  if (level >= 1) return {0.0f, -1};
  double total = 0;
  for (int64_t i = 0; i < channels; ++i) total += static_cast<double>(score[i]) * score[i];
  if (total != total) return kSelectAll;
  const double target = static_cast<double>(level) * total;
  if (!(target > 0)) return {__builtin_inff(), -1};
  return reach(score, channels, target, [](float x) { return static_cast<double>(x) * x; });
}

// Writes those of the channels [i, i + kLanes) whose mask is set; `to` has room for all of them. Returns their number.
SCRIMP_INLINE int32_t list_some(const int8_t* masks, int32_t i, int32_t* to) {
#if defined(__AVX512BW__)
  const __mmask16 kept = _mm_movepi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(masks + i)));
  const __m512i channel = _mm512_add_epi32(_mm512_set1_epi32(i), _mm512_cvtps_epi32((__m512)lane_index()));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, channel));
  return __builtin_popcount(kept);
#else
  int32_t count = 0;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    to[count] = i + lane;
    count -= masks[i + lane];
  }
  return count;
#endif
}

}  // namespace

void channel_select_score(const SelectRow& row) {
  with_type(row.type, row.x, [&](auto* input) { score(row, input); });
}

SelectCut channel_select_cut(const float* score, int64_t channels, SelectRule rule, float level) {
  if (rule == SelectRule::top_k) return top_k(score, channels, level);
  if (rule == SelectRule::top_p) return top_p(score, channels, level);
  if (rule == SelectRule::threshold) return {level, -1};
  const float cut = level * mean(score, channels);
  return {cut > __FLT_MAX__ ? __FLT_MAX__ : cut, -1};  // infinite scores are kept
}

void channel_select_mean(float* score, const float* scores, int64_t rows, int64_t channels) {
  const float count = static_cast<float>(rows);
  for (int64_t i = 0; i < channels; i += kLanes) {
    Vec sum{};
    for (int64_t m = 0; m < rows; ++m) {
      const Vec x = load_first(scores + m * channels + i, channels - i);
      sum = fma(x, x, sum);
    }
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = __builtin_sqrtf(sum[lane] / count);
    store_first(score + i, sum, channels - i);
  }
}

void channel_select_keep(const SelectRow& row, SelectCut cut) {
  with_type(row.type, row.x, [&](auto* input) { keep(row, input, cut); });
}

int32_t channel_select_list(int8_t* masks, int64_t rows, int64_t channels, int32_t* index) {
  for (int64_t m = 1; m < rows; ++m) {
    for (int64_t i = 0; i < channels; ++i) masks[i] |= masks[m * channels + i];
  }
  int32_t count = 0, i = 0;
  for (; i + kLanes <= channels; i += kLanes) count += list_some(masks, i, index + count);
  for (; i < channels; ++i) {
    index[count] = i;
    count -= masks[i];
  }
  for (i = count; i < channels; ++i) index[i] = -1;
  return count;
}

}  // namespace scrimp::SCRIMP_ISA
