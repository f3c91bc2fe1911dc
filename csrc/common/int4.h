// What a 4-bit code stands for.
#pragma once

namespace scrimp {

enum class Int4Zeros : int { none, shift, offset };  // c[q] s, (q - z) s, q s + z

}  // namespace scrimp
