// What warps of delta_streamed.cuh share: instructions of theirs, where their parts lie, and who does which tiles.
#pragma once
#include "delta_streamed_rows.cuh"
#include "wgmma.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// c[16, 8] += how many bits of a[16, 256] and b[256, 8] are both set
__device__ __forceinline__ void count_both(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// As load_once, but that several rows may read them.
__device__ __forceinline__ uint4 bits_if(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return x;
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

// Where a lane's first weights and bits of a tile lie, of two outputs 8 apart.
struct StreamPlace {
  const uint16_t* weights;
  const int32_t* bits;
  int weights_on, bits_on;  // from the first output to the second
  int apart, part;          // words from slot to slot
};

// A warp's turn to begin, after all have met: else all of them would compute, and then all wait for memory.
__device__ __forceinline__ void stagger(int warp) {
  const unsigned began = static_cast<unsigned>(clock()), turn = static_cast<unsigned>(warp / 4 * STAGGER);
  while (static_cast<unsigned>(clock()) - began < turn) {
  }
}

// What a warp does next: some quarters of a tile of the cluster; or nothing.
struct StreamWork {
  int tile, begin, end;

  __device__ __forceinline__ bool there() const { return tile >= 0; }
};

// Who does which tiles: each warp one after the other, all quarters; of the last ones, if they are so few that warps
// would have none, four warps do one together, a quarter each.
struct StreamDeal {
  int tiles, whole;  // whole: those that a warp does alone

  __device__ __forceinline__ explicit StreamDeal(int tiles_) : tiles(tiles_), whole(tiles_) {
    const int left = tiles % STREAM_WARPS;
    if (left <= STREAM_WARPS - STREAM_WARPS / 4) whole -= left;
  }
  __device__ __forceinline__ StreamWork at(int tile, int warp) const {
    if (tile < whole) return {tile, 0, EACH_RANK};
    return tile < tiles ? StreamWork{tile, warp % 4, warp % 4 + 1} : StreamWork{-1, 0, 0};
  }
  __device__ __forceinline__ StreamWork first(int warp) const {
    return at(warp < whole ? warp : whole + warp / 4, warp);
  }
  __device__ __forceinline__ StreamWork after(const StreamWork& now, int warp) const {
    if (now.tile >= whole) return at(now.tile + STREAM_WARPS / 4, warp);
    return at(now.tile + STREAM_WARPS < whole ? now.tile + STREAM_WARPS : whole + warp / 4, warp);
  }
};

#endif

}  // namespace hfl
