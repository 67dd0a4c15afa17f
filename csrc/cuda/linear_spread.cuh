// w4a8_linear of 17 tokens and more for sm_90a, where whole tiles would leave multiprocessors without work: as
// linear_many.cuh, but the blocks of a cluster share the columns of one tile.
//
// Grid: a cluster of 1 to 8 blocks for each tile of 128 rows and T tokens. Two blocks fit on a multiprocessor, so that
//   the next kernel's codes come while this one ends, and one makes operands while the other's products are made.
// Block: two groups of four warps with 64 rows each; the first thread copies, too.
// Sums are left in each block's shared memory; of a tile, each block adds up its part of the tokens, out of the memory
//   of all, exactly.
// Shared memory: STAGES times tokens, codes and scales of 128 columns, up to 111 KiB; in the end, sums.
#pragma once
#include "linear_many.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return static_cast<int>(x);
}
// All threads of all blocks of the cluster; what was written to shared memory before is seen after.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four sums in the shared memory of a block of the cluster.
__device__ __forceinline__ int4 load_of(uint32_t at, int rank) {
  uint32_t there;
  int4 x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(there)
               : "memory");
  return x;
}

template <class R>
struct SpreadGroup : ManyGroup<R> {
  static constexpr int LINE = TILE_ROWS + 4;  // of a token, so that banks differ
  static_assert(R::T * LINE * 4 <= R::STAGES * R::STAGE, "sums of a tile lie where its operands were");
  using ManyGroup<R>::p, ManyGroup<R>::base, ManyGroup<R>::group, ManyGroup<R>::warp, ManyGroup<R>::lane;
  using ManyGroup<R>::ManyGroup, ManyGroup<R>::acc;

  __device__ __forceinline__ void multiply(const ManyWork& work, ManyFeeder<R>& feeder) {
    ManyGroup<R>::multiply(work.last - work.first, [&](int i) {
      if (threadIdx.x == 0) feeder.refill(work, i - 2);  // the other group may be a step behind
      __syncwarp();
    });
  }

  __device__ __forceinline__ void share(const ManyWork& work, int rank) {
    meet(1, R::WORKERS);  // both groups are done with the operands
    const int n = group * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < R::T / 2; ++i) {
      const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
      store_word(base + (m * LINE + n + i % 4 / 2 * 8) * 4, acc[i]);
    }
    meet_cluster();
    add_up(work, rank);
    meet_cluster();  // nobody's memory goes before all have read it
  }

 private:
  // A thread has four rows, and every eighth token of the block's part.
  __device__ __forceinline__ void add_up(const ManyWork& work, int rank) const {
    constexpr int MOST = 8, APART = R::WORKERS / (TILE_ROWS / 4);
    const int first_token = work.token_tile * R::T, n = static_cast<int>(threadIdx.x) % 32 * 4;
    const int row = work.row_tile * TILE_ROWS + n, last = min(R::T * (rank + 1) / p.shares, p.tokens - first_token);
    const OfRow rows[4] = {row_of(p, row), row_of(p, row + 1), row_of(p, row + 2), row_of(p, row + 3)};
    for (int m = R::T * rank / p.shares + static_cast<int>(threadIdx.x) / 32; m < last; m += APART) {
      const OfToken token = token_of(p, first_token + m);
      int4 part[MOST], sum = make_int4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < MOST; ++i) part[i] = i < p.shares ? load_of(base + (m * LINE + n) * 4, i) : sum;
#pragma unroll
      for (int i = 0; i < MOST; ++i) {
        sum.x += part[i].x, sum.y += part[i].y, sum.z += part[i].z, sum.w += part[i].w;
      }
      const uint32_t pairs[4] = {pack_results(p, result(sum.x, token, rows[0]), result(sum.y, token, rows[1])),
                                 pack_results(p, result(sum.z, token, rows[2]), result(sum.w, token, rows[3]))};
      store_four(p, first_token + m, row, pairs);
    }
  }
};

#endif

template <class R>
__global__ void __launch_bounds__(R::THREADS, 2) linear_spread_kernel(const __grid_constant__ LinearTask p,
                                                                      const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ ManyBoard<R> board;
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;  // the same in all blocks
  let_next_begin();
  if (threadIdx.x == 0) board.init(), fetch_map(&map);
  __syncthreads();
  const int tile = static_cast<int>(blockIdx.x) / p.shares, rank = rank_in_cluster();
  const ManyWork work(p, tile, p.steps * rank / p.shares, p.steps * (rank + 1) / p.shares, -1);
  ManyFeeder<R> feeder{p, map, board, base};
  if (threadIdx.x == 0) feeder.begin(work);
  __syncwarp();
  wait_for_last();
  SpreadGroup<R> group(p, board, base);
  if (p.shares == 1) {
    group.compute(work, [&] { group.multiply(work, feeder); });
  } else {
    group.multiply(work, feeder);
    group.share(work, rank);
  }
#endif
}

}  // namespace hfl
