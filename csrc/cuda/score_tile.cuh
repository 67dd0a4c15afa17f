// Scores of blocks: 16 entries of a KV head times its queries, by a warp. score.cu says what is computed.
#pragma once
#include "../hf_longctx.h"
#include "divide.cuh"
#include "numbers.cuh"
#include "step.cuh"

namespace hfl {

constexpr int WARPS = 4, THREADS = WARPS * 32, TILE = 16, ENTRIES = WARPS * TILE, WIDE = ENTRIES + 1;

struct ScoreTask {
  hfl_score a;
  int group, blocks;             // query heads of a KV head; blocks of entries
  Divisor tokens, each, chunks;  // queries of a head; blocks of a thread block; 16 bytes of an entry
  ScoreTurn turn;
};

template <typename T, int GROUPS>
struct ScoreRoom {
  static constexpr bool COPIED = sizeof(T) == 2;  // entries lie in shared memory
  static constexpr int ROWS = 8 * GROUPS;         // queries at a time
  static constexpr int PIECE = 16 / sizeof(T);    // channels of 16 bytes
  // Channels from one row of factors to the next: rows of 16-bit numbers meet other banks than the row before.
  __host__ __device__ static constexpr int stride(int length) {
    return COPIED ? (length + 63) / 64 * 64 + 32 : length;
  }
  __host__ __device__ static constexpr int entry_bytes(int length) { return COPIED ? ENTRIES * length * 2 : 0; }
  static constexpr int bytes(int length, int tokens) {
    return entry_bytes(length) + ROWS * (stride(length) * static_cast<int>(sizeof(T)) + WIDE * 4) +
           tokens * ENTRIES * 4;
  }
  static constexpr int MOST_BYTES = bytes(2 * 256, 8);
};

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// The numbers below zero of a word of one or two, sign bit and NaN with it.
__device__ __forceinline__ uint32_t below_zero(uint32_t x, float) { return x & (0u - (x >> 31)); }
__device__ __forceinline__ uint32_t below_zero(uint32_t x, __half) { return x & ((x >> 15 & 0x00010001u) * 0xffffu); }
__device__ __forceinline__ uint32_t below_zero(uint32_t x, __nv_bfloat16) { return below_zero(x, __half()); }

// Factors of queries `first` to `first + ROWS - 1` of a KV head; beyond the last, and beyond the channels, zero.
template <typename T, int GROUPS>
struct Factors {
  using R = ScoreRoom<T, GROUPS>;
  static constexpr int OWN = R::ROWS / WARPS, STEPS = 256 / (32 * R::PIECE);  // queries of a warp, pieces of a lane
  uint4 x[OWN][STEPS];

  __device__ __forceinline__ void load(const ScoreTask& p, int64_t b, int own_head, int first, int warp, int lane) {
    const hfl_score& a = p.a;
    const int kv_head = p.turn.heads.of(own_head);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int row = first + i * WARPS + warp, head = p.tokens.divide(row), t = row - head * a.tokens;
      const T* from = static_cast<const T*>(a.q) + b * a.q_b + (kv_head * p.group + head) * a.q_h + t * a.q_t;
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        const int c = (j * 32 + lane) * R::PIECE;
        x[i][j] = make_uint4(0, 0, 0, 0);
        if (head < p.group && c < a.dim) x[i][j] = *reinterpret_cast<const uint4*>(from + c);
      }
    }
  }
  __device__ __forceinline__ void store(const hfl_score& a, T* to, int warp, int lane) const {
    const int length = a.vectors * a.dim, padded = R::COPIED ? (length + 31) / 32 * 32 : length;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      T* own = to + (i * WARPS + warp) * R::stride(length);
#pragma unroll
      for (int j = 0; j < STEPS; ++j) {
        const int c = (j * 32 + lane) * R::PIECE;
        if (c >= a.dim) continue;
        uint4 y = x[i][j];
        if (a.vectors == 2) {
          const uint4 low = make_uint4(below_zero(y.x, T()), below_zero(y.y, T()), below_zero(y.z, T()),
                                       below_zero(y.w, T()));
          *reinterpret_cast<uint4*>(own + a.dim + c) = make_uint4(y.x ^ low.x, y.y ^ low.y, y.z ^ low.z, y.w ^ low.w);
          y = low;
        }
        *reinterpret_cast<uint4*>(own + c) = y;
      }
      const int c = length + lane * R::PIECE;
      if (c < padded) *reinterpret_cast<uint4*>(own + c) = make_uint4(0, 0, 0, 0);
    }
  }
};

// Where 16 bytes of an entry lie: rows that would meet the same banks are swapped in halves of 128 bytes.
__device__ __forceinline__ int place_of(int row, int chunk, int chunks) {
  const int at = row * chunks + chunk;
  return chunks % 8 == 0 ? at ^ ((row & 1) << 2) : at;
}

// Begin to copy a warp's entries, of which `there` are there; they lie side by side.
__device__ __forceinline__ void copy_entries(uint4* to, const void* entries, int there, const Divisor& chunks,
                                             int lane) {
  const uint4* from = static_cast<const uint4*>(entries);
#pragma unroll 4
  for (int at = lane; at < TILE * chunks.by; at += 32) {
    const int row = chunks.divide(at);
    const bool copied = row < there;
    copy_async(to + place_of(row, at - row * chunks.by, chunks.by), from + (copied ? at : 0), copied);
  }
  copy_commit();
}

// Products of a warp's 16 entries with the queries in `factors`: `products` [ROWS, WIDE].
template <typename T, int GROUPS>
__device__ __forceinline__ void tile(const uint4* entries, int chunks, const T* factors, float* products, int lane) {
  const int g = lane >> 2, c = lane & 3, stride = ScoreRoom<T, GROUPS>::stride(chunks * 8);
  float sums[2][GROUPS][4] = {};  // of even and odd steps
#pragma unroll (GROUPS == 1 ? 4 : 2)
  for (int s = 0; s < (chunks + 3) / 4; ++s) {
    const int chunk = 4 * s + c;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (chunk < chunks) low = entries[place_of(g, chunk, chunks)], high = entries[place_of(g + 8, chunk, chunks)];
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      const uint4 q = *reinterpret_cast<const uint4*>(factors + (8 * n + g) * stride + 8 * chunk);
      multiply(sums[0][n], make_uint4(low.x, high.x, low.y, high.y), q.x, q.y, T());
      multiply(sums[1][n], make_uint4(low.z, high.z, low.w, high.w), q.z, q.w, T());
    }
  }
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
    float* to = products + (8 * n + 2 * c) * WIDE + g;
    to[0] = sums[0][n][0] + sums[1][n][0], to[WIDE] = sums[0][n][1] + sums[1][n][1];
    to[8] = sums[0][n][2] + sums[1][n][2], to[WIDE + 8] = sums[0][n][3] + sums[1][n][3];
  }
}

// The same in float32.
__device__ __forceinline__ void multiply_floats(const float* entries, int64_t there, int length, const float* factors,
                                                float* products, int lane) {
  constexpr int ROWS = ScoreRoom<float, 1>::ROWS;
#pragma unroll 1
  for (int e = 0; e < TILE && e < there; ++e) {
    float sums[ROWS] = {};
#pragma unroll 1
    for (int c = lane; c < length; c += 32) {
      const float x = entries[e * length + c];
#pragma unroll
      for (int row = 0; row < ROWS; ++row) sums[row] += factors[row * length + c] * x;
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int step = 16; step; step /= 2) sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], step);
      if (lane == 0) products[row * WIDE + e] = sums[row];
    }
  }
}

// Whether the bounds of an entry are those of no key; `entries` are as they are copied, or float32.
template <typename T>
__device__ __forceinline__ bool no_key(const void* entries, int entry, int dim) {
  const T* values = static_cast<const T*>(entries);
  if (sizeof(T) == 4) return as_float(values[2 * entry * dim]) > as_float(values[2 * entry * dim + dim]);
  const int chunks = 2 * dim / 8;
  return as_float(values[place_of(entry, 0, chunks) * 8]) > as_float(values[place_of(entry, dim / 8, chunks) * 8]);
}

}  // namespace hfl
