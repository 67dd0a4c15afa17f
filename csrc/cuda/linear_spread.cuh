// Products of one tile by a block of two groups of four warps with 64 rows each, beside a warp that copies. Sums are left
// in shared memory, where each thread finds those of four rows side by side. experts_many.cuh has such blocks.
#pragma once
#include "linear_many.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Four sums in shared memory.
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

  __device__ __forceinline__ void run(const ManyWork& work) {
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
    meet(1, R::WORKERS);
    leave(first_row, first_token);
  }

 private:
  // A thread has four rows, and every eighth token; all sums are on their way at once.
  __device__ __forceinline__ void leave(int first_row, int first_token) const {
    constexpr int APART = R::WORKERS / (TILE_ROWS / 4), AT_ONCE = R::T / APART < 16 ? R::T / APART : 16;
    const int n = static_cast<int>(threadIdx.x) % 32 * 4, last = min(R::T, p.tokens - first_token);
    const OfRow rows[4] = {shown.rows[n], shown.rows[n + 1], shown.rows[n + 2], shown.rows[n + 3]};
    for (int m = static_cast<int>(threadIdx.x) / 32; m < last; m += AT_ONCE * APART) {
      int4 sums[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) sums[j] = load_sums(base + (min(m + j * APART, last - 1) * LINE + n) * 4);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (m + j * APART >= last) break;
        const int4 sum = sums[j];
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
