// Argument checks of the C++ ops: a failed one raises a Python error whose text is the values, joined.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace scrimp {

using torch::stable::Tensor;

// SCRIMP_CHECK(condition, "op: K=", k, " is not a multiple of ", g)
#define SCRIMP_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]]   \
      ::scrimp::fail(__VA_ARGS__);   \
  } while (false)

// One value of a message. No std::ostream: libraries beside a CUDA torch export one whose locale is not ours, and it
// crashes.
template <class Value>
std::string text_of(const Value& value) {
  if constexpr (std::is_floating_point_v<Value>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
    return text;
  } else if constexpr (std::is_arithmetic_v<Value>) {
    return std::to_string(value);
  } else {
    return value;
  }
}

template <class... Values>
[[noreturn]] void fail(const Values&... values) {
  throw std::runtime_error((std::string() + ... + text_of(values)));
}

// "[2, 9, 512, 64]"
inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// `tensor` itself when it is contiguous, else a copy. (Asking costs less than the dispatcher's no-op.)
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// `tensor` itself when its last dimension is contiguous, else a contiguous copy.
inline Tensor unit_last_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace scrimp
