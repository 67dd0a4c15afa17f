// w4a8_linear of few tokens that all stay in shared memory: as linear_rows.cuh, but that what belongs to a row of the
// weight is asked for before all codes, and is there when sums are: else each unit would wait for memory once.
#pragma once
#include "linear_rows.cuh"

namespace hfl {

// Whose results a thread writes: those of a row, of every unit or of every some. What belongs to the row is asked for long
// before it is needed, as all that the block copies is ahead of it: of the first one before the block waits, as its codes
// are, but for the bias, which a kernel before may have made.
template <class R, int TOKENS = 0>  // 0: as many as the launch has
struct RowsResults {
  const LinearTask& p;
  int unit;  // the next whose results it writes
  OfRow row;

  __device__ __forceinline__ void begin() {
    const int thread = static_cast<int>(threadIdx.x), set = thread / all();
    unit = set < sets() ? static_cast<int>(blockIdx.x) + set * static_cast<int>(gridDim.x) : INT32_MAX;
    find();
  }
  __device__ __forceinline__ void find_bias() {
    int own = unit;
    if (unit < p.whole_tiles) row.bias = bias_of(part_of(p, own), own * R::ROWS + row_at());
  }

  __device__ __forceinline__ int all() const { return R::ROWS * (TOKENS ? TOKENS : p.tokens); }
  __device__ __forceinline__ int sets() const { return max(R::THREADS / all(), 1); }
  // Which row, of which tokens.
  __device__ __forceinline__ int at() const {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));  // anew, as there is no register to keep it in
    return thread % all();
  }
  __device__ __forceinline__ int row_at() const { return static_cast<int>(threadIdx.x) % R::ROWS; }
  __device__ __forceinline__ int token(int i) const { return at() / R::ROWS + i * (R::THREADS / R::ROWS); }

  // Results of a unit whose sums are complete, which become zero.
  template <class Tokens>
  __device__ __forceinline__ void finish(uint32_t sums, const Tokens& of) {
    int own = unit;
    const LinearPart& weight = part_of(p, own);
    const int n = own * R::ROWS + row_at();
#pragma unroll
    for (int i = 0; i < R::EACH; ++i) {
      const int m = token(i);
      if (m >= p.tokens) break;
      const uint32_t from = sums + (m * R::LINE + row_at()) * 4;
      const float y = result<R::SHIFTED>(static_cast<int>(load_word(from)), of(i), row);
      store_word(from, 0);
      if (n >= weight.rows) continue;
      uint16_t* to = static_cast<uint16_t*>(weight.out) + static_cast<int64_t>(p.tokens_from + m) * weight.rows + n;
      *to = static_cast<uint16_t>(pack_results(p, y, 0.0f));
    }
    unit += sets() * static_cast<int>(gridDim.x);
    find(), find_bias();
  }

 private:
  __device__ __forceinline__ void find() {
    if (unit >= p.whole_tiles) return;
    int own = unit;
    const LinearPart& weight = part_of(p, own);
    const int at = min(own * R::ROWS + row_at(), weight.rows - 1);
    row.scale = weight.scale[at], row.shift = R::SHIFTED && weight.shift ? weight.shift[at] : 0.0f;
  }
  static __device__ __forceinline__ float bias_of(const LinearPart& weight, int n) {
    return weight.bias ? weight.bias[min(n, weight.rows - 1)] : 0.0f;
  }
};

// What belongs to the tokens whose results a thread writes.
template <class R>
struct TokensOf {
  const LinearTask& p;
  float scale[R::EACH];
  int sum[R::EACH];

  __device__ __forceinline__ void read(int i, int token) {
    const int at = p.tokens_from + min(token, p.tokens - 1);
    scale[i] = p.a.token_scale[at], sum[i] = p.a.sums[at];
  }
  __device__ __forceinline__ void complete(bool) const {}
  __device__ __forceinline__ OfToken operator()(int i) const {
    return {scale[i], __int2float_rn(sum[i]), p.bias * sum[i]};
  }
};

// All units of a block, whose first codes are on their way, in groups of copies of which one waits as if each had its
// own.
template <class Block, class Results, class Tokens>
__device__ __forceinline__ void multiply_units(const LinearTask& p, Block& block, RowsCursor<typename Block::R>& ahead,
                                               Results& results, Tokens& tokens) {
  using R = typename Block::R;
  int stage = 0, turn = 0;
  const auto refill = [&] {
    if (ahead.there()) {
      block.copy_codes(stage, ahead);
      ahead.next();
    }
    copy_commit();
    stage = stage + 1 == R::STAGES ? 0 : stage + 1;
  };
#pragma unroll 1
  for (int unit = static_cast<int>(blockIdx.x); unit < p.whole_tiles; unit += static_cast<int>(gridDim.x)) {
    int slot = 0, left = (p.chunks - block.warp + R::WARPS - 1) / R::WARPS;
#pragma unroll 1
    for (; left >= 2; left -= 2, slot += 2) {
      const int second = stage + 1 == R::STAGES ? 0 : stage + 1;
      copy_wait<R::STAGES - 2>();
      __syncwarp();
      block.multiply(block.acc[0], stage, slot);
      block.multiply(block.acc[R::SETS - 1], second, slot + 1);
      __syncwarp();
      refill(), refill();
    }
    if (left > 0) {
      copy_wait<R::STAGES - 1>();
      __syncwarp();
      block.multiply(block.acc[0], stage, slot);
      __syncwarp();
      refill();
    }
    const uint32_t sums = block.sums + turn * R::SUMS * 4;
    block.add(sums);
    __syncthreads();
    tokens.complete(unit == static_cast<int>(blockIdx.x));
    if (unit == results.unit) results.finish(sums, tokens);
    turn ^= 1;
  }
}

template <Form F>
struct EarlyBlock : RowsBlock<F, 1, false> {
  using Base = RowsBlock<F, 1, false>;
  using R = typename Base::R;
  static constexpr int MT = 1;
  using Base::Base, Base::p, Base::tokens, Base::warp, Base::lane, Base::turn;

  // Tokens of all chunks, where a thread has few of them. Not copied as codes are, for then no code could be used before
  // all that were asked for are there.
  __device__ __forceinline__ void load_tokens() const {
    constexpr int PIECES = R::CHUNK / 16, TOGETHER = 32 / PIECES, AT_ONCE = 4;  // of 16 bytes; parts of a warp's loads
    const int8_t* from = p.a.values + static_cast<int64_t>(p.tokens_from) * p.a.columns;
    const int all = (p.chunks - warp + R::WARPS - 1) / R::WARPS * p.tokens, piece = lane % PIECES;
#pragma unroll 1
    for (int first = lane / PIECES; first < all; first += AT_ONCE * TOGETHER) {
      uint4 x[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int at = first + i * TOGETHER, slot = p.tokens == 1 ? at : at / 2, m = at - slot * p.tokens;
        const int column = (warp + slot * R::WARPS) * R::CHUNK + piece * 16;
        x[i] = make_uint4(0, 0, 0, 0);
        if (at < all && column < p.a.columns) {
          x[i] = *reinterpret_cast<const uint4*>(from + m * p.a.columns + column);
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int at = first + i * TOGETHER;
        if (at < all) store_shared(tokens + at * R::CHUNK + (piece ^ turn(p.tokens == 1 ? 0 : at % 2)) * 16, x[i]);
      }
    }
  }
  __device__ __forceinline__ bool loads_tokens() const { return p.tokens <= 2; }
};

template <Form F>
__global__ void __launch_bounds__(RowsRoom<F, 1, false>::THREADS, 2) linear_early_kernel(
    const __grid_constant__ LinearTask p) {
  using R = RowsRoom<F, 1, false>;
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_begin();
  RowsResults<R> results{p};
  results.begin();  // before the codes, behind which it would come late
  EarlyBlock<F> block(p, shared_address(shared));
  RowsCursor<R> ahead(p, block.warp, block.lane);
#pragma unroll 1
  for (int i = 0; i < R::STAGES; ++i) {  // codes need not wait for the tokens
    if (ahead.there()) {
      block.copy_codes(i, ahead);
      ahead.next();
    }
    if (block.loads_tokens()) copy_commit();
  }
  block.clear_sums();
  __syncthreads();
  wait_for_last();
  if (block.loads_tokens()) {
    block.load_tokens();
  } else {
    block.copy_first_tokens();
    copy_commit();
  }
  results.find_bias();
  TokensOf<R> tokens{p};
#pragma unroll
  for (int i = 0; i < R::EACH; ++i) tokens.read(i, results.token(i));
  if (!block.loads_tokens()) copy_wait<0>();
  multiply_units(p, block, ahead, results, tokens);
}

}  // namespace hfl
