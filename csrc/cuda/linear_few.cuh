// w4a8_linear of 17 to 64 tokens: weights go once from memory to the tensor cores. linear.cu says what it computes.
//
// Work: tiles of 128 rows, in steps of two chunks of columns, of which every block has equally many in a row; sums of a
//   tile that is shared are added in memory, exactly, and who adds last computes the results.
// Block: a warp has 64 rows and one of the two chunks, whose codes it copies itself, some steps ahead; tokens are copied
//   by all. Two blocks fit on a multiprocessor, so that the next kernel's codes come while this one ends.
// Products: mma.m16n8k32, codes as operand a, which one mask takes out of 16 stored bytes.
// Shared memory: STAGES times codes, scales and tokens of a step, up to 110 KiB.
#pragma once
#include "linear.cuh"

namespace hfl {

template <Form F, int MT>
struct FewRoom {
  static constexpr int TILES = 4;  // of 16 rows, of a warp
  static constexpr int WARPS = 16 / TILES, THREADS = WARPS * 32;
  static constexpr int CHUNK = F == Form::BYTES ? 64 : 128;  // columns
  static constexpr int LINE = 2 * CHUNK;                     // bytes of a token
  static constexpr int CODES = 4 * CHUNK_BYTES;
  static constexpr int LEVELS = F == Form::GROUP ? 512 : F == Form::FINE ? 2048 : 0;
  static constexpr int STAGE = CODES + LEVELS + 8 * MT * LINE;
  static constexpr int STAGES = 110 * 1024 / STAGE < 6 ? 110 * 1024 / STAGE : 6;
  static constexpr int BYTES = STAGES * STAGE;
};

template <Form F, int MT>
struct FewBlock {
  using R = FewRoom<F, MT>;
  const LinearTask& p;
  uint32_t base;
  int warp, lane, rows, slot;  // rows: number of this warp's run of TILES tiles
  int acc[R::TILES][MT][4];

  __device__ FewBlock(const LinearTask& p_, uint32_t base_)
      : p(p_), base(base_), warp(static_cast<int>(threadIdx.x) / 32), lane(static_cast<int>(threadIdx.x) % 32),
        rows(warp / 2), slot(warp % 2) {
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < R::TILES; ++i) {
#pragma unroll
      for (int m = 0; m < MT; ++m) acc[i][m][0] = acc[i][m][1] = acc[i][m][2] = acc[i][m][3] = 0;
    }
  }

  __device__ __forceinline__ int panel_of(int tile) const { return 2 * tile + rows * R::TILES / 4; }
  __device__ __forceinline__ uint32_t codes_at(int stage) const {
    return base + stage * R::STAGE + warp * R::TILES * 1024;
  }
  __device__ __forceinline__ uint32_t levels_at(int stage) const {
    return base + stage * R::STAGE + R::CODES + warp * (R::LEVELS / R::WARPS);
  }
  __device__ __forceinline__ uint32_t tokens_at(int stage) const {
    return base + stage * R::STAGE + R::CODES + R::LEVELS;
  }

  // The codes of this warp.
  __device__ __forceinline__ void copy_codes(int stage, int tile, int step) {
    const int chunk = 2 * step + slot, panel = panel_of(tile), part = rows * R::TILES % 4;
    const bool there = chunk < p.chunks && panel < p.panels;
    const int64_t run = there ? static_cast<int64_t>(panel) * p.chunks + chunk : 0;
    const uint8_t* from = p.a.codes + run * CHUNK_BYTES + part * 1024 + lane * 16;
    const uint32_t to = codes_at(stage) + lane * 16;
#pragma unroll
    for (int i = 0; i < 2 * R::TILES; ++i) copy_async(to + i * 512, from + i * 512, there);
    if constexpr (F == Form::GROUP || F == Form::FINE) {
      constexpr int PIECES = 2 * R::TILES;  // of 16 bytes
      if (lane < PIECES * p.groups) {
        const uint8_t* levels = p.a.groups + (run * p.groups + lane / PIECES) * (2 * PANEL) + part * 32;
        copy_async(levels_at(stage) + lane * 16, levels + lane % PIECES * 16, there);
      }
    }
  }

  // This thread's part of the tokens.
  __device__ __forceinline__ void copy_tokens(int stage, int step) {
    constexpr int PIECES = R::LINE / 16, ALL = 8 * MT * PIECES, EACH = (ALL + R::THREADS - 1) / R::THREADS;
    const int8_t* from = p.a.values + static_cast<int64_t>(p.tokens_from) * p.a.columns;
    const uint32_t to = tokens_at(stage);
#pragma unroll(EACH < 4 ? EACH : 2)
    for (int j = 0; j < EACH; ++j) {
      const int i = static_cast<int>(threadIdx.x) + j * R::THREADS;
      if (ALL % R::THREADS && i >= ALL) break;
      const int m = i / PIECES, piece = i % PIECES, column = step * R::LINE + piece * 16;
      const bool there = m < p.tokens && column < p.a.columns;
      const int64_t at = there ? static_cast<int64_t>(m) * p.a.columns + column : 0;
      copy_async(to + m * R::LINE + (piece ^ m % 8) * 16, from + at, there);
    }
  }

  // 64 columns of the chunk, from `column` on: two registers for each of 32, of token tile m.
  __device__ __forceinline__ void tokens(uint32_t (&b)[4], int stage, int m, int column) const {
    const int row = lane % 8, piece = (slot * R::CHUNK + column) / 16 + lane / 8;
    load_matrices(b, tokens_at(stage) + (m * 8 + row) * R::LINE + (piece ^ row) * 16);
  }

  __device__ __forceinline__ Levels levels(int stage, int i, int quarter) const {
    const int group = F == Form::FINE ? quarter * p.groups / 4 : 0;
    return Levels(load_word(levels_at(stage) + (group * R::TILES + i) * 32 + lane / 4 * 4));
  }

  // Operand a of 64 columns: block `half` of the chunk.
  __device__ __forceinline__ void codes(uint32_t (&a)[8], int stage, int i, int half) const {
    const uint32_t at = codes_at(stage) + i * 1024 + lane * 16;
    if constexpr (F == Form::BYTES) {
      const uint4 x = load_shared(at), y = load_shared(at + 512);
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w, a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
    } else {
      const uint4 x = load_shared(at + half * 512);
      if constexpr (F == Form::CHANNEL) {
        expand(a, x.x, x.y), expand(a + 4, x.z, x.w);
      } else {
        const Levels first = levels(stage, i, 2 * half);
        expand(a, x.x, x.y, first);
        expand(a + 4, x.z, x.w, F == Form::FINE ? levels(stage, i, 2 * half + 1) : first);
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
#pragma unroll
    for (int half = 0; half < R::CHUNK / 64; ++half) {
      uint32_t a[R::TILES][8];
#pragma unroll
      for (int i = 0; i < R::TILES; ++i) codes(a[i], stage, i, half);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t b[4];
        tokens(b, stage, m, half * 64);
#pragma unroll
        for (int i = 0; i < R::TILES; ++i) mma_u8(acc[i][m], a[i], b[0], b[1]);
#pragma unroll
        for (int i = 0; i < R::TILES; ++i) mma_u8(acc[i][m], a[i] + 4, b[2], b[3]);
      }
    }
  }

  // Add the sums to the tile's.
  __device__ __forceinline__ void leave(int tile) {
    int* partial = p.partial + static_cast<int64_t>(tile) * (8 * MT * TILE_ROWS);
    if (panel_of(tile) < p.panels) {
#pragma unroll
      for (int i = 0; i < R::TILES; ++i) {
        const int n = (rows * R::TILES + i) * 16 + lane / 4;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int token = m * 8 + lane % 4 * 2 + r % 2;
            if (token < p.tokens) add_partial(partial + token * TILE_ROWS + n + r / 2 * 8, acc[i][m][r]);
          }
        }
      }
    }
    clear();
  }

  // Results of those tiles whose last sums this block has added.
  __device__ __forceinline__ void finish(const Share& share, uint32_t* shared) {
    constexpr int EACH = 8 * MT * TILE_ROWS / 4 / R::THREADS;
    for (int tile = share.first / p.steps; tile * p.steps < share.last; tile += 32) {
      __syncthreads();
      if (warp == 0) {
        const uint32_t complete = complete_tiles(p, share, tile, lane);
        if (lane == 0) *shared = complete;
      }
      __syncthreads();
      for (uint32_t complete = *shared; complete; complete &= complete - 1) {
        const int done = tile + __ffs(static_cast<int>(complete)) - 1;
        int* partial = p.partial + static_cast<int64_t>(done) * (8 * MT * TILE_ROWS);
        finish_tile<R::THREADS, (EACH < 8 ? EACH : 8)>(p, partial, done * TILE_ROWS, 0, 8 * MT,
                                                       static_cast<int>(threadIdx.x));
      }
    }
  }
};

template <Form F, int MT>
__global__ void __launch_bounds__(FewRoom<F, MT>::THREADS, 2) linear_few_kernel(const __grid_constant__ LinearTask p) {
  using R = FewRoom<F, MT>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint32_t said;
  let_next_begin();
  FewBlock<F, MT> block(p, shared_address(shared));
  const Share share(p);
  const int first = share.first, last = share.last;
  int tile = first / p.steps, step = first % p.steps;
  const int began_step = step;
#pragma unroll 1
  for (int i = 0; i < R::STAGES - 1; ++i) {  // codes need not wait for the tokens
    if (first + i < last) {
      block.copy_codes(i, tile, step);
      if (++step == p.steps) step = 0, ++tile;
    }
  }
  copy_commit();
  wait_for_last();
#pragma unroll 1
  for (int i = 0; i < R::STAGES - 1; ++i) {
    if (first + i < last) block.copy_tokens(i, (began_step + i) % p.steps);
    copy_commit();
  }
  int done_tile = first / p.steps, done_step = began_step, stage = 0;
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    copy_wait<R::STAGES - 2>();
    __syncthreads();
    if (i + R::STAGES - 1 < last) {
      const int behind = stage == 0 ? R::STAGES - 1 : stage - 1;
      block.copy_codes(behind, tile, step);
      block.copy_tokens(behind, step);
      if (++step == p.steps) step = 0, ++tile;
    }
    copy_commit();
    block.multiply(stage);
    if (++stage == R::STAGES) stage = 0;
    if (++done_step == p.steps || i == last - 1) {
      block.leave(done_tile);
      done_step = 0, ++done_tile;
    }
  }
  copy_wait<0>();
  block.finish(share, &said);
}

}  // namespace hfl
