// vq_logits, the loops: each token takes the scores of its codes.
#include "cpu/vq_logits.h"

#include "common/vq_lanes.h"

namespace scrimp::SCRIMP_ISA {
namespace {

template <class T>
void scatter(const VqScatter& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const TokenLogits<T> from{static_cast<const T*>(p.scores) + row * p.codebook, p.codes,
                              static_cast<const T*>(p.bias), p.levels, p.tokens};
    T* to = static_cast<T*>(p.logits) + row * p.tokens;
    int64_t v = p.first;
    for (; v + kLanes <= p.last; v += kLanes) store(to + v, from.lanes(v));
    for (; v < p.last; ++v) store_first(to + v, broadcast(from.one(v)), 1);
  }
}

}  // namespace

void vq_logits(const VqScatter& part) { part.bf16 ? scatter<BFloat16>(part) : scatter<float>(part); }

}  // namespace scrimp::SCRIMP_ISA
