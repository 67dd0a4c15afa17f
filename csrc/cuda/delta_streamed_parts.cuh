// What warps of delta_streamed.cuh share: instructions of theirs, where their parts lie, and who does which tiles.
#pragma once
#include "delta_streamed_rows.cuh"
#include "wgmma.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// c[16, 8] += how many bits of a[16, 256] and b[256, 8] are both set
__device__ __forceinline__ void count_both(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t over_there(uint32_t at, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
// Four floats to there, counted by a barrier there.
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, const float4& x) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   to),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(bar)
               : "memory");
}
// As barrier_wait, for what other blocks of the cluster have sent.
__device__ __forceinline__ void wait_for_cluster(uint64_t& bar, int parity) {
  asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra wait;\n}" ::"r"(shared_address(&bar)), "r"(parity)
               : "memory");
}

// Four warps side by side meet.
__device__ __forceinline__ void meet(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// A warp arrives at a barrier.
__device__ __forceinline__ void come_by(uint64_t& bar) {
  __syncwarp();
  if (lane_of_thread() == 0) barrier_arrive(bar);
}

// As copy_async_once, but that what tells the L2 has no registers, of which there is none to spare.
__device__ __forceinline__ void copy_once(uint32_t to, const void* from, bool there) {
  asm volatile(
      "{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, once;\n}" ::"r"(to),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
}

// A multiple of 16 bytes on its way to the L2.
__device__ __forceinline__ void bring_near(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Where a lane's first weights and bits of a tile lie, of two outputs 8 apart.
struct StreamPlace {
  const uint16_t* weights;
  const int32_t* bits;
  int weights_on, bits_on;  // from the first output to the second
  int apart, part;          // words from slot to slot
  int mine;                 // quarters that are there
};

// What a warp does next: a quarter of a tile of the cluster; or nothing, where the phase is none.
struct StreamStep {
  int phase, tile, quarter, end;
};

// Who does which tiles of a phase: each warp one after the other, all quarters; of the last ones, if they are so few
// that warps would have none, four warps do one together, a quarter each: in the next phase other warps than in this one.
struct StreamDeal {
  int tiles, whole, phases;  // whole: those that a warp does alone

  __device__ __forceinline__ StreamDeal(int tiles_, int phases_) : tiles(tiles_), whole(tiles_), phases(phases_) {
    const int left = tiles % STREAM_WARPS;
    if (left <= STREAM_WARPS - STREAM_WARPS / 4) whole -= left;
  }
  __device__ __forceinline__ StreamStep at(int phase, int tile, int warp) const {
    for (; tile >= tiles && phase < phases; tile = first(phase, warp)) ++phase;
    return tile < whole ? StreamStep{phase, tile, 0, EACH_RANK} : StreamStep{phase, tile, warp % 4, warp % 4 + 1};
  }
  __device__ __forceinline__ StreamStep begin(int warp) const { return at(0, first(0, warp), warp); }
  __device__ __forceinline__ StreamStep after(const StreamStep& now, int warp) const {
    if (now.quarter + 1 < now.end) return {now.phase, now.tile, now.quarter + 1, now.end};
    if (now.tile >= whole) return at(now.phase, now.tile + STREAM_WARPS / 4, warp);
    const int tile = now.tile + STREAM_WARPS;
    return at(now.phase, tile < whole ? tile : shared_by(now.phase, warp), warp);
  }
  __device__ __forceinline__ bool there(const StreamStep& step) const { return step.phase < phases; }

 private:
  __device__ __forceinline__ int first(int phase, int warp) const {
    return warp < whole ? warp : shared_by(phase, warp);
  }
  __device__ __forceinline__ int shared_by(int phase, int warp) const {
    return whole + ((warp / 4 - phase * (tiles - whole)) & 3);
  }
};

#endif

}  // namespace hfl
