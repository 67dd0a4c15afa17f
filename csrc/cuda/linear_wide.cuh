// w4a8_linear of up to 256 tokens for sm_90a: as linear_many.cuh, but four groups of warps, of which some expand codes
// while others multiply, and panels of rows shared out evenly. linear.cu says what it computes.
//
// Grid: a cluster of 1 or 2 blocks for each tile of 64 RG rows and T tokens, which share its columns; or, where tiles
//   are not shared, a block for each multiprocessor, which computes its part of the rows, up to RG panels at a time.
// Block: four groups of four warps, of which RG have 64 rows each, and KG every KG-th stage of columns; beside them a
//   warp that copies tokens, two that copy codes and scales, which need not wait for the kernel before, and one that
//   shows what belongs to tokens and, where there is one tile, to rows.
// Sums of groups that have the same rows are exchanged in shared memory, so that each has all of a part of the tokens;
//   then those of both blocks, by writes to the other one's. Exact.
// Shared memory: STAGES times tokens, codes and scales of S times 128 columns, up to 216 KiB; in the end, sums.
// Bound by, on an H200: of 64 tokens and 28672 rows bytes of the weight, and the products of multiprocessors that have
//   four panels, not three; of fewer rows by what goes before the first product and comes after the last.
#pragma once
#include "linear_cluster.cuh"
#include "linear_wide_products.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A group that multiplies, and what it does with sums.
template <class R>
struct WideGroup : WideProducts<R> {
  static constexpr bool SHIFTED = R::F == Form::CHANNEL;
  static constexpr int T = R::T;
  using Products = WideProducts<R>;
  using Products::acc, Products::group, Products::rows, Products::part, Products::warp, Products::lane;
  using Products::p, Products::board, Products::base, Products::multiply;
  using Products::WideProducts;

  __device__ __forceinline__ static OfToken token_with(float scale, int less) {
    return {scale, SHIFTED ? __int_as_float(less) : 0.0f, SHIFTED ? 0 : less};
  }

  // Of the 64 rows from `row` on, of this group.
  __device__ __forceinline__ void show_rows(int row) {
    for (int n = warp * 32 + lane; n < 64; n += 128) board.rows[group * 64 + n] = row_of(p, row + n);
  }

  // Results of 16 rows, and of 2 N tokens from `token` of the tile on. Of two threads that have two tokens and two rows
  // each, of both eighths of the rows, one gets four rows of the first and one of the second.
  template <int N>
  __device__ __forceinline__ void leave(const int (&x)[N], const WideWork& work, int rows_list, int token) {
    const int row = (work.panel + rows) * 64 + warp * 16;
    if (work.token + token + 2 * N <= p.tokens && row + 16 <= p.a.rows && p.a.rows % 4 == 0) {
      leave<true>(x, row, work.token, rows_list, token);
    } else {
      leave<false>(x, row, work.token, rows_list, token);
    }
  }
  template <bool WHOLE, int N>
  __device__ __forceinline__ void leave(const int (&x)[N], int row, int first_token, int rows_list, int token) {
    int own_lane = lane;  // so that what follows is computed here, and not kept in registers all the while
    asm volatile("" : "+r"(own_lane));
    const float2* scales = reinterpret_cast<const float2*>(board.scale + token) + own_lane % 4;
    const int2* less = reinterpret_cast<const int2*>(board.less + token) + own_lane % 4;
    const OfRow of_rows[2] = {board.rows[rows_list * 64 + warp * 16 + own_lane / 4],
                              board.rows[rows_list * 64 + warp * 16 + own_lane / 4 + 8]};
    const bool odd = own_lane % 2;
    const int own = row + (odd ? 8 : 0) + own_lane % 4 / 2 * 4, first = first_token + token + own_lane / 4;
    uint16_t* to = place_of(p, first, own);
#pragma unroll
    for (int q = 0; q < N / 4; ++q) {
      const float2 scale = scales[4 * q];
      const int2 off = less[4 * q];
      const OfToken low = token_with(scale.x, off.x), high = token_with(scale.y, off.y);
      uint32_t two[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        two[h] = transpose(pack_results(p, result<SHIFTED>(x[4 * q + 2 * h], low, of_rows[h]),
                                        result<SHIFTED>(x[4 * q + 2 * h + 1], high, of_rows[h])));
      }
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 1);
      const uint2 four = odd ? make_uint2(other, two[1]) : make_uint2(two[0], other);
      if constexpr (WHOLE) {
        *reinterpret_cast<uint2*>(to) = four;
        to += 8 * static_cast<int64_t>(p.a.rows);
      } else if (first + q * 8 < p.tokens) {
        const uint32_t pairs[4] = {four.x, four.y};
        store_four(p, first + q * 8, own, pairs);
      }
    }
  }

  // One tile after the other.
  __device__ __forceinline__ void run_alone() {
    wait_for_last();
    each_wide<R>(p, 0, [&](const WideWork& work) {
      meet(2 + group, 128);  // nobody needs the rows of the tile before any more
      show_rows((work.panel + rows) * 64);
      multiply(work);
      meet(2 + group, 128);
      barrier_wait(board.shown, 0);
      if (rows < work.panels) leave(acc, work, group, 0);
    });
  }

  // This block's part of a tile.
  __device__ __forceinline__ void run_shared(int rank) {
    each_wide<R>(p, rank, [&](const WideWork& work) {
      wait_for_last();
      if (part == 0) asm volatile("" ::: "memory");  // without a branch here nvcc 13.0 finds no registers for the loop
      multiply(work);
      barrier_wait(board.shown, 0);
      if (!R::OWN_STAGE) meet(1, R::WORKERS);  // all groups are done with the operands
      if constexpr (T == 16) {
        if (p.shares == 1) {
          finish_few<1>(work, 0);
        } else {
          finish_few<2>(work, rank);
        }
      } else if (p.shares == 1) {
        finish<1>(work, 0);
      } else {
        finish<2>(work, rank);
      }
    });
  }

  // The same of 16 tokens, of which two groups have eight each, and in the end each block.
  template <int SHARES>
  __device__ __forceinline__ void finish_few(const WideWork& work, int rank) {
    constexpr int FOUR = 128 * 16;
    const uint32_t thread = base + (warp * 32 + lane) * 16;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k != part) store_sums(thread + (R::KG + part) * R::STAGE + k * FOUR, acc + 4 * k);
    }
    meet(1, R::WORKERS);
    int own[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i] = part ? acc[4 + i] : acc[i];
    if (part < 2) {
#pragma unroll
      for (int k = 0; k < R::KG; ++k) {
        if (k != part) add_sums(own, thread + (R::KG + k) * R::STAGE + part * FOUR);
      }
    }
    if constexpr (SHARES > 1) {
      if (part < 2 && part != rank) store_counted(thread + R::SENT_AT, board.sent, rank ^ 1, own);
      if (part != rank) return;
      wait_in_cluster(board.sent, 0);
      add_sums(own, thread + R::SENT_AT);
    }
    if (part < 2) leave(own, work, 0, part * 8);
  }

  // Each group gets sums of its part of the tokens, of all groups with the same rows, then of both blocks.
  template <int SHARES>
  __device__ __forceinline__ void finish(const WideWork& work, int rank) {
    constexpr int N = R::OWN, LEFT = N / SHARES, FOUR = 128 * 16;  // bytes of four sums of all threads
    if (SHARES > 1) come_by_cluster();
    // A group that alone reads its stages need not wait for the others: it leaves its sums in one of them.
    const uint32_t thread = base + (warp * 32 + lane) * 16;
    const auto place = [&](int of, int by) {
      return R::OWN_STAGE ? thread + (R::KG + by) * R::STAGE + of * (N / 4) * FOUR
                       : thread + (of * R::KG + by) * (N / 4) * FOUR;
    };
    int own[N];
#pragma unroll
    for (int k = 0; k < R::KG; ++k) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        if (k != part) store_sums(place(k * R::RG + rows, part) + i / 4 * FOUR, acc + k * N + i);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) own[i] = k == 0 || k == part ? acc[k * N + i] : own[i];
    }
    meet(1, R::WORKERS);
#pragma unroll
    for (int k = 0; k < R::KG; ++k) {
      if (k == part) continue;
#pragma unroll
      for (int i = 0; i < N; i += 4) add_sums(own + i, place(group, k) + i / 4 * FOUR);
    }
    if constexpr (SHARES > 1) {
      int left[LEFT];
      const uint32_t at = thread + R::EXCHANGED + group * (LEFT / 4) * FOUR;
      wait_for_cluster();  // the other block is done with its operands, too
#pragma unroll
      for (int i = 0; i < LEFT; i += 4) {
        int away[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          away[j] = rank ? own[i + j] : own[LEFT + i + j], left[i + j] = rank ? own[LEFT + i + j] : own[i + j];
        }
        store_at(at + i / 4 * FOUR, rank ^ 1, away);
      }
      come_by_cluster(), wait_for_cluster();
#pragma unroll
      for (int i = 0; i < LEFT; i += 4) add_sums(left + i, at + i / 4 * FOUR);
      if (rows < work.panels) leave(left, work, rows, part * (T / R::KG) + rank * 2 * LEFT);
    } else {
      if (rows < work.panels) leave(own, work, rows, part * (T / R::KG));
    }
  }
};

#endif

template <class R>
__global__ void __launch_bounds__(R::BOUND, 1) linear_wide_kernel(const __grid_constant__ LinearTask p,
                                                                    const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ WideBoard<R> board;
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;  // the same in all blocks
  let_next_begin();
  // One that only takes its place, until the kernel before is done: where blocks of the next kernel, which are small, find
  // a multiprocessor empty, several stay together there, and the blocks after them wait until they are done.
  if (R::SUMS && static_cast<int>(blockIdx.x) >= p.whole_tiles * p.shares) return wait_for_last();
  const int rank = R::SUMS ? rank_in_cluster() : 0;
  if (threadIdx.x == 0) board.init(), fetch_map(&map);
  if (R::SENT && p.shares > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }
  if (warp_of_block() < R::WORKERS / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R::WORKER_REGISTERS));
    if constexpr (R::SUMS) {
      WideGroup<R>(p, board, base).run_shared(rank);
    } else {
      WideGroup<R>(p, board, base).run_alone();
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R::FEEDER_REGISTERS));
    const int warp = warp_of_block() - R::WORKERS / 32;
    if (warp == 0) WideFeeder<R>{p, map, board, base}.tokens(rank);
    if (warp == 1 || warp == 2) WideFeeder<R>{p, map, board, base}.codes(rank, warp - 1);
    if (warp == 3) {
      WideFeeder<R>{p, map, board, base}.show([&](int tile, int n) { return tile / p.token_tiles * R::ROWS + n; });
    }
  }
#endif
}

}  // namespace hfl
