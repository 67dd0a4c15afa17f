// w4a8_linear of many tokens for sm_90a: wgmma, whose operand a is made of codes in registers. linear.cu says what it
// computes.
//
// Grid: a block for each multiprocessor, of 384 threads, which computes one tile of 128 rows and T tokens after the
//   other; before those, its share of tiles that are split along K, whose sums are added in memory, exactly.
// Two groups of four warps have 64 rows each: they make the operand of the next 128 columns (one mask, and one
//   multiplication where there are groups, for four codes) while the tensor cores multiply those before. Of a third
//   group two warps copy: one tokens, by a tensor map, the other codes and scales, as they lie.
// Shared memory: STAGES times tokens, codes and scales of 128 columns, up to 217 KiB. A stage changes hands by barriers:
//   one counts bytes that came, one the warps that have read. Of a warp one thread arrives, once all have met and the
//   products are made, which a checker of races does not follow: it reports that copies overwrite what was read before.
// In code for other architectures the kernel is empty, which shows as one without static shared memory.
#pragma once
#include "linear_many_feed.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A group that multiplies.
template <class R>
struct ManyGroup {
  static constexpr Form F = R::F;
  static constexpr bool S = F == Form::CHANNEL;
  static constexpr int T = R::T;
  const LinearTask& p;
  ManyBoard<R>& board;
  uint32_t base;
  int group, warp, lane;
  ManyRing<R> ring;
  int before;  // the stage whose products are under way
  int acc[T / 2];

  __device__ ManyGroup(const LinearTask& p_, ManyBoard<R>& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32), before(0) {
    group = warp_of_block() / 4;
  }

  __device__ void run() {
    wait_for_last();
    each_work(p, [&](const ManyWork& work) { compute(work); });
    finish();
  }

  __device__ __forceinline__ void multiply(int count) {
    step(true);
    int i = 1;
#pragma unroll 1
    for (; i + 2 <= count; i += 2) step(false), step(false);
    if (i < count) step(false);
    finish_products();
  }

  // Results of a whole tile, of 16 rows from n on: of four threads each has two rows of four 8x8 parts, and writes all
  // eight of one.
  __device__ __forceinline__ void leave(const OfRow (&rows)[2], const OfToken* of, int n, int first_token) {
    const OfToken* tokens = of + lane % 4 * 2;
    const int part = lane % 4, own = n + part % 2 * 8;
    const bool whole = p.a.rows % 8 == 0;
#pragma unroll
    for (int q = 0; q < T / 8; q += 2) {
      uint32_t two[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int* x = acc + 4 * (q + i);
        const OfToken low = tokens[(q + i) * 8], high = tokens[(q + i) * 8 + 1];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          two[2 * i + h] =
              transpose(pack_results(p, result<S>(x[2 * h], low, rows[h]), result<S>(x[2 * h + 1], high, rows[h])));
        }
      }
      const uint4 eight = together(two, lane);
      const int m = first_token + (q + part / 2) * 8 + lane / 4;
      if (m >= p.tokens || own >= p.a.rows) continue;
      if (whole) {
        *reinterpret_cast<uint4*>(place_of(p, m, own)) = eight;
      } else {
        const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
        store_results(p, m, own, pairs, 8);
      }
    }
  }

 private:
  // A run of steps of a tile: its results, or what it adds to the tile's sums.
  __device__ __forceinline__ void compute(const ManyWork& work) {
    const int row = work.row_tile * TILE_ROWS + group * 64 + warp * 16, token = work.token_tile * T;
    const OfRow rows[2] = {row_of(p, row + lane / 4), row_of(p, row + lane / 4 + 8)};
    OfToken tokens[(T + 127) / 128];  // on their way while products are made
#pragma unroll
    for (int i = 0; i < (T + 127) / 128; ++i) tokens[i] = token_of(p, token + i * 128 + warp * 32 + lane);
    multiply(work.last - work.first);
    meet(2 + group, 128);  // nobody needs those of the tile before any more
#pragma unroll
    for (int i = 0; i < (T + 127) / 128; ++i) {
      const int m = i * 128 + warp * 32 + lane;
      if (T % 128 == 0 || m < T) board.tokens[group][m] = tokens[i];
    }
    meet(2 + group, 128);
    if (work.split < 0) {
      leave(rows, board.tokens[group], row, token);
    } else {
      add(work, token);
    }
  }

  // Operand a of the 128 columns of a stage.
  __device__ __forceinline__ void codes(uint32_t (&a)[16], int stage) const {
    const uint32_t part = base + stage * R::STAGE + R::TOKENS;
    const uint32_t at = part + group * R::CODES + warp * 1024 + lane * 16;
    const uint32_t levels = part + 2 * R::CODES + group * R::LEVELS + warp * 32 + lane / 4 * 4;
    if constexpr (F == Form::BYTES) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint4 x = load_shared(at + s / 2 * CHUNK_BYTES + s % 2 * 512);
        a[4 * s] = x.x, a[4 * s + 1] = x.y, a[4 * s + 2] = x.z, a[4 * s + 3] = x.w;
      }
      return;
    }
    const uint4 x = load_shared(at), y = load_shared(at + 512);
    if constexpr (F == Form::CHANNEL) {
      expand(a, x.x, x.y), expand(a + 4, x.z, x.w), expand(a + 8, y.x, y.y), expand(a + 12, y.z, y.w);
    } else if constexpr (F == Form::GROUP) {
      const Levels by(load_word(levels));
      expand(a, x.x, x.y, by), expand(a + 4, x.z, x.w, by), expand(a + 8, y.x, y.y, by), expand(a + 12, y.z, y.w, by);
    } else if constexpr (F == Form::FINE) {
      expand(a, x.x, x.y, Levels(load_word(levels)));
      expand(a + 4, x.z, x.w, Levels(load_word(levels + p.groups / 4 * 2 * PANEL)));
      expand(a + 8, y.x, y.y, Levels(load_word(levels + p.groups / 2 * 2 * PANEL)));
      expand(a + 12, y.z, y.w, Levels(load_word(levels + 3 * p.groups / 4 * 2 * PANEL)));
    }
  }

  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(board.empty[stage]);
  }

  // 128 columns more; those before are done after it.
  __device__ __forceinline__ void step(bool first) {
    uint32_t a[16];
    barrier_wait(board.full[ring.stage], ring.turn);
    codes(a, ring.stage);
    const uint64_t b = matrix(base + ring.stage * R::STAGE);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) product_u8(acc, a + 4 * s, b + 2 * s, s || !first);
    wgmma_commit();
    wgmma_wait<1>();
    if (!first) release(before);
    before = ring.stage;
    ring.next();
  }

  __device__ __forceinline__ void finish_products() {
    wgmma_wait<0>();
    in_flight(acc);
    release(before);
  }

  // Add the sums to the tile's.
  __device__ __forceinline__ void add(const ManyWork& work, int first_token) {
    if (2 * work.row_tile + group >= p.panels) return;
    int* to = p.partial + static_cast<int64_t>(work.split) * (T * TILE_ROWS) + group * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < T / 2; ++i) {
      const int m = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (first_token + m < p.tokens) add_partial(to + m * TILE_ROWS + i % 4 / 2 * 8, acc[i]);
    }
  }

  // Results of those tiles whose last sums this block has added; in the end, when most have been.
  __device__ __forceinline__ void finish() {
    constexpr int THREADS = R::WORKERS;
    const Share share(p);
    const int thread = static_cast<int>(threadIdx.x);
    for (int tile = share.first / p.steps; tile * p.steps < share.last; tile += 32) {
      meet(1, THREADS);
      if (thread < 32) {
        const uint32_t complete = complete_tiles(p, share, tile, lane);
        if (lane == 0) board.said = complete;
      }
      meet(1, THREADS);
      for (uint32_t complete = board.said; complete; complete &= complete - 1) {
        const int done = tile + __ffs(static_cast<int>(complete)) - 1;
        const ManyWork work(p, done, 0, 0, done);
        int* partial = p.partial + static_cast<int64_t>(done) * (T * TILE_ROWS);
        finish_tile<THREADS, 8>(p, partial, work.row_tile * TILE_ROWS, work.token_tile * T, T, thread);
      }
    }
  }
};

#endif

template <class R>
__global__ void __launch_bounds__(R::THREADS, 1) linear_many_kernel(const __grid_constant__ LinearTask p,
                                                                    const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ ManyBoard<R> board;
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  let_next_begin();
  if (threadIdx.x == 0) board.init(), fetch_map(&map);
  __syncthreads();
  if (warp_of_block() < R::WORKERS / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    ManyGroup<R>(p, board, base).run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int warp = warp_of_block() - R::WORKERS / 32;
    if (warp < 2) ManyFeeder<R>(p, map, board, base).run(warp == 1);
  }
#endif
}

}  // namespace hfl
