// The rows of ops.linear_with_delta where they are few: what a block of delta_streamed.cuh knows of them, and the bits
// of their inputs by places.
#pragma once
#include "../streamed.h"
#include "delta_rows.cuh"

namespace hfl {

constexpr int RANKS = 8, STREAM_WARPS = 16, STREAM_THREADS = STREAM_WARPS * 32, STREAM_ROWS = HFL_STREAMED_ROWS;
constexpr int TILE = 16, QUARTER = 128, EACH_RANK = 4, PHASE = RANKS * EACH_RANK;  // EACH_RANK: quarters, PHASE: too
constexpr int PLACES = 24, STEP_BYTES = PLACES * EACH_RANK * QUARTER / 8, X_BYTES = EACH_RANK * QUARTER * 2 + 16;
constexpr int MOST_OWNED = 64, WARP_FLOATS = 256;  // WARP_FLOATS: of sums, TILE x 16 columns
constexpr int STAGGER = 900;                       // cycles from four warps of a block to the next
static_assert(STREAM_ROWS == STREAM_WARPS, "each row has a warp");

struct StreamTask {
  hfl_streamed a;
  int32_t quarters, phases;          // of all inputs; phases: that blocks read one after the other
  int32_t first, tiles, owned;       // of this launch: the first tile, how many; most of them that a block sums up
  int32_t ends[HFL_STREAMED_PARTS];  // tiles up to the end of each part

  explicit StreamTask(const hfl_streamed& a_)
      : a(a_), quarters(a_.inputs / QUARTER), phases((quarters - 1) / PHASE + 1), first(0), tiles(0), owned(0) {
    for (int p = 0; p < HFL_STREAMED_PARTS; ++p) {
      if (p < a.parts) tiles += (a.outputs[p] + TILE - 1) / TILE;
      ends[p] = tiles;
    }
  }
  // Columns of results, of rows in memory; bytes of what a block knows of the inputs of a phase, and of each tile that
  // it sums up.
  __host__ __device__ int columns() const { return a.rows > 4 ? 16 : 8; }
  __host__ __device__ static int deltas_bytes() { return STREAM_WARPS * WARP_FLOATS * 4; }
  __host__ __device__ int phase_bytes() const { return columns() * X_BYTES + a.rows * STEP_BYTES; }
  __host__ __device__ int known_bytes() const { return deltas_bytes() + (phases > 1 ? 2 : 1) * phase_bytes(); }
  __host__ __device__ int owned_bytes() const { return RANKS * TILE * columns() * 4; }
  __host__ __device__ int kept_bytes() const { return phases > 1 ? owned_bytes() : 0; }  // for each tile of the others
};

// A rank's quarters of a phase.
struct StreamShare {
  int begin, mine;  // the first one, of all; how many

  __device__ __forceinline__ StreamShare(const StreamTask& p, int phase, int rank) {
    const int before = phase * PHASE, count = min(PHASE, p.quarters - before), each = (count + RANKS - 1) / RANKS;
    begin = before + min(rank * each, count), mine = min(each, before + count - begin);
  }
};

#ifdef __CUDACC__

// What all warps of a block know.
struct StreamBoard {
  uint64_t sent[MOST_OWNED];
  int slots[STREAM_ROWS];
  // Of every other phase: worth of a whole number of the row, times the scale, twice; and of this rank's inputs without
  // signs.
  float factors[2][HFL_STREAMED_PARTS][STREAM_ROWS], minus[2][HFL_STREAMED_PARTS][STREAM_ROWS];
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

// What a warp knows of its row.
struct StreamRow {
  int row, slot;
  float scale;  // of the part that is the lane's number

  __device__ __forceinline__ StreamRow(const StreamTask& p, StreamBoard& board) : row(warp_of_thread()), scale(0.0f) {
    const int lane = lane_of_thread();
    slot = row < p.a.rows ? p.a.slots_of_rows[row] : -1;
    const bool there = slot >= 0 && slot < p.a.slots;
    if (there && lane < p.a.parts) scale = one_of(p.a.scales, lane)[slot];
    if (slot >= p.a.slots) scale = __int_as_float(0x7fffffff);  // there is no such slot
    if (lane == 0) board.slots[row] = there ? slot : -1;
  }

  // The row's inputs of this rank and of a phase on their way to shared memory.
  __device__ __forceinline__ void fetch(const StreamTask& p, const StreamShare& share, unsigned char* x) const {
    if (row < p.a.rows) {
      const uint16_t* from = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + share.begin * QUARTER;
      for (int i = lane_of_thread(); i < share.mine * (QUARTER / 8); i += 32) {
        copy_async(x + row * X_BYTES + i * 16, from + i * 8, true);
      }
    }
    copy_commit();
  }

  // What the board says of them, and their bits by places. side: of the board.
  __device__ __forceinline__ void know(const StreamTask& p, StreamBoard& board, int side, const StreamShare& share,
                                       const unsigned char* x, unsigned char* planes) const {
    const int lane = lane_of_thread();
    copy_wait<0>();
    __syncwarp();
    float factor = 0.0f, minus = 0.0f;
    if (row < p.a.rows && slot >= 0) {
      const uint4* from = reinterpret_cast<const uint4*>(x + row * X_BYTES);
      uint32_t most = 0;
      for (int i = lane; i < share.mine * (QUARTER / 8); i += 32) most = largest_of(most, from[i]);
      const RowUnit unit(__reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16)), p.a.dtype);
      factor = unit.unit * scale;
      minus = factor * write_places(p, unit.factor, share.mine, x, planes);
    }
    if (lane >= HFL_STREAMED_PARTS) return;
    board.factors[side][lane][row] = 2.0f * factor, board.minus[side][lane][row] = minus;
  }

 private:
  // Bits of whole numbers, of each 32 inputs a word of each place; the sum of these numbers.
  __device__ __forceinline__ float write_places(const StreamTask& p, float factor, int quarters, const unsigned char* x,
                                                unsigned char* planes) const {
    const int lane = lane_of_thread();
    const Transposed transposed(lane);
    int sum = 0;
#pragma unroll 1
    for (int quarter = 0; quarter < quarters; ++quarter) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(x + row * X_BYTES) + quarter * QUARTER + lane;
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int whole = __float2int_rn(to_float(from[w * 32], p.a.dtype) * factor);
        sum += whole, words[w] = transposed.of(static_cast<uint32_t>(whole));
      }
      if (lane < PLACES) {
        uint4* to = reinterpret_cast<uint4*>(planes + row * STEP_BYTES);
        to[lane * 4 + quarter] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    const float low = static_cast<float>(__reduce_add_sync(0xffffffffu, sum & 0xffff)),
                high = static_cast<float>(__reduce_add_sync(0xffffffffu, sum >> 16));
    return fmaf(high, 65536.0f, low);
  }
};

#endif

}  // namespace hfl
