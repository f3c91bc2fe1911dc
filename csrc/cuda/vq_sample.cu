// vq_sample on CUDA: checks, the scores of the codes by the op linear, the passes of the filters, launches,
// registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/call_linear.h"
#include "common/vq_head.h"
#include "common/vq_sample.h"
#include "cuda/vq_sample.cuh"

namespace scrimp::cuda::vq_sample {

using torch::headeronly::ScalarType;

constexpr int kPasses = 4;  // of a threshold

// What a threshold is made of, and where its passes write.
struct Chain {
  uint64_t* weights;  // [kPasses, M, kDigits], zeros
  Cut* cuts;          // [kPasses, M]
};

template <class T, bool kWide>
static void launch(const Arguments& p, int64_t M, const Filter& filter, const Chain (&chains)[2],
                   uint64_t* chunk_weights, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(M * p.chunks);
  vq_sample_choose_kernel<T, kWide><<<blocks, kThreads, 0, stream>>>(p, Filter{});
  Filter f = filter;
  for (const bool shares : {false, true}) {
    const Chain& chain = chains[shares];
    if (!chain.weights) continue;
    f.shares = shares;
    for (int i = 0; i < kPasses; ++i) {
      uint64_t* const weights = chain.weights + i * M * kDigits;
      const bool last = shares && i == kPasses - 1;
      const Pass pass = {chain.cuts + i * M, weights, last ? chunk_weights : nullptr, 24 - 8 * i};
      if (i == 0 && f.weights) f.floor = pass.cut;  // of top-k, which the first pass of top-p finds
      vq_sample_weigh_kernel<T, kWide><<<blocks, kThreads, 0, stream>>>(p, f, pass);
      f.before = i ? pass.cut : nullptr;
      f.weights = weights;
    }
    f.chunk_weights = shares ? chunk_weights : nullptr;
  }
  if (filter.active) {
    f.active = true;
    vq_sample_choose_kernel<T, kWide><<<blocks, kThreads, 0, stream>>>(p, f);
  }
  vq_sample_pick_kernel<<<static_cast<uint32_t>(M), 32, 0, stream>>>(p);
}

static Tensor run(const Tensor& h, const Tensor& codebook, const Tensor& codes_any,
                  const std::optional<Tensor>& bias_any, const Tensor& temperature_any, const Tensor& seed_any,
                  const Tensor& position_any, int64_t top_k, double top_p, double min_p) {
  const auto dtype = h.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "vq_sample: h must be float32, float16 or bfloat16 on CUDA");
  check_vq_head("vq_sample", h, codebook, codes_any, bias_any);
  check_vq_sample(h, codes_any, temperature_any, seed_any, position_any, top_k, top_p, min_p);
  const auto device = h.get_device_index();
  for (const Tensor* tensor :
       {&h, &codebook, &codes_any, bias_any ? &*bias_any : &h, &temperature_any, &seed_any, &position_any})
    SCRIMP_CHECK(tensor->is_cuda() && tensor->get_device_index() == device,
                 "vq_sample: all tensors must be on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor token = torch::stable::new_empty(seed_any, seed_any.sizes());
  const int64_t M = token.numel(), K = codebook.size(0), V = codes_any.size(codes_any.dim() - 1);
  if (M == 0) return token;
  if (K == 0) return torch::stable::fill_(token, -1);

  const Tensor codes = as_contiguous(codes_any), bias = as_contiguous(bias_any.value_or(codes));
  const Tensor temperature = as_contiguous(temperature_any);
  const Tensor seed = as_contiguous(seed_any), position = as_contiguous(position_any);
  const Tensor scores = call_linear(h, codebook);
  const int64_t chunks = (V + kSpan - 1) / kSpan;
  SCRIMP_CHECK(M * chunks <= INT32_MAX, "vq_sample: ", M, " rows of ", V, " tokens are ", M * chunks,
               " blocks; one launch has at most ", INT32_MAX);
  const bool counts = top_k > 0 && top_k < V, shares = top_p < 1, filters = counts || shares || min_p > 0;
  const auto words = [&](int64_t count) { return torch::stable::new_empty(token, {count}); };
  constexpr int64_t kBest = sizeof(Best) / 8, kCut = sizeof(Cut) / 8;
  const int64_t of_chain = kPasses * M * kDigits, of_cuts = kPasses * M;
  const Tensor best = words(M * chunks * kBest);
  const Tensor zeros = torch::stable::new_zeros(token, {filters ? (counts + shares) * of_chain + M : 0});
  const Tensor cuts = words((counts + shares) * of_cuts * kCut);
  const Tensor chunk_weights = words(shares ? M * chunks * kDigits : 0);
  auto* const sums = static_cast<uint64_t*>(zeros.data_ptr());
  auto* const cut = static_cast<Cut*>(cuts.data_ptr());
  const Chain of_counts = {counts ? sums + M : nullptr, cut};
  const Chain of_shares = {shares ? sums + M + counts * of_chain : nullptr, cut + counts * of_cuts};
  const Filter filter = {.top_k = static_cast<uint64_t>(top_k),
                         .top_p = top_p,
                         .log_min_p = static_cast<float>(std::log(min_p)),
                         .unit = std::min(44, 62 - static_cast<int>(std::bit_width(static_cast<uint64_t>(V)))),
                         .active = filters};
  const Arguments p = {.tokens = {.codes = static_cast<const int32_t*>(codes.data_ptr()),
                                  .bias = bias_any ? bias.data_ptr() : nullptr,
                                  .K = K,
                                  .V = V,
                                  .levels = codes.dim() == 2 ? codes.size(0) : 1},
                       .scores = scores.data_ptr(),
                       .temperature = static_cast<const float*>(temperature.data_ptr()),
                       .seed = static_cast<const int64_t*>(seed.data_ptr()),
                       .position = static_cast<const int64_t*>(position.data_ptr()),
                       .best = static_cast<Best*>(best.data_ptr()),
                       .top = filters ? reinterpret_cast<uint32_t*>(sums) : nullptr,
                       .token = static_cast<int64_t*>(token.data_ptr()),
                       .chunks = static_cast<uint32_t>(chunks)};
  const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool wide = V % kWidth == 0 && fits(p.tokens.codes) && fits(p.tokens.bias) &&
                    K * static_cast<int64_t>(h.element_size()) <= kVqShared;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch_as = [&]<class T>(T) {
    const auto of_width = wide ? launch<T, true> : launch<T, false>;
    of_width(p, M, filter, {of_counts, of_shares}, static_cast<uint64_t*>(chunk_weights.data_ptr()),
             static_cast<cudaStream_t>(stream));
  };
  dtype == ScalarType::Half       ? launch_as(__half())
  : dtype == ScalarType::BFloat16 ? launch_as(__nv_bfloat16())
                                  : launch_as(0.0f);
  const cudaError_t status = cudaGetLastError();
  SCRIMP_CHECK(status == cudaSuccess, "vq_sample: the launch failed: ", cudaGetErrorString(status));
  return token;
}

}  // namespace scrimp::cuda::vq_sample

STABLE_TORCH_LIBRARY_IMPL(scrimp, CUDA, m) { m.impl("vq_sample", TORCH_BOX(&scrimp::cuda::vq_sample::run)); }
