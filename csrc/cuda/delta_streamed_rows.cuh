// The rows of ops.linear_with_delta where they are few: what a block of delta_streamed.cuh knows of them, and the bits
// of their inputs by places.
#pragma once
#include "../streamed.h"
#include "delta_rows.cuh"

namespace hfl {

constexpr int RANKS = 8, STREAM_WARPS = 16, STREAM_THREADS = STREAM_WARPS * 32, STREAM_ROWS = HFL_STREAMED_ROWS;
constexpr int TILE = 16, QUARTER = 128, STEP = 4 * QUARTER, PLACES = 24, STEP_BYTES = PLACES * STEP / 8;
constexpr int MOST_OWNED = 64, MOST_EACH = 8;  // MOST_EACH: quarters of a rank at a time

struct StreamTask {
  hfl_streamed a;
  int32_t quarters, phases;          // of all inputs; in how many parts blocks read them, one after the other
  int32_t each, steps;               // quarters, and steps, of a rank in a phase
  int32_t first, tiles, owned;       // of this launch: the first tile, how many; most of them that a block sums up
  int32_t ends[HFL_STREAMED_PARTS];  // tiles up to the end of each part

  explicit StreamTask(const hfl_streamed& a_)
      : a(a_),
        quarters(a_.inputs / QUARTER),
        phases((quarters - 1) / (RANKS * MOST_EACH) + 1),
        each((quarters - 1) / (RANKS * phases) + 1),
        first(0),
        tiles(0),
        owned(0) {
    if (each == 7) ++each;  // then ranks begin where lines of bits do
    steps = (each + 3) / 4;
    for (int p = 0; p < HFL_STREAMED_PARTS; ++p) {
      if (p < a.parts) tiles += (a.outputs[p] + TILE - 1) / TILE;
      ends[p] = tiles;
    }
  }
  // Columns of results, of rows in memory; bytes of what a block knows of x, and of each tile that it sums up.
  __host__ __device__ int columns() const { return a.rows > 8 ? 16 : 8; }
  __host__ __device__ int x_bytes() const { return each * QUARTER * 2 + 16; }
  __host__ __device__ int deltas_bytes() const { return STREAM_THREADS * columns() / 2 * 4; }
  __host__ __device__ int known_bytes() const {
    return deltas_bytes() + columns() * x_bytes() + a.rows * steps * STEP_BYTES;
  }
  __host__ __device__ int owned_bytes() const { return RANKS * TILE * columns() * 4; }
  __host__ __device__ int kept_bytes() const { return phases > 1 ? owned_bytes() : 0; }  // for each tile of the others
};

#ifdef __CUDACC__

// What all warps of a block know.
struct StreamBoard {
  uint64_t sent[MOST_OWNED];
  int slots[STREAM_ROWS];
  float factors[HFL_STREAMED_PARTS][STREAM_ROWS];  // worth of a whole number of the row, times the scale, twice
  float minus[HFL_STREAMED_PARTS][STREAM_ROWS];    // of this rank's inputs without signs
  float wholes[STREAM_ROWS];                       // what makes whole numbers of a row's inputs
};

template <typename T>
__device__ __forceinline__ T one_of(const T (&x)[HFL_STREAMED_PARTS], int part) {
  return part == 0 ? x[0] : part == 1 ? x[1] : x[2];
}

// A 32 x 32 matrix of bits, a row in each lane, transposed.
struct Transposed {
  uint32_t by[5], keep[5];  // how far bits of the other lane go; which of the own ones stay

  __device__ __forceinline__ explicit Transposed(int lane) {
    constexpr uint32_t LOW[5] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu, 0x00ff00ffu, 0x0000ffffu};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const bool upper = lane >> i & 1;
      by[i] = upper ? 32u - (1u << i) : 1u << i, keep[i] = upper ? ~LOW[i] : LOW[i];
    }
  }
  __device__ __forceinline__ uint32_t of(uint32_t x) const {
#pragma unroll
    for (int i = 4; i >= 0; --i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, x, 1 << i);
      x = (x & keep[i]) | (__funnelshift_l(other, other, by[i]) & ~keep[i]);
    }
    return x;
  }
};

// A row's inputs of this rank: the unit of its whole numbers, and what these add up to.
__device__ __forceinline__ void measure_row(const StreamTask& p, StreamBoard& board, int row, int mine,
                                            const unsigned char* x) {
  const int lane = lane_of_thread();
  const uint4* from = reinterpret_cast<const uint4*>(x + row * p.x_bytes());
  uint32_t most = 0;
  for (int i = lane; i < mine * (QUARTER / 8); i += 32) most = largest_of(most, from[i]);
  const RowUnit unit(__reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16)), p.a.dtype);
  int sum = 0;
  for (int i = lane; i < mine * (QUARTER / 8); i += 32) {
    const Eight part = unpack(Raw{from[i], uint4{}}, p.a.dtype);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += __float2int_rn(part.x[j] * unit.factor);
  }
  const float low = static_cast<float>(__reduce_add_sync(0xffffffffu, sum & 0xffff)),
              high = static_cast<float>(__reduce_add_sync(0xffffffffu, sum >> 16));
  if (lane >= p.a.parts && lane) return;
  const int slot = p.a.slots_of_rows[row];
  const bool there = slot >= 0 && slot < p.a.slots;
  float factor = 0.0f;
  if (slot >= 0) {
    factor = there ? unit.unit * one_of(p.a.scales, lane)[slot] : __int_as_float(0x7fffffff);  // there is no such slot
  }
  board.factors[lane][row] = 2.0f * factor, board.minus[lane][row] = factor * fmaf(high, 65536.0f, low);
  if (lane == 0) board.slots[row] = there ? slot : -1, board.wholes[row] = unit.factor;
}

// What the board says of the rows; their inputs of this rank, and the bits of these, to shared memory.
__device__ __forceinline__ void know_rows(const StreamTask& p, StreamBoard& board, int begin, int mine,
                                          unsigned char* x, unsigned char* planes) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (thread < STREAM_ROWS) {
    board.slots[thread] = -1;
    for (int part = 0; part < HFL_STREAMED_PARTS; ++part) {
      board.factors[part][thread] = board.minus[part][thread] = 0.0f;
    }
  }
  for (int row = warp; row < p.a.rows; row += STREAM_WARPS) {
    const uint16_t* from = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + begin * QUARTER;
    for (int i = lane; i < mine * (QUARTER / 8); i += 32) {
      copy_async(x + row * p.x_bytes() + i * 16, from + i * 8, true);
    }
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  for (int row = warp; row < p.a.rows; row += STREAM_WARPS) measure_row(p, board, row, mine, x);
  __syncthreads();
  const Transposed transposed(lane);
#pragma unroll 1
  for (int task = warp; task < p.a.rows * mine; task += STREAM_WARPS) {
    const int row = task / mine, quarter = task % mine;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x + row * p.x_bytes()) + quarter * QUARTER + lane;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int whole = __float2int_rn(to_float(from[w * 32], p.a.dtype) * board.wholes[row]);
      words[w] = transposed.of(static_cast<uint32_t>(whole));
    }
    if (lane < PLACES) {
      uint4* to = reinterpret_cast<uint4*>(planes + (row * p.steps + quarter / 4) * STEP_BYTES);
      to[lane * 4 + quarter % 4] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __syncthreads();
}

#endif

}  // namespace hfl
