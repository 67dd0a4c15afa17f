// Common to the kernels of w4a8_linear: forms of weights, their integers in registers, and results out of sums.
#pragma once
#include "../linear.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {

constexpr int PANEL = 64, TILE_ROWS = 128, CHUNK_BYTES = 4096;  // rows; rows of a tile; of a panel's run of columns

// How a weight is stored: 4 bits per row, with groups of 128 columns, with smaller ones; 8 bits.
enum class Form { CHANNEL, GROUP, FINE, BYTES };

// One of the weights that a launch of linear_rows.cuh multiplies tokens with.
struct LinearPart {
  const uint8_t *codes, *groups;
  const float *scale, *shift, *bias;
  void* out;
  int rows, units;
};
constexpr int MOST_PARTS = 3;

struct LinearTask {
  hfl_linear a;
  int panels, chunks, groups;  // of 64 rows; of 4096 bytes in a panel; in a chunk
  int bias;                    // what stored integers are too large by
  int tokens_from, tokens;     // what part of all tokens this launch computes
  int box;                     // tokens of a copy; what more a tile has is computed of what lies there, and not used
  int steps, shares;           // of a tile; blocks that share the steps of tiles that are split, or of one
  int row_tiles, token_tiles, split_tiles, whole_tiles;
  LinearPart parts[MOST_PARTS];
  int* counters;               // of tiles that are split; behind them lie their sums [tile][token][TILE_ROWS]
  int* partial;
};

// This block's steps of the tiles that are split, counted through: as many as others have, or one less.
struct Share {
  int first, last;
  __device__ __forceinline__ explicit Share(const LinearTask& p) {
    const int64_t all = static_cast<int64_t>(p.split_tiles) * p.steps;
    const int64_t block = min(static_cast<int>(blockIdx.x), p.shares);
    first = p.shares ? static_cast<int>(all * block / p.shares) : 0;
    last = p.shares ? static_cast<int>(min(all, all * (block + 1) / p.shares)) : 0;
  }
  // How many of them are of a tile.
  __device__ __forceinline__ int of(int tile, int steps) const {
    return min(last, (tile + 1) * steps) - max(first, tile * steps);
  }
};

// Scale and zero of rows g and g + 8, the zero in all four bytes.
struct Levels {
  uint32_t scale[2], zero[2];
  __device__ __forceinline__ explicit Levels(uint32_t stored) {
    scale[0] = stored & 0xffu, scale[1] = stored >> 16 & 0xffu;
    zero[0] = __byte_perm(stored, 0, 0x1111), zero[1] = __byte_perm(stored, 0, 0x3333);
  }
};

__device__ __forceinline__ uint32_t low_halves(uint32_t x) { return x & 0x0f0f0f0fu; }
__device__ __forceinline__ uint32_t high_halves(uint32_t x) { return x >> 4 & 0x0f0f0f0fu; }

// Two words of 4-bit codes, of rows g and g + 8, as the four registers of 32 columns of operand a.
__device__ __forceinline__ void expand(uint32_t* a, uint32_t upper, uint32_t lower) {
  a[0] = low_halves(upper), a[1] = low_halves(lower), a[2] = high_halves(upper), a[3] = high_halves(lower);
}
__device__ __forceinline__ void expand(uint32_t* a, uint32_t upper, uint32_t lower, const Levels& by) {
  expand(a, upper, lower);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = a[i] * by.scale[i % 2] + by.zero[i % 2];  // no byte overflows
}

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_word(uint32_t at, int x) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void add_shared(uint32_t at, int x) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

// a is unsigned, b signed: c[16, 8] += a[16, 32] b[32, 8]
__device__ __forceinline__ void mma_u8(int (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What belongs to a token, and to a row of the weight.
struct OfToken {
  float scale, sum;
  int bias;
};
struct OfRow {
  float scale, shift, bias;
};

// Of those behind the last, the last one's: nobody stores what comes out of them.
__device__ __forceinline__ OfToken token_of(const LinearTask& p, int m) {
  const int at = p.tokens_from + min(m, p.tokens - 1), sum = p.a.sums[at];
  return {p.a.token_scale[at], __int2float_rn(sum), p.bias * sum};
}
template <class Weight>
__device__ __forceinline__ OfRow row_of_weight(const Weight& w, int n) {
  const int at = min(n, w.rows - 1);
  return {w.scale[at], w.shift ? w.shift[at] : 0.0f, w.bias ? w.bias[at] : 0.0f};
}
__device__ __forceinline__ OfRow row_of(const LinearTask& p, int n) { return row_of_weight(p.a, n); }

// Each step rounded, as in the definition. SHIFTED: where there is no shift, there need be no code for it.
template <bool SHIFTED = true>
__device__ __forceinline__ float result(int sum, const OfToken& token, const OfRow& row) {
  float y = __fmul_rn(__int2float_rn(sum - token.bias), row.scale);
  if (SHIFTED) y = __fsub_rn(y, __fmul_rn(token.sum, row.shift));
  return __fadd_rn(__fmul_rn(y, token.scale), row.bias);
}

__device__ __forceinline__ uint32_t pack_results(const LinearTask& p, float low, float high) {
  return p.a.dtype == HFL_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

__device__ __forceinline__ uint16_t* place_of(const LinearTask& p, int m, int n) {
  return static_cast<uint16_t*>(p.a.out) + static_cast<int64_t>(p.tokens_from + m) * p.a.rows + n;
}
__device__ __forceinline__ void store_results(const LinearTask& p, int m, int n, const uint32_t* pairs, int count) {
  uint16_t* to = place_of(p, m, n);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count && n + i < p.a.rows) to[i] = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
  }
}

// Of four rows side by side.
__device__ __forceinline__ void store_four(const LinearTask& p, int m, int n, const uint32_t (&pairs)[4]) {
  if (n + 3 < p.a.rows && p.a.rows % 4 == 0) {
    *reinterpret_cast<uint2*>(place_of(p, m, n)) = make_uint2(pairs[0], pairs[1]);
  } else {
    store_results(p, m, n, pairs, 4);
  }
}

__device__ __forceinline__ void add_partial(int* to, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// Results of a tile that blocks have added to, by the last of them; leaves zeros behind. A thread has four rows, and of
// several tokens all that it reads on its way at once.
template <int THREADS, int AT_ONCE>
__device__ __forceinline__ void finish_tile(const LinearTask& p, int* partial, int first_row, int first_token, int most,
                                            int thread) {
  constexpr int LINE = TILE_ROWS / 4, APART = THREADS / LINE;
  const int n = first_row + thread % LINE * 4, count = min(most, p.tokens - first_token);
  const OfRow rows[4] = {row_of(p, n), row_of(p, n + 1), row_of(p, n + 2), row_of(p, n + 3)};
  int4* const own = reinterpret_cast<int4*>(partial) + thread % LINE;
  for (int first = thread / LINE; first < count; first += AT_ONCE * APART) {
    int4 sums[AT_ONCE];
    OfToken tokens[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int m = min(first + i * APART, count - 1);
      sums[i] = __ldcg(own + m * LINE), tokens[i] = token_of(p, first_token + m);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int m = first + i * APART;
      if (m >= count) break;
      __stcg(own + m * LINE, make_int4(0, 0, 0, 0));
      const float y[4] = {result(sums[i].x, tokens[i], rows[0]), result(sums[i].y, tokens[i], rows[1]),
                          result(sums[i].z, tokens[i], rows[2]), result(sums[i].w, tokens[i], rows[3])};
      const uint32_t pairs[4] = {pack_results(p, y[0], y[1]), pack_results(p, y[2], y[3])};
      store_four(p, first_token + m, n, pairs);
    }
  }
}

// Of 32 tiles from `first` on those to which this block has added what was missing: bit i stands for tile first + i.
// Asked by a warp, when the whole block has added its sums.
__device__ __forceinline__ uint32_t complete_tiles(const LinearTask& p, const Share& share, int first, int lane) {
  const int tile = first + lane;
  bool complete = false;
  if (tile * p.steps < share.last) {
    const int own = share.of(tile, p.steps);
    complete = add_in_order(p.counters + tile, own) + own == p.steps;
    if (complete) p.counters[tile] = 0;
  }
  return __ballot_sync(0xffffffffu, complete);
}

// The next kernel may be set up at once; it waits for this one before it reads what is written here.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace hfl
