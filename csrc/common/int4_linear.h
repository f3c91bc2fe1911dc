// int4_linear: what the launchers of every device check before they touch memory.
#pragma once

#include <initializer_list>
#include <optional>

#include "common/check.h"
#include "common/float_dtype.h"
#include "common/int4.h"

namespace scrimp {

// The op's arguments.
struct Int4Problem {
  Tensor x, qweight, scales;
  std::optional<Tensor> zeros, codebook, permutation, bias;
  int64_t group, N, K;
  Int4Zeros kind;
  bool byte_zeros, int8;

  // Whether a test holds for every tensor.
  template <class Test>
  bool all(Test test) const {
    bool holds = test(x) && test(qweight) && test(scales);
    for (const auto* tensor : {&zeros, &codebook, &permutation, &bias}) holds = holds && (!*tensor || test(**tensor));
    return holds;
  }

  // Shapes and types; where the tensors are and what they hold is the launcher's to check.
  void check() const {
    using torch::headeronly::ScalarType;
    SCRIMP_CHECK(float_type(x), "int4_linear: x must be float32, bfloat16 or float16");
    SCRIMP_CHECK(qweight.scalar_type() == ScalarType::Byte, "int4_linear: qweight must be uint8");
    SCRIMP_CHECK(float_type(scales), "int4_linear: scales must be float32, bfloat16 or float16");
    SCRIMP_CHECK(
        group > 0 && K % group == 0 && (group == K || group == 16 || group == 32 || group == 64 || group == 128),
        "int4_linear: group_size=", group, " must be 16, 32, 64, 128 or K=", K, " and divide it");
    check_shape("scales", scales, {N, K ? K / group : 0});
    SCRIMP_CHECK(zeros.has_value() == (kind != Int4Zeros::none), "int4_linear: zeros do not fit zero_kind");
    if (zeros) {
      SCRIMP_CHECK(zeros->scalar_type() == (byte_zeros ? ScalarType::Byte : scales.scalar_type()),
                   "int4_linear: zeros must be ", byte_zeros ? "uint8" : "of the dtype of scales");
      check_shape("zeros", *zeros, {N, K ? K / group : 0});
    }
    if (codebook) {
      SCRIMP_CHECK(!zeros, "int4_linear: a codebook takes no zeros");
      const auto dtype = codebook->scalar_type();
      SCRIMP_CHECK(dtype == ScalarType::Char || (dtype == ScalarType::Float && !int8),
                   "int4_linear: a codebook must be int8, or float32 in exact mode");
      check_shape("codebook", *codebook, {16});
    }
    const int64_t inputs = x.size(x.dim() - 1);
    SCRIMP_CHECK(permutation || inputs == K, "int4_linear: x has ", inputs, " inputs, but the weight ", K);
    if (permutation) {
      SCRIMP_CHECK(inputs <= K, "int4_linear: x has ", inputs, " inputs, but the weight permutes ", K);
      SCRIMP_CHECK(permutation->scalar_type() == ScalarType::Int, "int4_linear: permutation must be int32");
      check_shape("permutation", *permutation, {K});
    }
    if (bias) {
      SCRIMP_CHECK(bias->scalar_type() == x.scalar_type(), "int4_linear: bias must be of the dtype of x");
      check_shape("bias", *bias, {N});
    }
  }

 private:
  static void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(i) == shape.begin()[i];
    if (same) return;
    std::string expected;
    for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    fail("int4_linear: ", name, " has shape ", shape_text(tensor), ", expected [", expected, "]");
  }
};

// The problem of the op's flat arguments; makes weights contiguous.
inline Int4Problem int4_problem(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                                const std::optional<Tensor>& zeros, const std::optional<Tensor>& codebook,
                                const std::optional<Tensor>& permutation, const std::optional<Tensor>& bias,
                                int64_t group_size, int64_t zero_kind, int64_t mode) {
  SCRIMP_CHECK(0 <= zero_kind && zero_kind <= 3, "int4_linear: zero_kind=", zero_kind, " must be 0 to 3");
  SCRIMP_CHECK(mode == 0 || mode == 1, "int4_linear: mode=", mode, " must be 0 or 1");
  SCRIMP_CHECK(qweight.dim() == 2, "int4_linear: qweight must be [N, K/2], got shape ", shape_text(qweight));
  SCRIMP_CHECK(x.dim() >= 1, "int4_linear: x must be [..., inputs], got a scalar");
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
  };
  const Int4Zeros kinds[] = {Int4Zeros::none, Int4Zeros::shift, Int4Zeros::shift, Int4Zeros::offset};
  return {x,
          as_contiguous(qweight),
          as_contiguous(scales),
          contiguous(zeros),
          contiguous(codebook),
          contiguous(permutation),
          contiguous(bias),
          group_size,
          qweight.size(0),
          2 * qweight.size(1),
          kinds[zero_kind],
          zero_kind == 1,
          mode == 1};
}

}  // namespace scrimp
