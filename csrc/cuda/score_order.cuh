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

// How many tiles of scores a warp of the kernel that streams them has, at most.
int score_rounds(const hfl_score& a, int processors);

#ifdef __CUDACC__
// Scores are zero until they are there: who writes them only hints at it, and who reads them looks at each of them. So
// nobody waits until what it wrote can be seen.
__device__ __forceinline__ void store_as_it_comes(uint32_t* to, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ uint4 load_as_it_comes(const uint4* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_as_it_comes(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void hint(int* counter, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(x) : "memory");
}
// Never 0; that of -0 is that of 0, of NaN that of -inf.
__device__ __forceinline__ uint32_t order_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.0f);
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT_MIN));
}
#endif

}  // namespace hfl
