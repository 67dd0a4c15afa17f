// Sums over the threads of a block of 1024.
#pragma once
#include <stdint.h>

namespace hfl {

constexpr int THREADS = 1024, WARPS = THREADS / 32;

// Sum of x over the threads before this one; total: over all. `sums`: one place for each warp.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t* sums, uint32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t running = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, running, step);
    running += lane >= step ? other : 0u;
  }
  __syncthreads();  // nobody still reads the sums of the call before
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  const uint32_t mine = sums[lane];
  uint32_t before = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, before, step);
    before += lane >= step ? other : 0u;
  }
  total = __shfl_sync(0xffffffffu, before, 31);
  return __shfl_sync(0xffffffffu, before - mine, warp) + running - x;
}
static_assert(WARPS == 32, "a warp sums up the warps");

}  // namespace hfl
