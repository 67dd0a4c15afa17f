// Common to the kernels of w4a8_linear: forms of weights, their integers in registers, and the way from sums to results.
#pragma once
#include "../linear.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {

constexpr int PANEL = 64, TILE_ROWS = 128, CHUNK_BYTES = 4096;  // rows; rows of a tile; of a panel's run of columns

// How a weight is stored: 4 bits per row, with groups of 128 columns, with smaller ones; 8 bits.
enum class Form { CHANNEL, GROUP, FINE, BYTES };

struct LinearTask {
  hfl_linear a;
  int panels, chunks, groups;  // of 64 rows; of 4096 bytes in a panel; in a chunk
  int bias;                    // what stored integers are too large by
  int tokens_from, tokens;     // what part of all tokens this launch computes
  int steps, per;              // of a tile; of a block, where tiles are split
  int row_tiles, token_tiles, split_tiles, whole_tiles;
  int* counters;               // of tiles that are split; behind them lie their sums [tile][token][TILE_ROWS]
  int* partial;
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
__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}

// What belongs to a token, and to a row of the weight.
struct OfToken {
  float scale, sum;
  int bias;
};
struct OfRow {
  float scale, shift, bias;
};

__device__ __forceinline__ OfToken token_of(const LinearTask& p, int m) {
  if (m >= p.tokens) return {};
  const int sum = p.a.sums[p.tokens_from + m];
  return {p.a.token_scale[p.tokens_from + m], __int2float_rn(sum), p.bias * sum};
}
__device__ __forceinline__ OfRow row_of(const LinearTask& p, int n) {
  if (n >= p.a.rows) return {};
  return {p.a.scale[n], p.a.shift ? p.a.shift[n] : 0.0f, p.a.bias ? p.a.bias[n] : 0.0f};
}

// Each step rounded, as in the definition.
__device__ __forceinline__ float result(const LinearTask& p, int sum, const OfToken& token, const OfRow& row) {
  float y = __fmul_rn(__int2float_rn(sum - token.bias), row.scale);
  if (p.a.shift) y = __fsub_rn(y, __fmul_rn(token.sum, row.shift));
  y = __fmul_rn(y, token.scale);
  return p.a.bias ? __fadd_rn(y, row.bias) : y;
}

__device__ __forceinline__ uint32_t pack_results(const LinearTask& p, float low, float high) {
  return p.a.dtype == HFL_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

__device__ __forceinline__ void store_results(const LinearTask& p, int m, int n, const uint32_t* pairs, int count) {
  uint16_t* to = static_cast<uint16_t*>(p.a.out) + static_cast<int64_t>(p.tokens_from + m) * p.a.rows + n;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count && n + i < p.a.rows) to[i] = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
  }
}

__device__ __forceinline__ void add_partial(int* to, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// Results of a tile that several blocks have added to, by the last of them; leaves zeros behind.
template <int THREADS>
__device__ __forceinline__ void finish_tile(const LinearTask& p, int* partial, int first_row, int first_token, int most,
                                            int thread) {
  const int count = min(most, p.tokens - first_token) * (TILE_ROWS / 4);
  const bool whole = p.a.rows % 4 == 0;
  for (int i = thread; i < count; i += THREADS) {
    const int m = first_token + i / (TILE_ROWS / 4), n = first_row + i % (TILE_ROWS / 4) * 4;
    int4* at = reinterpret_cast<int4*>(partial) + i;
    const int4 sums = __ldcg(at);
    __stcg(at, make_int4(0, 0, 0, 0));
    if (n >= p.a.rows) continue;
    const OfToken token = token_of(p, m);
    const float y[4] = {result(p, sums.x, token, row_of(p, n)), result(p, sums.y, token, row_of(p, n + 1)),
                        result(p, sums.z, token, row_of(p, n + 2)), result(p, sums.w, token, row_of(p, n + 3))};
    const uint32_t pairs[4] = {pack_results(p, y[0], y[1]), pack_results(p, y[2], y[3])};
    if (whole) {
      uint16_t* to = static_cast<uint16_t*>(p.a.out) + static_cast<int64_t>(p.tokens_from + m) * p.a.rows + n;
      *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
    } else {
      store_results(p, m, n, pairs, 4);
    }
  }
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
