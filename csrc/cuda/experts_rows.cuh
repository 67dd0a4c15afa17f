// w4a8_experts of few tokens for each expert: no two blocks share a row of a weight. experts.cu says what it computes.
//
// Work: units of 32 rows of the weight of one expert, with up to 8 or 16 of its tokens; of all units, counted
//   through expert by expert, every block has equally many in a row, so that it seldom changes the expert.
// Block: of a unit, every warp has each 8th chunk of columns; it copies the codes, scales and tokens of those itself,
//   some chunks ahead and over the end of a unit, and waits for no other warp but once a unit, when sums are added in
//   shared memory. Two blocks fit on a multiprocessor.
// Products: mma.m16n8k32, codes as operand a, which one mask takes out of 16 stored bytes.
// Shared memory: codes, scales and tokens of STAGES chunks of each warp; up to 113 KiB.
#pragma once
#include "experts.cuh"
#include "rows_tile.cuh"

namespace hfl {

template <Form F, int MT>
struct ExpertsRoom : RowsTile<F> {
  static constexpr int WARPS = 8, THREADS = WARPS * 32;
  static constexpr int TILES = 2, ROWS = 16 * TILES, TOKENS = 8 * MT;         // of a unit
  using RowsTile<F>::CHUNK, RowsTile<F>::TILE;
  static constexpr int CODES = TILES * TILE, VALUES = TOKENS * CHUNK;  // of a stage
  static constexpr int FIT = 104 * 1024 / (WARPS * (CODES + VALUES)), STAGES = FIT < 6 ? FIT : 6;
  static constexpr int RING = WARPS * STAGES * CODES, LATER = RING + WARPS * STAGES * VALUES;
  static_assert(RING % 128 == 0, "tokens begin where their order in 128 bytes does");
  static constexpr int LINE = ROWS + 4, SUMS = TOKENS * LINE;  // of a token, so that banks differ; of a unit
  static constexpr int EACH = (TOKENS * ROWS + THREADS - 1) / THREADS;  // results of a thread
  static constexpr int BYTES = LATER + 2 * SUMS * 4;
  static constexpr int PIECES = CHUNK / 16, APART = 32 / PIECES;  // of 16 bytes, of a token; tokens copied at a time
  static constexpr int TIMES = TOKENS / APART;
};

// Which token the sorted row is of.
__device__ __forceinline__ int token_at(const hfl_experts& a, int row) {
  return a.times ? a.order[row] / a.times : row;
}

// Chunks of a warp, unit after unit, and where this thread's part of the codes, the scales and the tokens of one lie.
template <class R>
struct ExpertsCursor {
  const ExpertsTask& p;
  const ExpertsBoard& board;
  int unit, last, chunk, warp, lane, tile, expert, count;
  const uint8_t *codes, *levels;
  int tokens[R::TIMES];

  __device__ __forceinline__ ExpertsCursor(const ExpertsTask& p_, const ExpertsBoard& board_, int first, int last_,
                                           int warp_, int lane_)
      : p(p_), board(board_), unit(first), last(last_), chunk(warp_), warp(warp_), lane(lane_), tile(-1), expert(0),
        count(0) {
    if (there()) find();
  }
  __device__ __forceinline__ bool there() const { return chunk < p.chunks && unit < last; }
  __device__ __forceinline__ void next() {
    chunk += R::WARPS;
    codes += R::WARPS * CHUNK_BYTES, levels += R::WARPS * p.groups * (2 * PANEL);
    if (chunk >= p.chunks) {
      chunk = warp, ++unit;
      if (unit < last) find();
    }
  }

 private:
  __device__ __forceinline__ void find() {
    constexpr int PIECES = 2 * R::TILES;  // of 16 bytes, of the scales of a group
    const int now = unit / p.units, own = (unit - now * p.units) * R::TILES, part = own % 4;
    if (now != tile) {
      const ExpertsTile at = board.tile(now, p.a.experts, R::TOKENS);
      tile = now, expert = at.expert, count = at.count;
#pragma unroll
      for (int i = 0; i < R::TIMES; ++i) {
        tokens[i] = token_at(p.a, at.first + min(lane / R::PIECES + i * R::APART, count - 1));
      }
    }
    const int64_t run = (static_cast<int64_t>(expert) * p.panels + own / 4) * p.chunks + chunk;
    codes = p.a.codes + run * CHUNK_BYTES + part * 1024 + lane * 16;
    levels = p.a.groups + (run * p.groups + lane / PIECES) * (2 * PANEL) + part * 32 + lane % PIECES * 16;
  }
};

template <Form F, int MT>
struct ExpertsBlock : RowsTile<F> {
  using R = ExpertsRoom<F, MT>;
  using RowsTile<F>::turn, RowsTile<F>::levels, RowsTile<F>::codes;
  static constexpr int TILES = R::TILES;
  static constexpr int SETS = MT == 1 ? 2 : 1;  // of sums: those of two chunks at a time do not wait for each other
  const ExpertsTask& p;
  uint32_t ring, tokens, sums;  // of this warp; of this warp; of the block
  uint32_t row;                 // where this thread finds its part of operand b in a stage, of the first eight tokens
  int warp, lane;
  int acc[SETS][TILES][MT][4];

  __device__ ExpertsBlock(const ExpertsTask& p_, uint32_t base)
      : p(p_), ring(base), tokens(base + R::RING), sums(base + R::LATER), warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
    ring += warp * R::STAGES * R::CODES, tokens += warp * R::STAGES * R::VALUES;
    row = tokens + lane % 8 * R::CHUNK + (lane / 8 ^ turn(lane % 8)) * 16;
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4 * SETS * TILES * MT; ++i) {
      acc[i / 4 / MT / TILES][i / 4 / MT % TILES][i / 4 % MT][i % 4] = 0;
    }
  }

  // Sums of both units at a time begin with nothing.
  __device__ __forceinline__ void clear_sums() const {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * R::SUMS; i += R::THREADS) store_word(sums + i * 4, 0);
  }

  __device__ __forceinline__ void copy(int stage, const ExpertsCursor<R>& from) const {
    const uint32_t at = ring + stage * R::CODES, to = at + lane * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      copy_async(to + i * R::TILE, from.codes + i * 1024, true);
      copy_async(to + i * R::TILE + 512, from.codes + i * 1024 + 512, true);
    }
    if constexpr (R::LEVELS != 0) {
      constexpr int PIECES = 2 * TILES;
      const int group = lane / PIECES, tile = lane % PIECES / 2;
      if (lane < PIECES * p.groups) {
        copy_async(at + tile * R::TILE + 1024 + group * 32 + lane % 2 * 16, from.levels, true);
      }
    }
    const int piece = lane % R::PIECES, column = from.chunk * R::CHUNK + piece * 16;
    const bool inside = column < p.a.columns;
#pragma unroll
    for (int i = 0; i < R::TIMES; ++i) {
      const int m = lane / R::PIECES + i * R::APART;
      if (m < from.count) {
        const int64_t place = inside ? static_cast<int64_t>(from.tokens[i]) * p.a.columns + column : 0;
        copy_async(tokens + stage * R::VALUES + m * R::CHUNK + (piece ^ turn(m)) * 16, p.a.values + place, inside);
      }
    }
  }

  __device__ __forceinline__ void multiply(int (&to)[TILES][MT][4], int stage) {
    const uint32_t from = ring + stage * R::CODES;
#pragma unroll
    for (int half = 0; half < R::CHUNK / 64; ++half) {
      uint32_t b[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) load_matrices(b[m], (row + stage * R::VALUES + m * 8 * R::CHUNK) ^ half * 64);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const uint32_t tile = from + i * R::TILE;
        uint32_t a[8];
        codes(a, tile, half, p.groups, Levels(F == Form::GROUP ? levels(tile, 0, lane) : 0), lane);
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_u8(to[i][m], a, b[m][0], b[m][1]);
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_u8(to[i][m], a + 4, b[m][2], b[m][3]);
      }
    }
  }

  // Add this warp's sums to the unit's.
  __device__ __forceinline__ void add(uint32_t to, int count) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int token = m * 8 + lane % 4 * 2 + r % 2;
        if (token >= count) continue;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          add_shared(to + (token * R::LINE + i * 16 + lane / 4 + r / 2 * 8) * 4,
                     acc[0][i][m][r] + (SETS == 2 ? acc[SETS - 1][i][m][r] : 0));
        }
      }
    }
    clear();
  }
};

// What a thread writes of a unit: of some tokens, one row of the weight.
template <Form F, class R>
struct ExpertsResults {
  static constexpr int BIAS = F == Form::CHANNEL ? 0 : 128;  // what stored integers are too large by
  const ExpertsTask& p;
  int token_sum[R::EACH];
  float token_scale[R::EACH];
  float scale, shift;
  int n;

  __device__ explicit ExpertsResults(const ExpertsTask& p_) : p(p_), scale(0.0f), shift(0.0f), n(0) {}

  __device__ __forceinline__ static int token(int i) {
    return static_cast<int>(threadIdx.x) / R::ROWS + i * (R::THREADS / R::ROWS);
  }
  __device__ __forceinline__ void of_tile(const ExpertsTile& tile) {
#pragma unroll
    for (int i = 0; i < R::EACH; ++i) {
      const int at = token_at(p.a, tile.first + min(token(i), tile.count - 1));
      token_sum[i] = p.a.sums[at], token_scale[i] = p.a.token_scale[at];
    }
  }
  __device__ __forceinline__ void of_unit(const ExpertsTile& tile, int own) {
    n = own * R::ROWS + static_cast<int>(threadIdx.x) % R::ROWS;
    const int64_t at = static_cast<int64_t>(tile.expert) * p.a.rows + min(n, p.a.rows - 1);
    scale = p.a.scale[at];
    if (F == Form::CHANNEL) shift = p.a.shift[at];
  }
  // Sums become zero.
  __device__ __forceinline__ void write(uint32_t from, const ExpertsTile& tile) const {
#pragma unroll
    for (int i = 0; i < R::EACH; ++i) {
      const int m = token(i);
      if (m >= tile.count) break;
      const uint32_t at = from + (m * R::LINE + n % R::ROWS) * 4;
      const OfToken of = {token_scale[i], __int2float_rn(token_sum[i]), BIAS * token_sum[i]};
      const float y = result<F == Form::CHANNEL>(static_cast<int>(load_word(at)), of, {scale, shift, 0.0f});
      store_word(at, 0);
      if (n >= p.a.rows) continue;
      const uint32_t pair = p.a.dtype == HFL_BF16 ? pack_bf16(y, 0.0f) : pack_f16(y, 0.0f);
      static_cast<uint16_t*>(p.a.out)[static_cast<int64_t>(tile.first + m) * p.a.rows + n] =
          static_cast<uint16_t>(pair);
    }
  }
};

template <Form F, int MT>
__global__ void __launch_bounds__(ExpertsRoom<F, MT>::THREADS, 2) experts_rows_kernel(
    const __grid_constant__ ExpertsTask p) {
  using R = ExpertsRoom<F, MT>;
  static_assert(R::STAGES >= 3 && R::BYTES + sizeof(ExpertsBoard) <= 112 * 1024, "two blocks fit");
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ ExpertsBoard board;
  let_next_begin();
  ExpertsBlock<F, MT> block(p, shared_address(shared));
  block.clear_sums();
  wait_for_last();
  if (block.warp == 0) board.fill(p.a, R::TOKENS, block.lane);
  __syncthreads();
  const int64_t all = static_cast<int64_t>(board.firsts[p.a.experts]) * p.units;
  const int first = static_cast<int>(all * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  ExpertsCursor<R> ahead(p, board, first, last, block.warp, block.lane);
#pragma unroll 1
  for (int i = 0; i < R::STAGES; ++i) {
    if (ahead.there()) {
      block.copy(i, ahead);
      ahead.next();
    }
    copy_commit();
  }
  ExpertsResults<F, R> results(p);
  ExpertsTile tile = {0, 0, 0};
  int stage = 0, turn = 0, number = -1;
  const auto refill = [&] {
    if (ahead.there()) {
      block.copy(stage, ahead);
      ahead.next();
    }
    copy_commit();
    stage = stage + 1 == R::STAGES ? 0 : stage + 1;
  };
#pragma unroll 1
  for (int unit = first; unit < last; ++unit) {
    const int now = unit / p.units;
    if (now != number) {
      number = now, tile = board.tile(now, p.a.experts, R::TOKENS);
      results.of_tile(tile);
    }
    results.of_unit(tile, unit - now * p.units);
    int left = (p.chunks - block.warp + R::WARPS - 1) / R::WARPS;
#pragma unroll 1
    for (; left >= 2; left -= 2) {
      const int second = stage + 1 == R::STAGES ? 0 : stage + 1;
      copy_wait<R::STAGES - 2>();
      __syncwarp();
      block.multiply(block.acc[0], stage);
      block.multiply(block.acc[block.SETS - 1], second);
      __syncwarp();
      refill(), refill();
    }
    if (left > 0) {
      copy_wait<R::STAGES - 1>();
      __syncwarp();
      block.multiply(block.acc[0], stage);
      __syncwarp();
      refill();
    }
    const uint32_t sums = block.sums + turn * R::SUMS * 4;
    block.add(sums, tile.count);
    __syncthreads();
    results.write(sums, tile);
    turn ^= 1;
  }
}

}  // namespace hfl
