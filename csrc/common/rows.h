// A tensor as a list of rows: its last dimension contiguous, the leading ones counted through in order.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"

namespace scrimp {

// Rows lie evenly spaced in up to two levels, as in x[B, T, K] or in the heads of a slice of one linear's output;
// a tensor with more levels is copied.
class Rows {
 public:
  explicit Rows(const Tensor& any) : tensor_(unit_last_stride(any)) {
    if (!find_levels()) {
      tensor_ = torch::stable::contiguous(tensor_);
      find_levels();
    }
    size_ = tensor_.element_size();
    data_ = static_cast<char*>(tensor_.data_ptr());
  }

  char* row(int64_t i) const { return data_ + size_ * (i / inner_ * outer_stride_ + i % inner_ * stride_); }

 private:
  bool find_levels() {
    int64_t rows[2] = {1, 1}, strides[2] = {0, 0};
    int level = 0;
    for (int64_t i = tensor_.dim() - 2; i >= 0; --i) {
      const int64_t size = tensor_.size(i), stride = tensor_.stride(i);
      if (size == 1) continue;
      if (rows[level] > 1 && stride != rows[level] * strides[level] && ++level == 2) return false;
      if (rows[level] == 1) strides[level] = stride;
      rows[level] *= size;
    }
    inner_ = std::max<int64_t>(rows[0], 1);
    stride_ = strides[0];
    outer_stride_ = strides[1];
    return true;
  }

  Tensor tensor_;
  char* data_;
  int64_t size_, inner_, stride_, outer_stride_;
};

// Calls work(row) for `rows` rows; what is too small to be shared stays on this thread.
template <class Work>
void for_each_row(int64_t rows, int64_t columns, const Work& work) {
  const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  for_each_item((rows + block - 1) / block, [&](int64_t item, int64_t) {
    for (int64_t row = item * block, end = std::min(row + block, rows); row < end; ++row) work(row);
  });
}

}  // namespace scrimp
