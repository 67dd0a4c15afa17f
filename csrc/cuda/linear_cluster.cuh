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
// The same at once, of barriers that were made: what else was written need not be seen.
__device__ __forceinline__ void meet_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four sums to the shared memory of a block of the cluster.
__device__ __forceinline__ void store_at(uint32_t at, int rank, const int* x) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(x[0]), "r"(x[1]), "r"(x[2]),
               "r"(x[3])
               : "memory");
}
// The same, counted by a barrier there, so that nobody else need say that they are there.
__device__ __forceinline__ void store_counted(uint32_t at, uint64_t& bar, int rank, const int* x) {
  asm volatile("{\n.reg .b32 there, counted;\nmapa.shared::cluster.u32 there, %0, %2;\n"
               "mapa.shared::cluster.u32 counted, %1, %2;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [there], {%3, %4, %5, %6}, [counted];\n}"
               ::"r"(at), "r"(shared_address(&bar)), "r"(rank), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
// Arrive at the barrier of a block of the cluster, behind what this thread has written there; and wait for such threads.
__device__ __forceinline__ void arrive_in_cluster(uint64_t& bar, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&bar)),
               "r"(rank)
               : "memory");
}
__device__ __forceinline__ void wait_in_cluster(uint64_t& bar, int parity) {
  asm volatile("{\n.reg .pred done;\nwait:\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(
                   shared_address(&bar)),
               "r"(parity)
               : "memory");
}
// Four sums to the shared memory of this block.
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
