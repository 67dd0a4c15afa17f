// What kernels of linear_wide.cuh have in shared memory, and the warps that copy it there.
#pragma once
#include "linear_cluster.cuh"
#include "linear_many_feed.cuh"

namespace hfl {

// SUMS: added up of several groups, and of the blocks of a cluster.
template <Form F_, int T_, int RG_, bool SUMS_>
struct WideRoom {
  static constexpr Form F = F_;
  static constexpr int T = T_, RG = RG_, S = T <= 64 && F != Form::BYTES ? 2 : 1;
  static constexpr bool SUMS = SUMS_;
  static constexpr int KG = 4 / RG, ROWS = 64 * RG;
  static constexpr int WORKERS = 512, FEEDERS = 128, THREADS = WORKERS + FEEDERS;
  // What registers are cut out for: of 64 tokens they leave room for a small block of the kernel before or after.
  static constexpr int BOUND = T <= 64 ? 896 : THREADS;
  static constexpr int WORKER_REGISTERS = T <= 64 ? 80 : 112, FEEDER_REGISTERS = T <= 64 ? 40 : 32;
  static constexpr int TOKENS = T * 128, CHUNKS = F == Form::BYTES ? 2 : 1;  // of 128 columns
  static constexpr int CODES = CHUNKS * CHUNK_BYTES, LEVELS = F == Form::GROUP ? 128 : F == Form::FINE ? 512 : 0;
  // So many times 64 columns are multiplied while the next are expanded. What is stored of those is read before that, too,
  // where there are registers for it; not where it is an operand itself, whose registers products read to their end.
  static constexpr int BATCH = T == 16 && S == 2 ? 2 : 1, BATCHES = 2 * S / BATCH;
  static constexpr bool READ_AHEAD = T == 16 && F != Form::BYTES;
  static constexpr int PANEL_BYTES = S * (CODES + LEVELS);
  static constexpr int STAGE = (S * TOKENS + RG * PANEL_BYTES + 1023) / 1024 * 1024;
  static constexpr int STAGES = RG == 1 ? 216 * 1024 / STAGE / KG * KG : 216 * 1024 / STAGE;
  // Sums of 16 tokens that the other block sends have room of their own, so that it need not wait until they may come.
  static constexpr int SENT_AT = STAGES * STAGE, SENT = SUMS && T == 16 ? 128 * 16 : 0;
  static constexpr int BYTES = SENT_AT + SENT + 1024;   // so that it can begin at a multiple of 1024
  static constexpr int OWN = T / 2 / KG;                // sums of a thread, of T / KG tokens
  // Where sums of the other block come, behind those of this one; or before, where a group leaves its own in a stage.
  static constexpr bool OWN_STAGE = RG == 1;
  static constexpr int EXCHANGED = OWN_STAGE ? 0 : 4 * KG * OWN * 512;
  // Codes are asked for before there are tokens, but no more at a time than keep the memory busy: else whoever makes the
  // tokens waits behind all of them.
  static constexpr bool EARLY = SUMS;
  static constexpr int UNDER_WAY = 72 * 1024 / (RG * PANEL_BYTES);  // stages
  static_assert(!SUMS || EXCHANGED + 4 * OWN * 256 <= STAGES * STAGE, "sums lie where operands were");
  static_assert(!OWN_STAGE || (STAGES % KG == 0 && STAGES >= 2 * KG && KG * OWN * 512 <= STAGE),
                "a group alone has two of the stages, and its sums have room in the second");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class R>
struct WideBoard {
  uint64_t full[R::STAGES], empty[R::STAGES], shown, sent;
  uint64_t first[R::EARLY ? R::STAGES : 1];  // tokens of the first stages, of which `full` says that codes are there
  // Of the tokens; less: what sums are too large by, or the float of a sum of values.
  float scale[R::T];
  int less[R::T];
  OfRow rows[4 * 64];
  __device__ void init() {
    for (int s = 0; s < R::STAGES; ++s) barrier_init(full[s], 3), barrier_init(empty[s], 4 * R::RG);
    for (int s = 0; R::EARLY && s < R::STAGES; ++s) barrier_init(first[s], 1);
    barrier_init(shown, 1);
    if (R::SENT) barrier_init(sent, 1), barrier_expect(sent, R::SENT);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// Up to RG panels of rows, the tokens, and the steps that a block multiplies.
struct WideWork {
  int panel, panels, token, first, last;
};

// What a block computes, one after the other: a share of a tile, or its part of all panels of some tokens.
template <class R, class Do>
__device__ __forceinline__ void each_wide(const LinearTask& p, int rank, Do&& run) {
  if constexpr (R::SUMS) {
    const int tile = static_cast<int>(blockIdx.x) / p.shares, row_tile = tile / p.token_tiles;
    const int stages = (p.steps + R::S - 1) / R::S, panel = row_tile * R::RG;
    run(WideWork{panel, min(R::RG, p.panels - panel), (tile - row_tile * p.token_tiles) * R::T,
                 stages * rank / p.shares * R::S, min(stages * (rank + 1) / p.shares * R::S, p.steps)});
  } else {
    const int block = static_cast<int>(blockIdx.x), apart = static_cast<int>(gridDim.x) / p.token_tiles;
    const int of_rows = block / p.token_tiles, last = p.panels * (of_rows + 1) / apart;
#pragma unroll 1
    for (int panel = p.panels * of_rows / apart; panel < last; panel += R::RG) {
      run(WideWork{panel, min(R::RG, last - panel), (block - of_rows * p.token_tiles) * R::T, 0, p.steps});
    }
  }
}

template <class R>
struct WideFeeder {
  const LinearTask& p;
  const CUtensorMap& map;
  WideBoard<R>& board;
  uint32_t base;

  // Of a run, the stage at hand.
  __device__ __forceinline__ int steps_of(const WideWork& work, int i) const {
    return min(R::S, work.last - work.first - i * R::S);
  }
  __device__ __forceinline__ void put_tokens(uint64_t& bar, int stage, int count, int column, int token) const {
#pragma unroll
    for (int s = 0; s < R::S; ++s) {
      if (s < count) copy_tokens(base + stage * R::STAGE + s * R::TOKENS, &map, bar, column + s * 128, token);
    }
  }

  // Where a block has one tile, all that there is to know of its first stages is known, and said, before there are tokens.
  __device__ __forceinline__ void tokens(int rank) {
    ManyRing<R> ring;
    if (!R::SUMS) wait_for_last();
    each_wide<R>(p, rank, [&](const WideWork& work) {
      const int token = p.tokens_from + work.token, stages = (work.last - work.first + R::S - 1) / R::S;
      int i = 0;
      if constexpr (R::SUMS) {
        const int early = min(stages, R::STAGES);
        const bool one = elected();
#pragma unroll 1
        for (; i < early; ++i) {
          if (one) barrier_arrive(board.full[i]), barrier_expect(board.first[i], steps_of(work, i) * p.box * 128);
        }
        wait_for_last();
#pragma unroll 1
        for (i = 0; i < early; ++i) {
          if (one) put_tokens(board.first[i], i, steps_of(work, i), (work.first + i * R::S) * 128, token);
        }
        if (early == R::STAGES) ring.turn = 1;
      }
#pragma unroll 1
      for (; i < stages; ++i, ring.next()) {
        const int count = steps_of(work, i);
        barrier_wait(board.empty[ring.stage], ring.turn ^ 1);
        if (elected()) {
          barrier_expect(board.full[ring.stage], count * p.box * 128);
          put_tokens(board.full[ring.stage], ring.stage, count, (work.first + i * R::S) * 128, token);
        }
      }
    });
  }

  // What belongs to tokens, and to the rows of a tile that is shared, so that who multiplies waits for operands alone.
  template <class Row>
  __device__ __forceinline__ void show(Row&& row, bool shared = R::SUMS) {
    int lane, block;  // not what others have computed before: it would stay in their registers
    asm volatile("mov.u32 %0, %%laneid;\nmov.u32 %1, %%ctaid.x;" : "=r"(lane), "=r"(block));
    const int tile = block / (R::SUMS ? p.shares : 1);
    const int token = tile % p.token_tiles * R::T;
    if (shared) {
#pragma unroll
      for (int n = lane; n < R::ROWS; n += 32) {
        const int at = min(row(tile, n), p.a.rows - 1);
        board.rows[n] = {p.a.scale[at], p.a.shift ? p.a.shift[at] : 0.0f, 0.0f};
      }
    }
    wait_for_last();
#pragma unroll 1
    for (int m = lane; m < R::T; m += 32) {
      const OfToken of = token_of(p, token + m);
      board.scale[m] = of.scale, board.less[m] = R::F == Form::CHANNEL ? __float_as_int(of.sum) : of.bias;
    }
    if (shared && p.a.bias) {  // which a kernel before may have made
#pragma unroll 2
      for (int n = lane; n < R::ROWS; n += 32) board.rows[n].bias = p.a.bias[min(row(tile, n), p.a.rows - 1)];
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(board.shown);
  }

  // The next stage is free, and of the first ones, no more are under way than may be.
  __device__ __forceinline__ static void wait_for_room(WideBoard<R>& board, const ManyRing<R>& ring) {
    barrier_wait(board.empty[ring.stage], ring.turn ^ 1);
    if (R::EARLY && !ring.turn && ring.stage >= R::UNDER_WAY) barrier_wait(board.full[ring.stage - R::UNDER_WAY], 0);
  }

  // Every other panel.
  __device__ __forceinline__ void codes(int rank, int which) {
    constexpr int OWN = (R::RG + 1) / 2;
    ManyRing<R> ring;
    const int of_levels = R::LEVELS ? p.groups * 2 * PANEL : 0;
    each_wide<R>(p, rank, [&](const WideWork& work) {
      const int own = (max(0, work.panels - which) + 1) / 2;
      const int64_t apart = p.steps, run = (work.panel + which) * apart + work.first;
      const uint8_t *codes = p.a.codes + run * R::CODES, *levels = p.a.groups + run * of_levels;
#pragma unroll 1
      for (int step = work.first; step < work.last; step += R::S, ring.next()) {
        const int count = min(R::S, work.last - step);
        wait_for_room(board, ring);
        const uint32_t to = base + ring.stage * R::STAGE + R::S * R::TOKENS + which * R::PANEL_BYTES;
        if (elected()) {
          barrier_expect(board.full[ring.stage], own * count * (R::CODES + of_levels));
#pragma unroll
          for (int i = 0; i < OWN; ++i) {
            if (i >= own) break;
            copy_once(to + 2 * i * R::PANEL_BYTES, codes + 2 * i * apart * R::CODES, count * R::CODES,
                       board.full[ring.stage]);
            if constexpr (R::LEVELS != 0) {
              copy_once(to + 2 * i * R::PANEL_BYTES + R::S * R::CODES, levels + 2 * i * apart * of_levels,
                         count * of_levels, board.full[ring.stage]);
            }
          }
        }
        codes += R::S * R::CODES, levels += R::S * of_levels;
      }
    });
  }
};

#endif

}  // namespace hfl
