// w4a8_linear of up to 16 tokens: no two blocks share a row of the weight, so that nothing is added in memory.
// linear.cu says what it computes.
//
// Work: up to three weights for the same tokens, in units of 16 rows (32 where tokens do not stay in shared memory),
//   one of each block after the other. Of 4096, 6144 or 28672 rows each of 132 multiprocessors gets as many, but for
//   3 %.
// Block: of a unit, every warp has each 8th or 16th chunk of columns; it copies the codes, scales and tokens of those
//   itself, some chunks ahead and over the end of a unit, and waits for no other warp but once a unit, when sums are
//   added in shared memory. Two blocks fit on a multiprocessor, so that the next kernel's codes come while this one
//   ends.
// Products: mma.m16n8k32, codes as operand a, which one mask takes out of 16 stored bytes.
// Shared memory: codes and scales of STAGES chunks of each warp; tokens, all or of as many chunks; up to 113 KiB.
#pragma once
#include "rows_tile.cuh"

namespace hfl {

// STREAM: tokens are copied again for every unit.
template <Form F, int MT, bool STREAM>
struct RowsRoom : RowsTile<F> {
  static constexpr int WARPS = MT == 1 && !STREAM ? 16 : 8, THREADS = WARPS * 32;
  static constexpr int TILES = STREAM ? 2 : 1, ROWS = 16 * TILES;  // of a unit
  using RowsTile<F>::CHUNK, RowsTile<F>::TILE;
  static constexpr int STAGE = TILES * TILE;
  static constexpr int STAGES = STREAM ? 3 : 5;
  static constexpr int SETS = WARPS == 16 ? 1 : 2;  // of sums: those of two chunks at a time do not wait for each other
  static constexpr int RING = WARPS * STAGES * STAGE;
  static constexpr int LINE = ROWS + 4, SUMS = 8 * MT * LINE;           // of a token, so that banks differ; of a unit
  static constexpr int EACH = (8 * MT * ROWS + THREADS - 1) / THREADS;  // results of a thread
  static constexpr int BYTES = RING + 2 * SUMS * 4;                     // without tokens
  static constexpr bool SHIFTED = F == Form::CHANNEL;
};

// How many chunks of tokens a warp has room for.
template <Form F, int MT, bool STREAM>
__host__ __device__ __forceinline__ int rows_slots(int chunks) {
  using R = RowsRoom<F, MT, STREAM>;
  return STREAM ? R::STAGES : (chunks + R::WARPS - 1) / R::WARPS;
}
template <Form F, int MT, bool STREAM>
inline int rows_bytes(int chunks, int tokens) {
  using R = RowsRoom<F, MT, STREAM>;
  return R::BYTES + R::WARPS * rows_slots<F, MT, STREAM>(chunks) * tokens * R::CHUNK;
}

// The weight that a unit is of, whose own units begin with 0.
__device__ __forceinline__ const LinearPart& part_of(const LinearTask& p, int& unit) {
  int i = 0;
  while (i < MOST_PARTS - 1 && unit >= p.parts[i].units) unit -= p.parts[i++].units;
  return p.parts[i];
}

// Chunks of a warp, unit after unit, and where this thread's part of the codes and the scales of one lie.
template <class R>
struct RowsCursor {
  const LinearTask& p;
  int unit, chunk, warp, lane;
  const uint8_t *codes, *levels;

  // Behind so many chunks.
  __device__ __forceinline__ RowsCursor(const LinearTask& p_, int warp_, int lane_, int passed = 0)
      : p(p_), unit(static_cast<int>(blockIdx.x)), chunk(warp_), warp(warp_), lane(lane_) {
#pragma unroll
    for (int i = 0; i < passed; ++i) {
      chunk += R::WARPS;
      if (chunk >= p.chunks) chunk = warp, unit += static_cast<int>(gridDim.x);
    }
    find();
  }
  __device__ __forceinline__ bool there() const { return chunk < p.chunks && unit < p.whole_tiles; }
  __device__ __forceinline__ void next() {
    chunk += R::WARPS;
    codes += R::WARPS * CHUNK_BYTES, levels += R::WARPS * p.groups * (2 * PANEL);
    if (chunk >= p.chunks) chunk = warp, unit += static_cast<int>(gridDim.x), find();
  }

 private:
  __device__ __forceinline__ void find() {
    constexpr int PIECES = 2 * R::TILES;  // of 16 bytes, of the scales of a group
    int own = unit;
    const LinearPart& weight = part_of(p, own);
    const int tile = own * R::TILES, part = tile % 4;
    const int64_t run = static_cast<int64_t>(tile / 4) * p.chunks + chunk;
    codes = weight.codes + run * CHUNK_BYTES + part * 1024 + lane * 16;
    levels = weight.groups + (run * p.groups + lane / PIECES) * (2 * PANEL) + part * 32 + lane % PIECES * 16;
  }
};

template <Form F, int MT, bool STREAM>
struct RowsBlock : RowsTile<F> {
  using R = RowsRoom<F, MT, STREAM>;
  using RowsTile<F>::turn, RowsTile<F>::levels, RowsTile<F>::codes;
  const LinearTask& p;
  uint32_t ring, tokens, sums;  // of this warp; of this warp; of the block
  uint32_t row[MT];             // where this thread finds its part of operand b in a slot
  int warp, lane;
  int acc[R::SETS][R::TILES][MT][4];

  __device__ RowsBlock(const LinearTask& p_, uint32_t base)
      : p(p_), sums(base + R::RING), warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
    ring = base + warp * R::STAGES * R::STAGE;
    tokens = base + R::BYTES + warp * rows_slots<F, MT, STREAM>(p.chunks) * p.tokens * R::CHUNK;
#pragma unroll
    for (int m = 0; m < MT; ++m) {  // of no more tokens than there are
      const int token = min(m * 8 + lane % 8, p.tokens - 1);
      row[m] = tokens + token * R::CHUNK + (lane / 8 ^ turn(token)) * 16;
    }
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * R::SETS * R::TILES * MT; ++i) {
      acc[i / 4 / MT / R::TILES][i / 4 / MT % R::TILES][i / 4 % MT][i % 4] = 0;
    }
  }

  // Sums of both units at a time begin with nothing.
  __device__ __forceinline__ void clear_sums() const {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * R::SUMS; i += R::THREADS) store_word(sums + i * 4, 0);
  }

  __device__ __forceinline__ void copy_codes(int stage, const RowsCursor<R>& from) const {
    const uint32_t to = ring + stage * R::STAGE + lane * 16;
#pragma unroll
    for (int i = 0; i < R::TILES; ++i) {
      copy_async_once(to + i * R::TILE, from.codes + i * 1024, true);
      copy_async_once(to + i * R::TILE + 512, from.codes + i * 1024 + 512, true);
    }
    if constexpr (R::LEVELS != 0) {
      constexpr int PIECES = 2 * R::TILES;
      const int group = lane / PIECES, tile = lane % PIECES / 2;
      const uint32_t at = ring + stage * R::STAGE + tile * R::TILE + 1024 + group * 32 + lane % 2 * 16;
      if (lane < PIECES * p.groups) copy_async_once(at, from.levels, true);
    }
  }

  __device__ __forceinline__ void copy_tokens(int slot, int chunk) const {
    constexpr int PIECES = R::CHUNK / 16;
    const uint32_t to = tokens + slot * p.tokens * R::CHUNK;
    const int8_t* from = p.a.values + static_cast<int64_t>(p.tokens_from) * p.a.columns;
    for (int i = lane; i < p.tokens * PIECES; i += 32) {
      const int m = i / PIECES, piece = i % PIECES, column = chunk * R::CHUNK + piece * 16;
      const bool there = column < p.a.columns;
      const int64_t at = there ? static_cast<int64_t>(m) * p.a.columns + column : 0;
      copy_async(to + m * R::CHUNK + (piece ^ turn(m)) * 16, from + at, there);
    }
  }

  // Of all chunks, or of as many as there is room for.
  __device__ __forceinline__ void copy_first_tokens() const {
    int chunk = warp;
#pragma unroll 1
    for (int slot = 0; slot < rows_slots<F, MT, STREAM>(p.chunks); ++slot, chunk += R::WARPS) {
      if (chunk >= p.chunks) {
        if (!STREAM || warp >= p.chunks) break;
        chunk = warp;  // of the next unit
      }
      copy_tokens(slot, chunk);
    }
  }

  __device__ __forceinline__ void multiply(int (&to)[R::TILES][MT][4], int stage, int slot) {
    const uint32_t tile = ring + stage * R::STAGE, tokens_at = slot * p.tokens * R::CHUNK;
    uint32_t by[R::TILES];
#pragma unroll
    for (int i = 0; i < R::TILES; ++i) by[i] = F == Form::GROUP ? levels(tile + i * R::TILE, 0, lane) : 0;
#pragma unroll
    for (int half = 0; half < R::CHUNK / 64; ++half) {
      uint32_t a[R::TILES][8];
#pragma unroll
      for (int i = 0; i < R::TILES; ++i) codes(a[i], tile + i * R::TILE, half, p.groups, Levels(by[i]), lane);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        uint32_t b[4];
        load_matrices(b, (row[m] + tokens_at) ^ half * 64);
#pragma unroll
        for (int i = 0; i < R::TILES; ++i) mma_u8(to[i][m], a[i], b[0], b[1]);
#pragma unroll
        for (int i = 0; i < R::TILES; ++i) mma_u8(to[i][m], a[i] + 4, b[2], b[3]);
      }
    }
  }

  // Add this warp's sums to the unit's.
  __device__ __forceinline__ void add(uint32_t to) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int token = m * 8 + lane % 4 * 2 + r % 2;
        if (token >= p.tokens) continue;
#pragma unroll
        for (int i = 0; i < R::TILES; ++i) {
          const int sum = acc[0][i][m][r] + (R::SETS == 2 ? acc[R::SETS - 1][i][m][r] : 0);
          add_shared(to + (token * R::LINE + i * 16 + lane / 4 + r / 2 * 8) * 4, sum);
        }
      }
    }
    clear();
  }

  // Results of a unit whose sums are complete, which become zero.
  __device__ __forceinline__ void finish(uint32_t from, const LinearPart& weight, int n, const OfRow& row,
                                         const OfToken (&of)[R::EACH]) const {
    const int first = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < R::EACH; ++i) {
      const int m = first / R::ROWS + i * (R::THREADS / R::ROWS);
      if (m >= p.tokens) break;
      const uint32_t at = from + (m * R::LINE + first % R::ROWS) * 4;
      const float y = result(static_cast<int>(load_word(at)), of[i], row);
      store_word(at, 0);
      if (n >= weight.rows) continue;
      uint16_t* to = static_cast<uint16_t*>(weight.out) + static_cast<int64_t>(p.tokens_from + m) * weight.rows + n;
      *to = static_cast<uint16_t>(pack_results(p, y, 0.0f));
    }
  }
};

// All units of a block, whose first codes are on their way, in groups of copies of which one waits as if each had its
// own.
template <Form F, int MT, bool STREAM>
__device__ __forceinline__ void multiply_units(const LinearTask& p, RowsBlock<F, MT, STREAM>& block,
                                               RowsCursor<RowsRoom<F, MT, STREAM>>& ahead,
                                               const OfToken (&tokens)[RowsRoom<F, MT, STREAM>::EACH]) {
  using R = RowsRoom<F, MT, STREAM>;
  const int thread = static_cast<int>(threadIdx.x);
  int stage = 0, turn = 0;
  const auto refill = [&] {
    if (ahead.there()) {
      block.copy_codes(stage, ahead);
      if (STREAM) block.copy_tokens(stage, ahead.chunk);
      ahead.next();
    }
    copy_commit();
    stage = stage + 1 == R::STAGES ? 0 : stage + 1;
  };
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < p.whole_tiles; unit += static_cast<int>(gridDim.x)) {
    int own = unit;
    const LinearPart& weight = part_of(p, own);
    const int n = own * R::ROWS + thread % R::ROWS;
    const OfRow row = row_of_weight(weight, n);
    int slot = 0, left = (p.chunks - block.warp + R::WARPS - 1) / R::WARPS;
#pragma unroll 1
    for (; left >= 2; left -= 2, slot += 2) {
      const int second = stage + 1 == R::STAGES ? 0 : stage + 1;
      copy_wait<R::STAGES - 2>();
      __syncwarp();
      block.multiply(block.acc[0], stage, STREAM ? stage : slot);
      block.multiply(block.acc[R::SETS - 1], second, STREAM ? second : slot + 1);
      __syncwarp();
      refill(), refill();
    }
    if (left > 0) {
      copy_wait<R::STAGES - 1>();
      __syncwarp();
      block.multiply(block.acc[0], stage, STREAM ? stage : slot);
      __syncwarp();
      refill();
    }
    const uint32_t sums = block.sums + turn * R::SUMS * 4;
    block.add(sums);
    __syncthreads();
    block.finish(sums, weight, n, row, tokens);
    turn ^= 1;
  }
}

template <Form F, int MT, bool STREAM>
__global__ void __launch_bounds__(RowsRoom<F, MT, STREAM>::THREADS, 2) linear_rows_kernel(
    const __grid_constant__ LinearTask p) {
  using R = RowsRoom<F, MT, STREAM>;
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  RowsBlock<F, MT, STREAM> block(p, shared_address(shared));
  RowsCursor<R> ahead(p, block.warp, block.lane);
#pragma unroll 1
  for (int i = 0; i < R::STAGES && ahead.there(); ++i) {  // codes need not wait for the tokens
    block.copy_codes(i, ahead);
    ahead.next();
  }
  block.clear_sums();
  const int thread = static_cast<int>(threadIdx.x);
  wait_for_last();
  block.copy_first_tokens();
  copy_commit();
  OfToken tokens[R::EACH];
#pragma unroll
  for (int i = 0; i < R::EACH; ++i) tokens[i] = token_of(p, thread / R::ROWS + i * (R::THREADS / R::ROWS));
  copy_wait<0>();
  __syncthreads();
  multiply_units(p, block, ahead, tokens);
}

}  // namespace hfl
