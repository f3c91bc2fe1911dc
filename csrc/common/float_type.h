// The 16- and 32-bit floats that a kernel is told of at run time.
#pragma once

namespace scrimp {

enum class FloatType : int { fp32, bf16, fp16 };

}  // namespace scrimp
