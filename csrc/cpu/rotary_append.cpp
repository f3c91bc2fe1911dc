// rotary_append on the CPU: checks, work split, registration.
#include "cpu/rotary_append.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "common/check.h"
#include "common/rows.h"
#include "common/tensors.h"
#include "cpu/ops.h"

namespace scrimp {

using torch::headeronly::ScalarType;

static void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  SCRIMP_CHECK(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()), "rotary_append: ", name,
               " has shape ", shape_text(tensor), ", which does not fit q or the cache");
}

// A tensor that is written has one place for every element.
static void check_cache(const char* name, const Tensor& cache) {
  for (int i = 0; i < 4; ++i)
    SCRIMP_CHECK(cache.size(i) <= 1 || (i == 3 ? cache.stride(i) == 1 : cache.stride(i) > 0), "rotary_append: ", name,
                 " must have a contiguous last dimension and no expanded one, got stride ", cache.stride(i),
                 " in dimension ", i);
}

Tensor rotary_append(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& cos_any,
                     const Tensor& sin_any, const Tensor& positions_any, const Tensor& start_any, const Tensor& k_cache,
                     const Tensor& v_cache) {
  const auto dtype = q_any.scalar_type();
  SCRIMP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
               "rotary_append: q must be float32 or bfloat16 on the CPU");
  for (const Tensor* tensor : {&k_any, &v_any, &k_cache, &v_cache})
    SCRIMP_CHECK(tensor->scalar_type() == dtype, "rotary_append: q, k, v and the caches differ in dtype");
  for (const Tensor* tensor : {&cos_any, &sin_any})
    SCRIMP_CHECK(tensor->scalar_type() == ScalarType::Float, "rotary_append: cos and sin must be float32");
  for (const Tensor* tensor : {&positions_any, &start_any})
    SCRIMP_CHECK(tensor->scalar_type() == ScalarType::Int, "rotary_append: positions and start must be int32");
  for (const Tensor* tensor :
       {&q_any, &k_any, &v_any, &cos_any, &sin_any, &positions_any, &start_any, &k_cache, &v_cache})
    SCRIMP_CHECK(tensor->is_cpu(), "rotary_append: all tensors must be on the CPU");
  SCRIMP_CHECK(q_any.dim() == 4 && k_any.dim() == 4 && k_cache.dim() == 4 && cos_any.dim() == 2, "rotary_append: q ",
               shape_text(q_any), ", k ", shape_text(k_any), ", k_cache ", shape_text(k_cache), " and cos ",
               shape_text(cos_any), " must have 4, 4, 4 and 2 dimensions");
  const int64_t B = q_any.size(0), T = q_any.size(1), H = q_any.size(2), D = q_any.size(3);
  const int64_t G = k_any.size(2), C = k_cache.size(2), P = cos_any.size(0), R = cos_any.size(1);
  check_shape("k", k_any, {B, T, G, D});
  check_shape("v", v_any, {B, T, G, D});
  check_shape("k_cache", k_cache, {B, G, C, D});
  check_shape("v_cache", v_cache, {B, G, C, D});
  check_shape("sin", sin_any, {P, R});
  check_shape("positions", positions_any, {B, T});
  check_shape("start", start_any, {B});
  SCRIMP_CHECK(R % 2 == 0 && R <= D, "rotary_append: cos has ", R, " columns; they must be even and at most D=", D);
  check_cache("k_cache", k_cache);
  check_cache("v_cache", v_cache);

  const Tensor positions = as_contiguous(positions_any), start = as_contiguous(start_any);
  const auto* position = static_cast<const int32_t*>(positions.data_ptr());
  const auto* first = static_cast<const int32_t*>(start.data_ptr());
  for (int64_t i = 0; i < B * T; ++i)
    SCRIMP_CHECK(position[i] >= 0 && position[i] < P, "rotary_append: position ", position[i], " is outside the ", P,
                 " rows of cos and sin");
  for (int64_t b = 0; b < B; ++b)
    SCRIMP_CHECK(first[b] >= 0 && first[b] <= C - T, "rotary_append: start[", b, "]=", first[b], " and ", T,
                 " new rows leave the cache's ", C, " slots");

  const Tensor q = unit_last_stride(q_any), k = unit_last_stride(k_any), v = unit_last_stride(v_any);
  const Tensor cos = unit_last_stride(cos_any), sin = unit_last_stride(sin_any);
  const Tensor out = cpu_empty(q, {B, H, T, D});
  if (D == 0) return out;
  const int64_t size = dtype == ScalarType::BFloat16 ? 2 : 4;
  const auto at = [&](const Tensor& tensor, int64_t i, int64_t dim, int64_t j) {
    auto* data = static_cast<char*>(tensor.data_ptr());
    return data ? data + size * (i * tensor.stride(0) + j * tensor.stride(dim)) : nullptr;  // no heads, no memory
  };
  const auto angle = [&](const Tensor& tensor, int64_t row) {
    return R ? static_cast<const float*>(tensor.data_ptr()) + row * tensor.stride(0) : nullptr;
  };
  const auto kernel = SCRIMP_KERNEL(rotary_append);
  for_each_row(B * T, (H + 2 * G) * D, [&](int64_t row) {
    const int64_t b = row / T, t = row % T, slot = first[b] + t;
    kernel({.q = {at(q, b, 1, t), at(out, b, 2, t), H, q.stride(2), out.stride(1)},
            .k = {at(k, b, 1, t), at(k_cache, b, 2, slot), G, k.stride(2), k_cache.stride(1)},
            .v = {at(v, b, 1, t), at(v_cache, b, 2, slot), G, v.stride(2), v_cache.stride(1)},
            .cos = angle(cos, position[row]),
            .sin = angle(sin, position[row]),
            .head_dim = D,
            .rotary = R,
            .bf16 = dtype == ScalarType::BFloat16});
  });
  return out;
}

}  // namespace scrimp

STABLE_TORCH_LIBRARY_IMPL(scrimp, CPU, m) { m.impl("rotary_append", TORCH_BOX(&scrimp::rotary_append)); }
