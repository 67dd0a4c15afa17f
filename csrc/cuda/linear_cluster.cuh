// Blocks of a cluster that add up what each has left in its shared memory.
#pragma once
#include "linear.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return static_cast<int>(x);
}
// All threads of all blocks of the cluster come by, and wait for each other; what was written to shared memory before
// the first is seen after the second.
__device__ __forceinline__ void come_by_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four sums to the shared memory of a block of the cluster.
__device__ __forceinline__ void store_at(uint32_t at, int rank, const int* x) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(x[0]), "r"(x[1]), "r"(x[2]),
               "r"(x[3])
               : "memory");
}
// The same of this block.
__device__ __forceinline__ void store_sums(uint32_t at, const int* x) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
// Four more sums, added.
__device__ __forceinline__ void add_sums(int* x, uint32_t at) {
  int y[4];
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
               : "r"(at)
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] += y[i];
}

#endif

}  // namespace hfl
