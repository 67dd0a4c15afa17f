// Products of one tile by a block of two groups of four warps with 64 rows each, beside a warp that copies; or by the
// blocks of a cluster, which share its columns. Sums are left in each block's shared memory; of a tile, each block adds
// up its part of the tokens, out of the memory of all, exactly. experts_many.cuh has such blocks.
#pragma once
#include "linear_many.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// All threads of all blocks of the cluster; what was written to shared memory before is seen after.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same, but for what was written.
__device__ __forceinline__ void leave_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
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

// The same of this block.
__device__ __forceinline__ int4 load_sums(uint32_t at) {
  const uint4 x = load_shared(at);
  return make_int4(static_cast<int>(x.x), static_cast<int>(x.y), static_cast<int>(x.z), static_cast<int>(x.w));
}

// And what belongs to the rows of the tile.
template <class R>
struct SpreadBoard : ManyBoard<R> {
  OfRow rows[TILE_ROWS];
};

template <class R>
struct SpreadGroup : ManyGroup<R> {
  static constexpr int LINE = TILE_ROWS + 4;  // of a token, so that banks differ
  static_assert(R::T * LINE * 4 <= R::STAGES * R::STAGE, "sums of a tile lie where its operands were");
  using ManyGroup<R>::p, ManyGroup<R>::base, ManyGroup<R>::group, ManyGroup<R>::warp, ManyGroup<R>::lane;
  using ManyGroup<R>::acc, ManyGroup<R>::S;
  SpreadBoard<R>& shown;

  __device__ SpreadGroup(const LinearTask& p_, SpreadBoard<R>& board_, uint32_t base_)
      : ManyGroup<R>(p_, board_, base_), shown(board_) {}

  // This block's part of a tile.
  __device__ __forceinline__ void run(const ManyWork& work, int rank) {
    const int first_row = work.row_tile * TILE_ROWS, first_token = work.token_tile * R::T;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < TILE_ROWS) shown.rows[thread] = row_of(p, first_row + thread);
    wait_for_last();
    for (int m = R::WORKERS - 1 - thread; m < R::T; m += R::WORKERS) shown.tokens[0][m] = token_of(p, first_token + m);
    this->multiply(work.last - work.first);
    meet(1, R::WORKERS);  // both groups are done with the operands, and what was shown is there
    const int n = group * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < R::T / 2; ++i) {
      const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
      store_word(base + (m * LINE + n + i % 4 / 2 * 8) * 4, acc[i]);
    }
    if (p.shares == 1) {
      meet(1, R::WORKERS);
      add_up<1>(first_row, first_token, rank);
      return;
    }
    meet_cluster();
    if (p.shares == 2) {
      add_up<2>(first_row, first_token, rank);
    } else if (p.shares == 4) {
      add_up<4>(first_row, first_token, rank);
    } else {
      add_up<8>(first_row, first_token, rank);
    }
    leave_cluster();  // nobody's memory goes before all have read it
  }

 private:
  // A thread has four rows, and every eighth token of the block's part; of several all sums are on their way at once.
  template <int SHARES>
  __device__ __forceinline__ void add_up(int first_row, int first_token, int rank) const {
    constexpr int APART = R::WORKERS / (TILE_ROWS / 4), MOST = R::T / SHARES / APART;
    constexpr int AT_ONCE = MOST < 1 ? 1 : MOST * SHARES <= 16 ? MOST : 16 / SHARES;
    const int n = static_cast<int>(threadIdx.x) % 32 * 4;
    const int last = min(R::T * (rank + 1) / SHARES, p.tokens - first_token);
    const OfRow rows[4] = {shown.rows[n], shown.rows[n + 1], shown.rows[n + 2], shown.rows[n + 3]};
    for (int m = R::T * rank / SHARES + static_cast<int>(threadIdx.x) / 32; m < last; m += AT_ONCE * APART) {
      int4 part[AT_ONCE][SHARES];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const uint32_t at = base + (min(m + j * APART, last - 1) * LINE + n) * 4;
#pragma unroll
        for (int i = 0; i < SHARES; ++i) part[j][i] = SHARES == 1 ? load_sums(at) : load_of(at, i);
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (m + j * APART >= last) break;
        int4 sum = part[j][0];
#pragma unroll
        for (int i = 1; i < SHARES; ++i) {
          sum.x += part[j][i].x, sum.y += part[j][i].y, sum.z += part[j][i].z, sum.w += part[j][i].w;
        }
        const OfToken token = shown.tokens[0][m + j * APART];
        const uint32_t pairs[4] = {pack_results(p, result<S>(sum.x, token, rows[0]), result<S>(sum.y, token, rows[1])),
                                   pack_results(p, result<S>(sum.z, token, rows[2]), result<S>(sum.w, token, rows[3]))};
        store_four(p, first_token + m + j * APART, first_row + n, pairs);
      }
    }
  }
};

#endif

}  // namespace hfl
