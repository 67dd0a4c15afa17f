// How groups of warps of linear_wide.cuh multiply what is in shared memory.
#pragma once
#include "linear_wide_feed.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Operands of a group, and their sums.
template <class R>
struct WideProducts {
  static constexpr Form F = R::F;
  static constexpr int T = R::T;

  // What is stored of a batch: 64 columns of it a time.
  struct Stored {
    uint4 codes[R::BATCH * R::CHUNKS];
    uint32_t level[F == Form::FINE ? 2 * R::BATCH : 1];
  };

  const LinearTask& p;
  WideBoard<R>& board;
  uint32_t base;
  int group, rows, part, warp, lane;  // rows, part: what the group has of rows and of stages
  int stage, turn = 0, before = -1;   // before: the stage whose products may be under way, or -1
  int acc[T / 2];
  Stored next;

  __device__ WideProducts(const LinearTask& p_, WideBoard<R>& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), warp(static_cast<int>(threadIdx.x) / 32 % 4),
        lane(static_cast<int>(threadIdx.x) % 32) {
    group = warp_of_block() / 4;
    rows = group % R::RG, part = group / R::RG;
    stage = part;
  }

  __device__ __forceinline__ void skip() {
    stage += R::KG;
    if (stage >= R::STAGES) stage -= R::STAGES, turn ^= 1;
  }

  // Until operands of the stage at hand are there.
  __device__ __forceinline__ void wait() {
    barrier_wait(board.full[stage], turn);
    if (R::EARLY && !turn) barrier_wait(board.first[stage], 0);
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane == 0) barrier_arrive(board.empty[before]);
  }

  // Of batch b of the stage at hand, asked for before it is needed.
  __device__ __forceinline__ void read(int b) {
    const int step = b * R::BATCH / 2;
    const uint32_t panel = base + stage * R::STAGE + R::S * R::TOKENS + rows * R::PANEL_BYTES;
    const uint32_t at = panel + step * R::CODES + warp * 1024 + lane * 16;
    const uint32_t levels = panel + R::S * R::CODES + step * (p.groups * 2 * PANEL) + warp * 32 + lane / 4 * 4;
#pragma unroll
    for (int h = 0; h < R::BATCH; ++h) {
      const int half = (b * R::BATCH + h) % 2;
      if constexpr (F == Form::BYTES) {
        next.codes[2 * h] = load_shared(at + half * CHUNK_BYTES);
        next.codes[2 * h + 1] = load_shared(at + half * CHUNK_BYTES + 512);
      } else {
        next.codes[h] = load_shared(at + half * 512);
      }
      if constexpr (F == Form::FINE) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          next.level[2 * h + i] = load_word(levels + (2 * half + i) * p.groups / 4 * (2 * PANEL));
        }
      }
    }
    if (F == Form::GROUP && b * R::BATCH % 2 == 0) next.level[0] = load_word(levels);
  }

  // Operand a of 64 columns.
  __device__ __forceinline__ void expand_half(uint32_t* a, int h) const {
    const uint4 x = next.codes[h * R::CHUNKS];
    if constexpr (F == Form::BYTES) {
      const uint4 y = next.codes[2 * h + 1];
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w, a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
    } else if constexpr (F == Form::CHANNEL) {
      expand(a, x.x, x.y), expand(a + 4, x.z, x.w);
    } else {
      expand(a, x.x, x.y, Levels(next.level[F == Form::FINE ? 2 * h : 0]));
      expand(a + 4, x.z, x.w, Levels(next.level[F == Form::FINE ? 2 * h + 1 : 0]));
    }
  }

  // Of the stage at hand so many times 128 columns; goes on to the next, and asks for what is there of it. Of two
  // batches one is expanded while the other is multiplied.
  __device__ __forceinline__ void multiply_stage(int count, bool more) {
    uint32_t a[2][8 * R::BATCH];
    const int own = stage, batches = count * 2 / R::BATCH;
#pragma unroll
    for (int b = 0; b < R::BATCHES; ++b) {
      if (b * R::BATCH % 2 == 0 && b && b >= batches) {
        if (R::BATCH == 2) wgmma_wait<0>();  // the next batch has the same registers
        break;
      }
      if (!R::READ_AHEAD) {
        if (b == 0) wait();
        read(b);
      }
      const uint64_t tokens = matrix(base + own * R::STAGE + b * R::BATCH / 2 * R::TOKENS);
#pragma unroll
      for (int h = 0; h < R::BATCH; ++h) expand_half(a[b % 2] + 8 * h, h);
      in_flight(a[b % 2]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2 * R::BATCH; ++i) {
        product_u8(acc, a[b % 2] + 4 * i, tokens + 2 * (b * R::BATCH % 2 * 2 + i), 1);
      }
      wgmma_commit();
      if (R::READ_AHEAD) {
        if (b + 1 < batches) {
          read(b + 1);
        } else {
          skip();
          if (more) wait(), read(0);
        }
      }
      wgmma_wait<1>();
      if (b == 0 && before >= 0) release();
    }
    before = own;
    if (!R::READ_AHEAD) skip();
  }

  // All of this group's stages of a run.
  __device__ __forceinline__ void multiply(const WideWork& work) {
    const int count = work.last - work.first;
#pragma unroll
    for (int i = 0; i < T / 2; ++i) acc[i] = 0;
    in_flight(acc);
    const int stages = (count + R::S - 1) / R::S;
    before = -1;
    if (rows >= work.panels) {
#pragma unroll 1
      for (int i = part; i < stages; i += R::KG) wait(), before = stage, release(), skip();
      before = -1;
      return;
    }
    if (R::READ_AHEAD && part < stages) wait(), read(0);
#pragma unroll 1
    for (int i = part; i < stages; i += R::KG) multiply_stage(min(R::S, count - i * R::S), i + R::KG < stages);
    complete();
  }

  // Until no products are under way.
  __device__ __forceinline__ void complete() {
    wgmma_wait<0>();
    in_flight(acc);
    if (before >= 0) release();
  }
};

#endif

}  // namespace hfl
