// vq_sample, the kernels: a block chooses among a chunk of a row's tokens, then a warp a row among the chunks; where
// tokens are filtered, passes over them find the thresholds before, eight bits of the scores' order at a time.
//
// What tokens weigh are integers (1, or shares of probability), added by integer atomics: no order changes a sum.
#pragma once

#include <cstdint>

#include "common/draw.cuh"
#include "common/vq_tokens.cuh"

namespace scrimp::cuda::vq_sample {

// A threshold so far: the upper digits of its rank, what tokens above them weigh, and what kept tokens shall weigh.
struct Cut {
  uint64_t above, wanted;
  uint32_t upper;
};

// The filters' thresholds: of top-k, of top-p behind it, or of one of them.
struct Filter {
  const uint64_t* weights = nullptr;        // [M, kDigits]: of the last digit found; null before the first
  const Cut* before = nullptr;              // [M]: the threshold without that digit; null before the first
  const Cut* floor = nullptr;               // [M]: the threshold of top-k in the passes of top-p, or null
  const uint64_t* chunk_weights = nullptr;  // [M, chunks, kDigits]: `weights` by chunk where equals count, or null
  uint64_t top_k = 0;
  double top_p = 1;
  float log_min_p = 0;
  int32_t unit = 0;  // bits of a share's fraction
  bool shares = false, active = false;
};

// A pass: what it finds of the threshold, and what the tokens of each value of the next digit weigh.
struct Pass {
  Cut* cut;
  uint64_t *weights, *chunk_weights;
  int32_t shift;  // of the next digit
};

struct Arguments {
  VqTokens tokens;
  const void* scores;              // [M, K]
  const float* temperature;        // [M]
  const int64_t *seed, *position;  // [M]
  Best* best;                      // [M, chunks]
  uint32_t* top;                   // [M]: the rank of the best score; null where no filter asks for it
  int64_t* token;                  // [M]
  uint32_t chunks;
};

constexpr int kThreads = 256, kWarps = kThreads / 32, kDigits = 256;
constexpr int kWidth = 4, kSteps = 4, kScores = kWidth * kSteps, kSpan = kThreads * kScores;  // of a thread, of a chunk

// In the order of the scores, NaN above all; both zeros are one.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const int32_t bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return score != score ? 0xFFFFFFFF : static_cast<uint32_t>(bits ^ (bits >> 31 & 0x7FFFFFFF)) ^ 0x80000000;
}

__device__ __forceinline__ float score_of(uint32_t rank) {
  const int32_t bits = static_cast<int32_t>(rank ^ 0x80000000);
  return __int_as_float(bits ^ (bits >> 31 & 0x7FFFFFFF));
}

// Whether noise and filters have a say: the temperature is a positive number, the best score a finite one.
__device__ __forceinline__ bool is_drawn(float temperature, float best) {
  return temperature > 0 && temperature < INFINITY && fabsf(best) < INFINITY;
}

// exp(score - best) with `unit` bits behind the point.
__device__ __forceinline__ uint64_t share_of(float score, float best, int unit) {
  return static_cast<uint64_t>(exp(static_cast<double>(score) - best) * static_cast<double>(uint64_t{1} << unit) + 0.5);
}

__device__ __forceinline__ int64_t token_of(int64_t first, int i) {
  return first + i / kWidth * (kThreads * kWidth) + i % kWidth;
}

// The thread's logits / temperature (the logits where it is 0), rounded as those of vq_logits are; -inf behind V.
template <class T, bool kWide>
__device__ __forceinline__ void load_scores(float (&score)[kScores], const Arguments& p, int64_t row, int64_t first,
                                            float temperature) {
  const T* scores = static_cast<const T*>(p.scores) + row * p.tokens.K;
  if constexpr (kWide) scores = copied<T, kThreads>(scores, static_cast<int>(p.tokens.K));
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t v = token_of(first, step * kWidth);
    float total[1][kWidth] = {};
    if constexpr (kWide) {
      if (v < p.tokens.V) add_scores(total, p.tokens, scores, 1, v);
    } else {
#pragma unroll 1
      for (int j = 0; j < kWidth && v + j < p.tokens.V; ++j) {
        float one[1][1] = {};
        add_scores(one, p.tokens, scores, 1, v + j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) total[0][i] = i == j ? one[0][0] : total[0][i];
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float logit = static_cast<float>(T(total[0][j]));
      const float scaled = temperature > 0 ? __fdiv_rn(logit, temperature) : logit;
      score[step * kWidth + j] = v + j < p.tokens.V ? scaled : -INFINITY;
    }
  }
}

// The threshold with the digit that the weights tell, for all threads of a block: the tokens above the digit weigh less
// than what is wanted, with those of the digit they weigh it.
__device__ __forceinline__ Cut next_cut(const Filter& f, int64_t row) {
  static_assert(kThreads == kDigits);
  __shared__ uint64_t of_warps[kWarps];
  __shared__ Cut found;
  const int digit = threadIdx.x, warp = digit / 32;
  const uint64_t own = f.weights[row * kDigits + digit];
  uint64_t from = own, all = 0;  // of the digits from the thread's own on, and of all
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_down_sync(kAll, from, distance);
    from += digit % 32 + distance < 32 ? other : 0;
  }
  if (digit % 32 == 0) of_warps[warp] = from;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    from += i > warp ? of_warps[i] : 0;
    all += of_warps[i];
  }
  Cut cut = {0, f.top_k, 0};
  if (f.before) {
    cut = f.before[row];
  } else if (f.shares) {
    const auto share = static_cast<uint64_t>(ceil(f.top_p * static_cast<double>(all)));
    cut.wanted = max(min(share, all), uint64_t{1});
  }
  const uint64_t above = cut.above + from - own;
  if (above < cut.wanted && above + own >= cut.wanted) found = {above, cut.wanted, cut.upper << 8 | digit};
  __syncthreads();
  return found;
}

// 64 bits by two atomics of 32; the upper half takes what the lower one carries.
__device__ __forceinline__ void add(uint32_t& low, uint32_t& high, uint64_t weight) {
  const auto lower = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(&low, lower), upper = static_cast<uint32_t>(weight >> 32);
  atomicAdd(&high, upper + (before + lower < lower));
}

// Launched with M x chunks blocks.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 4)
    vq_sample_weigh_kernel(const __grid_constant__ Arguments p, const __grid_constant__ Filter f,
                           const __grid_constant__ Pass pass) {
  __shared__ uint32_t low[kDigits], high[kDigits];
  const int64_t row = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const float temperature = p.temperature[row], best = score_of(p.top[row]);
  if (!is_drawn(temperature, best)) return;
  const int64_t first = chunk * kSpan + threadIdx.x * kWidth;
  float score[kScores];
  load_scores<T, kWide>(score, p, row, first, temperature);
  low[threadIdx.x] = high[threadIdx.x] = 0;
  Cut cut = {};
  if (f.weights) {
    cut = next_cut(f, row);
    if (chunk == 0 && threadIdx.x == 0) pass.cut[row] = cut;
  }
  __syncthreads();
  const bool first_pass = pass.shift + 8 == 32;
  const uint32_t upper = first_pass ? 0 : cut.upper, floor = !f.floor ? 0 : first_pass ? cut.upper : f.floor[row].upper;
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const uint32_t rank = rank_of(score[i]);
    if (token_of(first, i) >= p.tokens.V || rank < floor || static_cast<uint64_t>(rank) >> (pass.shift + 8) != upper)
      continue;
    const uint32_t digit = rank >> pass.shift & (kDigits - 1);
    add(low[digit], high[digit], f.shares ? share_of(score[i], best, f.unit) : 1);
  }
  __syncthreads();
  const uint64_t weight = static_cast<uint64_t>(high[threadIdx.x]) << 32 | low[threadIdx.x];
  if (weight) atomicAdd(reinterpret_cast<unsigned long long*>(pass.weights + row * kDigits + threadIdx.x), weight);
  if (pass.chunk_weights) pass.chunk_weights[(row * p.chunks + chunk) * kDigits + threadIdx.x] = weight;
}

// Of scores at the threshold `low`, only as many stay as it takes to weigh what is wanted, those of the lowest tokens.
__device__ __forceinline__ void drop_equals(float (&score)[kScores], const Filter& f, const Cut& cut, uint64_t each,
                                            const uint64_t* chunk_weights, int64_t chunk) {
  static_assert(kSteps * 16 == 64 && kThreads * kWidth < 1 << 16);
  __shared__ uint64_t of_warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t own = 0;  // equals of the thread, 16 bits a step
#pragma unroll
  for (int i = 0; i < kScores; ++i) own += static_cast<uint64_t>(rank_of(score[i]) == cut.upper) << (i / kWidth * 16);
  uint64_t upto = own, weight = 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(kAll, upto, distance);
    upto += lane >= distance ? other : 0;
  }
  if (lane == 31) of_warps[warp] = upto;
  for (int64_t c = lane; c < chunk; c += 32) weight += chunk_weights[c * kDigits + (cut.upper & (kDigits - 1))];
#pragma unroll
  for (int distance = 16; distance; distance /= 2) weight += __shfl_xor_sync(kAll, weight, distance);
  __syncthreads();
  uint64_t front = upto - own, all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    front += i < warp ? of_warps[i] : 0;
    all += of_warps[i];
  }
  uint64_t earlier = 0;  // equals in the steps before
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint64_t at = earlier + (front >> 16 * step & 0xFFFF);
#pragma unroll
    for (int i = step * kWidth; i < (step + 1) * kWidth; ++i) {
      if (rank_of(score[i]) != cut.upper) continue;
      if (cut.above + weight + at * each >= cut.wanted) score[i] = -INFINITY;
      ++at;
    }
    earlier += all >> 16 * step & 0xFFFF;
  }
}

// Launched with M x chunks blocks; where tokens are filtered once more, for the rows that filters have a say in.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 3)
    vq_sample_choose_kernel(const __grid_constant__ Arguments p, const __grid_constant__ Filter f) {
  const int64_t row = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const float temperature = p.temperature[row];
  if (f.active && !is_drawn(temperature, score_of(p.top[row]))) return;
  const int64_t first = chunk * kSpan + threadIdx.x * kWidth;
  float score[kScores];
  load_scores<T, kWide>(score, p, row, first, temperature);
  if (f.active) {
    const float best = score_of(p.top[row]);
    uint32_t least = rank_of(best + f.log_min_p);
    if (f.weights) {
      const Cut cut = next_cut(f, row);
      least = max(least, cut.upper);
      if (f.chunk_weights)
        drop_equals(score, f, cut, share_of(score_of(cut.upper), best, f.unit),
                    f.chunk_weights + row * p.chunks * kDigits, chunk);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) score[i] = rank_of(score[i]) >= least ? score[i] : -INFINITY;
  } else if (p.top) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kScores; ++i) top = max(top, rank_of(score[i]));
    top = __reduce_max_sync(kAll, top);
    if (threadIdx.x % 32 == 0) atomicMax(p.top + row, top);
  }
  const uint64_t key = noise_key(p.seed[row], static_cast<uint64_t>(p.position[row]));
  const Best best = best_of_block<kThreads>(score, temperature > 0, key, [&](int i) { return token_of(first, i); });
  if (threadIdx.x == 0) p.best[blockIdx.x] = best;
}

// Launched with a warp a row. A temperature that is negative or not finite chooses nothing.
__global__ void __launch_bounds__(32) vq_sample_pick_kernel(const __grid_constant__ Arguments p) {
  const int64_t row = blockIdx.x;
  const float temperature = p.temperature[row];
  const int64_t token = token_of_row(p.best + row * p.chunks, p.chunks);
  if (threadIdx.x == 0) p.token[row] = temperature >= 0 && temperature < INFINITY ? token : -1;
}

}  // namespace scrimp::cuda::vq_sample
