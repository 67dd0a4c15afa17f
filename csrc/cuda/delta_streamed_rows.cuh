// The rows of ops.linear_with_delta where they are few: what a block of delta_streamed.cuh knows of them, and the bits
// of their inputs by places.
#pragma once
#include "../streamed.h"
#include "delta_rows.cuh"

#ifndef V_EACH
#define V_EACH 16
#endif
#ifndef V_AHEAD
#define V_AHEAD 0
#endif
namespace hfl {

constexpr int RANKS = 8, STREAM_WARPS = 16, STREAM_THREADS = STREAM_WARPS * 32, STREAM_ROWS = HFL_STREAMED_ROWS;
constexpr int TILE = 16, QUARTER = 128, STEP = 4 * QUARTER, PLACES = 24, STEP_BYTES = PLACES * STEP / 8;
constexpr int MOST_OWNED = 64, MOST_EACH = V_EACH;  // MOST_EACH: quarters of a rank at a time
constexpr int ROUND = 4 * RANKS;                // quarters that the ranks read side by side
constexpr int ALIGNED = 16;                     // quarters whose bits are 256 bytes

// A rank's quarters of a run of them: four of each round, and as many of what is left over as the others.
struct StreamShare {
  int rounds, mine, rest;  // rest: the first one that is left over, from the beginning of the run

  __host__ __device__ StreamShare(int quarters, int rank) : rounds(quarters / ROUND) {
    const int left = quarters % ROUND, most = (left + RANKS - 1) / RANKS, before = rank * most < left ? rank * most : left;
    rest = rounds * ROUND + before;
    mine = rounds * 4 + (left - before < most ? left - before : most);
  }
};

struct StreamTask {
  hfl_streamed a;
  int32_t quarters, phases;          // of all inputs; in how many parts blocks read them, one after the other
  int32_t apart, each, steps;        // quarters of a phase, and of it a rank's; steps of these
  int32_t first, tiles, owned;       // of this launch: the first tile, how many; most of them that a block sums up
  int32_t ends[HFL_STREAMED_PARTS];  // tiles up to the end of each part

  explicit StreamTask(const hfl_streamed& a_)
      : a(a_),
        quarters(a_.inputs / QUARTER),
        phases((quarters - 1) / (RANKS * MOST_EACH) + 1),
        apart((quarters - 1) / (phases * ALIGNED) * ALIGNED + ALIGNED),
        each(StreamShare(std::min(apart, quarters), 0).mine),
        steps((each + 3) / 4),
        first(0),
        tiles(0),
        owned(0) {
    phases = (quarters - 1) / apart + 1;
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

// What a warp says on the board of its row, whose inputs of this rank are in shared memory: the unit of its whole
// numbers, and what these add up to. slot, scale: of the part that is the lane's number.
__device__ __forceinline__ void measure_row(const StreamTask& p, StreamBoard& board, int row, int mine, int slot,
                                            float scale, const unsigned char* x) {
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
  if (lane >= HFL_STREAMED_PARTS) return;
  const float factor = slot < 0 ? 0.0f : unit.unit * scale;
  board.factors[lane][row] = 2.0f * factor, board.minus[lane][row] = factor * fmaf(high, 65536.0f, low);
  if (lane == 0) board.wholes[row] = unit.factor;
}

// The slot of a warp's row, on the board, too; and its scale, of the part that is the lane's number.
__device__ __forceinline__ int slot_of_row(const StreamTask& p, StreamBoard& board, int row, float& scale) {
  const int lane = lane_of_thread(), slot = row < p.a.rows ? p.a.slots_of_rows[row] : -1;
  const bool there = slot >= 0 && slot < p.a.slots;
  scale = __int_as_float(0x7fffffff);  // there is no such slot
  if (there && lane < p.a.parts) scale = one_of(p.a.scales, lane)[slot];
  if (lane == 0) board.slots[row] = there ? slot : -1;
  return slot;
}

// What the board says of the rows; their inputs of this rank, and the bits of these, to shared memory. Where a row has
// a warp; begin: the first quarter of the phase.
__device__ __forceinline__ void know_rows(const StreamTask& p, StreamBoard& board, int begin, int rank,
                                          const StreamShare& share, int slot, float scale, unsigned char* x,
                                          unsigned char* planes) {
  const int lane = lane_of_thread(), row = warp_of_thread();
  if (row < p.a.rows) {
    const uint16_t* from = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + begin * QUARTER;
    for (int i = lane; i < share.mine * (QUARTER / 8); i += 32) {
      const int quarter = i / (QUARTER / 8), step = quarter / 4;
      const int at = quarter % 4 + (step < share.rounds ? step * ROUND + rank * 4 : share.rest);
      copy_async(x + row * p.x_bytes() + i * 16, from + at * QUARTER + i % (QUARTER / 8) * 8, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    measure_row(p, board, row, share.mine, slot, scale, x);
  } else if (lane < HFL_STREAMED_PARTS) {
    board.factors[lane][row] = board.minus[lane][row] = 0.0f;
  }
  __syncthreads();
  const Transposed transposed(lane);
#pragma unroll 1
  for (int task = row; task < p.a.rows * share.mine; task += STREAM_WARPS) {
    const int of = task / share.mine, quarter = task % share.mine;
    if (board.slots[of] < 0) continue;
#ifdef V_NOPLANES
    continue;
#endif
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x + of * p.x_bytes()) + quarter * QUARTER + lane;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int whole = __float2int_rn(to_float(from[w * 32], p.a.dtype) * board.wholes[of]);
      words[w] = transposed.of(static_cast<uint32_t>(whole));
    }
    if (lane < PLACES) {
      uint4* to = reinterpret_cast<uint4*>(planes + (of * p.steps + quarter / 4) * STEP_BYTES);
      to[lane * 4 + quarter % 4] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __syncthreads();
}

#endif

}  // namespace hfl
