// How a step keeps scores of a row until they are chosen from: as whole numbers of the same order.
#pragma once
#include <math.h>

#include "../hf_longctx.h"

namespace hfl {

constexpr int CHOOSERS = 256;  // threads
constexpr int MOST_EACH = 68;  // blocks of a thread

// Blocks of a thread where threads choose among so many: an odd multiple of 4, so that what eight threads read at a time
// lies in different banks.
inline int each_of(int blocks) { return 4 * ((blocks + 4 * CHOOSERS - 1) / (4 * CHOOSERS) | 1); }

#ifdef __CUDACC__
// Never 0; that of -0 is that of 0, of NaN that of -inf.
__device__ __forceinline__ uint32_t order_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.0f);
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT_MIN));
}
#endif

}  // namespace hfl
