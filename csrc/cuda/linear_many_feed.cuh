// What kernels of linear_many.cuh have in shared memory, and the warps that copy it there.
#pragma once
#include "linear.cuh"
#include "linear_products.cuh"

namespace hfl {

// SPREAD: a tile for every block (linear_spread.cuh).
template <Form F_, int T_, bool SPREAD = false>
struct ManyRoom {
  static constexpr Form F = F_;
  static constexpr int T = T_;
  static constexpr int WORKERS = 256, FEEDERS = SPREAD ? 64 : 128, THREADS = WORKERS + FEEDERS;
  static constexpr int LISTS = SPREAD ? 1 : 2;  // of tokens
  static constexpr int TOKENS = T * 128, CHUNKS = F == Form::BYTES ? 2 : 1;
  static constexpr int CODES = CHUNKS * CHUNK_BYTES;  // of a panel
  static constexpr int LEVELS = F == Form::GROUP || F == Form::FINE ? 512 : 0;
  static constexpr int STAGE = TOKENS + 2 * CODES + 2 * LEVELS;  // a multiple of 1024
  static constexpr int STAGES = 220 * 1024 / STAGE;
  static constexpr int BYTES = STAGES * STAGE + 1024;  // so that it can begin at a multiple of 1024
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The same in all threads of a warp, which the compiler cannot know of threadIdx.
__device__ __forceinline__ int warp_of_block() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
}

// A run of steps of one tile.
struct ManyWork {
  int row_tile, token_tile, first, last;
  int split;  // the tile's number among those that are split, or -1
  __device__ ManyWork(const LinearTask& p, int tile, int first_, int last_, int split_)
      : first(first_), last(last_), split(split_) {
    constexpr int BAND = 8;  // token tiles side by side, so that what is read at a time fits into the L2 cache
    const int band = tile / (BAND * p.row_tiles), within = tile - band * BAND * p.row_tiles;
    const int width = min(BAND, p.token_tiles - band * BAND);
    row_tile = within / width, token_tile = band * BAND + within % width;
  }
};

// Every run of this block, in its order.
template <class Do>
__device__ __forceinline__ void each_work(const LinearTask& p, Do&& run) {
  const Share share(p);
  int at = share.first, whole = static_cast<int>(blockIdx.x);
#pragma unroll 1
  while (at < share.last || whole < p.whole_tiles) {
    int tile = p.split_tiles + whole, first = 0, last = p.steps, split = -1;
    if (at < share.last) {
      split = tile = at / p.steps;
      first = at - tile * p.steps, last = min(p.steps, first + share.last - at);
      at += last - first;
    } else {
      whole += static_cast<int>(gridDim.x);
    }
    run(ManyWork(p, tile, first, last, split));
  }
}

template <class R>
struct ManyBoard {
  uint64_t full[R::STAGES], empty[R::STAGES];
  uint32_t said;
  OfToken tokens[R::LISTS][R::T];  // of the tile that each group is at
  __device__ void init() {
    for (int s = 0; s < R::STAGES; ++s) barrier_init(full[s], 2), barrier_init(empty[s], 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// The next stage, and how often all have been gone through, modulo 2.
template <class R>
struct ManyRing {
  int stage = 0, turn = 0;
  __device__ __forceinline__ void next() {
    if (++stage == R::STAGES) stage = 0, turn ^= 1;
  }
};

// A warp that copies codes, which need not wait for what comes before this kernel, or tokens, or both. All of it goes
// through the steps, so that addresses are in registers of the warp, which copies take; one thread copies.
template <class R>
struct ManyFeeder {
  const LinearTask& p;
  const CUtensorMap& map;
  ManyBoard<R>& board;
  uint32_t base;
  ManyRing<R> ring;
  const uint8_t *codes[2], *levels[2];  // of the next step, of both panels
  int column, token;

  __device__ ManyFeeder(const LinearTask& p_, const CUtensorMap& map_, ManyBoard<R>& board_, uint32_t base_)
      : p(p_), map(map_), board(board_), base(base_) {}

  __device__ void run(bool of_tokens) {
    if (of_tokens) wait_for_last();
    each_work(p, [&](const ManyWork& work) {
      seek(work);
      for (int step = work.first; step < work.last; ++step, ring.next()) {
        barrier_wait(board.empty[ring.stage], ring.turn ^ 1);
        if (of_tokens) {
          put_tokens(ring.stage);
        } else {
          put_codes(ring.stage);
        }
      }
    });
  }

  // One run alone: codes of as many stages as there are, before their tokens.
  __device__ void run_one(const ManyWork& work) {
    const int early = min(work.last - work.first, R::STAGES);
    seek(work);
    for (int i = 0; i < early; ++i) put_codes(i);
    wait_for_last();
    for (int i = 0; i < early; ++i) put_tokens(i);
#pragma unroll 1
    for (int step = work.first + early; step < work.last; ++step, ring.next()) {
      barrier_wait(board.empty[ring.stage], ring.turn);
      put_codes(ring.stage);
      put_tokens(ring.stage);
    }
  }

 private:
  __device__ __forceinline__ int level_bytes() const { return p.groups * 2 * PANEL; }  // of a panel

  __device__ __forceinline__ void seek(const ManyWork& work) {
    column = work.first * 128, token = p.tokens_from + work.token_tile * R::T;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int panel = min(2 * work.row_tile + half, p.panels - 1);  // of two alike, the second is not used
      const int64_t run = static_cast<int64_t>(panel) * p.steps + work.first;
      codes[half] = p.a.codes + run * R::CODES, levels[half] = p.a.groups + run * level_bytes();
    }
  }
  __device__ __forceinline__ void put_tokens(int stage) {
    if (elected()) {
      barrier_expect(board.full[stage], R::TOKENS);
      copy_tokens(base + stage * R::STAGE, &map, board.full[stage], column, token);
    }
    column += 128;
  }
  __device__ __forceinline__ void put_codes(int stage) {
    const int of_levels = R::LEVELS ? level_bytes() : 0;
    const uint32_t to = base + stage * R::STAGE + R::TOKENS;
    if (elected()) {
      barrier_expect(board.full[stage], 2 * R::CODES + 2 * of_levels);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_bytes(to + half * R::CODES, codes[half], R::CODES, board.full[stage]);
        if constexpr (R::LEVELS) {
          copy_bytes(to + 2 * R::CODES + half * R::LEVELS, levels[half], of_levels, board.full[stage]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) codes[half] += R::CODES, levels[half] += of_levels;
  }
};

#endif

}  // namespace hfl
