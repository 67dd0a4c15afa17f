// Barriers in shared memory that copies arrive at, of sm_90 and later.
#pragma once
#include "ptx.cuh"

namespace hfl {

// Phases are counted from 0; who waits for the phase before the first does not wait.
__device__ __forceinline__ void barrier_init(uint64_t& bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t& bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bar)) : "memory");
}
// Arrive, and let the phase last until so many bytes have been copied, too.
__device__ __forceinline__ void barrier_expect(uint64_t& bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bar)), "r"(bytes)
               : "memory");
}
// Until the phase of that parity is over.
__device__ __forceinline__ void barrier_wait(uint64_t& bar, int parity) {
  asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra wait;\n}" ::"r"(shared_address(&bar)), "r"(parity)
               : "memory");
}

}  // namespace hfl
