// The rows of ops.linear_with_delta where they are few: what a block of delta_streamed.cuh knows of them, and the bits
// of their inputs by places.
#pragma once
#include "../streamed.h"
#include "delta_rows.cuh"

namespace hfl {

constexpr int RANKS = 8, STREAM_WARPS = 16, STREAM_THREADS = STREAM_WARPS * 32, STREAM_ROWS = HFL_STREAMED_ROWS;
constexpr int TILE = 16, QUARTER = 128, EACH_RANK = 4, PHASE = RANKS * EACH_RANK;  // EACH_RANK: quarters, PHASE: too
constexpr int PLACES = 24, STEP_BYTES = PLACES * EACH_RANK * QUARTER / 8, X_BYTES = EACH_RANK * QUARTER * 2 + 16;
constexpr int MOST_OWNED = 64, CHUNK_BYTES = 1024;
static_assert(STREAM_ROWS == STREAM_WARPS, "each row has a warp");

struct StreamTask {
  hfl_streamed a;
  int32_t quarters, phases;          // of all inputs; phases: that blocks read one after the other
  int32_t first, tiles, owned;       // of this launch: the first tile, how many; most of them that a block sums up
  int32_t each, more;                // tiles of a cluster; how many clusters have one more
  int32_t ends[HFL_STREAMED_PARTS];  // tiles up to the end of each part

  explicit StreamTask(const hfl_streamed& a_)
      : a(a_), quarters(a_.inputs / QUARTER), phases((quarters - 1) / PHASE + 1), first(0), tiles(0), owned(0),
        each(0), more(0) {
    for (int p = 0; p < HFL_STREAMED_PARTS; ++p) {
      if (p < a.parts) tiles += (a.outputs[p] + TILE - 1) / TILE;
      ends[p] = tiles;
    }
  }
  // Columns of results, of rows in memory; bytes of what a block knows of the inputs of a phase, and of each tile that
  // it sums up.
  __host__ __device__ int columns() const { return a.rows > 4 ? 16 : 8; }
  __host__ __device__ int told_bytes() const { return (columns() / 2 + 2) * 128; }  // of a tile, to another warp
  __host__ __device__ int all_told_bytes() const { return STREAM_WARPS / 4 * 3 * told_bytes(); }
  __host__ __device__ int phase_bytes() const { return columns() * X_BYTES + a.rows * STEP_BYTES; }
  __host__ __device__ int known_bytes() const { return all_told_bytes() + (phases > 1 ? 2 : 1) * phase_bytes(); }
  // Warps whose first tiles are brought near: 16 MB of an H200's multiprocessors, with bits or without.
  __host__ __device__ int near_warps() const { return phases > 1 ? 8 : 4; }
  __host__ __device__ static int ring_bytes(int deep) { return STREAM_WARPS * deep * CHUNK_BYTES; }
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
  uint64_t known[2], over[2];  // of every other phase: its inputs are known, all are done with it
  int slots[STREAM_ROWS];
  float scales[HFL_STREAMED_PARTS][STREAM_ROWS];
  // Of every other phase: worth of a whole number of the row, times the scale, twice; and of this rank's inputs without
  // signs.
  float factors[2][HFL_STREAMED_PARTS][STREAM_ROWS], minus[2][HFL_STREAMED_PARTS][STREAM_ROWS];
};

template <typename T>
__device__ __forceinline__ T one_of(const T (&x)[HFL_STREAMED_PARTS], int part) {
  return part == 0 ? x[0] : part == 1 ? x[1] : x[2];
}

// As lane_of_thread, but that what is computed from it is computed where it is needed, and has no registers elsewhere.
__device__ __forceinline__ int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// A block's number in its cluster likewise.
__device__ __forceinline__ int rank_here() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Four 8 x 8 matrices of bits, of each a byte in each of 8 lanes side by side, transposed.
struct Transposed {
  uint32_t by[3], keep[3];  // how far bits of the other lane go; which of the own ones stay

  __device__ __forceinline__ explicit Transposed(int lane) {
    constexpr uint32_t LOW[3] = {0x55555555u, 0x33333333u, 0x0f0f0f0fu};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const bool upper = lane >> i & 1;
      by[i] = upper ? 32u - (1u << i) : 1u << i, keep[i] = upper ? ~LOW[i] : LOW[i];
    }
  }
  __device__ __forceinline__ uint32_t of(uint32_t x) const {
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, x, 1 << i);
      x = (x & keep[i]) | (__funnelshift_l(other, other, by[i]) & ~keep[i]);
    }
    return x;
  }
};

// What a warp knows of its row.
struct StreamRow {
  int row, slots;  // slots: in each lane that of a row
  float scale;     // in each lane that of a part

  __device__ __forceinline__ StreamRow(const StreamTask& p, int row_) : row(row_), slots(slots_now(p)), scale(0.0f) {}
  // Its scales. The kernel before may still write slots: they are looked at again.
  __device__ __forceinline__ void look(const StreamTask& p) {
    const int lane = lane_of_thread(), slot = slot_of(row);
    const bool there = slot >= 0 && slot < p.a.slots && lane < p.a.parts;
    scale = there ? one_of(p.a.scales, lane)[slot] : 0.0f;
    if (slot >= p.a.slots) scale = __int_as_float(0x7fffffff);  // there is no such slot
  }
  // For all lanes of a warp.
  __device__ __forceinline__ int slot_of(int other) const { return __shfl_sync(0xffffffffu, slots, other); }

  // Slot and scales for the board, and the row's inputs of this rank and of the first phase.
  __device__ __forceinline__ void bring(const StreamTask& p, StreamBoard& board, const StreamShare& share,
                                        unsigned char* x) {
    const int lane = lane_of_thread(), before = slots;
    uint4 raw[2];
    const uint16_t* from = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + share.begin * QUARTER;
    const auto there = [&](int i) { return row < p.a.rows && lane + 32 * i < share.mine * (QUARTER / 8); };
#pragma unroll
    for (int i = 0; i < 2; ++i) raw[i] = there(i) ? reinterpret_cast<const uint4*>(from)[lane + 32 * i] : uint4{};
    slots = slots_now(p);
    if (__any_sync(0xffffffffu, slots != before)) look(p);
    const int slot = slot_of(row);
    if (lane < HFL_STREAMED_PARTS) board.scales[lane][row] = scale;
    if (lane == 0) board.slots[row] = slot < p.a.slots ? slot : -1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (there(i)) reinterpret_cast<uint4*>(x + row * X_BYTES)[lane + 32 * i] = raw[i];
    }
  }

  // The row's inputs of this rank and of a phase on their way to shared memory.
  __device__ __forceinline__ void fetch(const StreamTask& p, const StreamShare& share, unsigned char* x) const {
    if (row >= p.a.rows) return;
    const uint16_t* from = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + share.begin * QUARTER;
    for (int i = lane_of_thread(); i < share.mine * (QUARTER / 8); i += 32) {
      copy_async(x + row * X_BYTES + i * 16, from + i * 8, true);
    }
  }

  // What the board says of them, and their bits by places. side: of the board.
  __device__ __forceinline__ void know(const StreamTask& p, StreamBoard& board, int side, const StreamShare& share,
                                       unsigned char* x, unsigned char* planes) const {
    const int lane = lane_here();
    __syncwarp();
    float factor = 0.0f, minus = 0.0f;
    if (row < p.a.rows) {
      const uint4* from = reinterpret_cast<const uint4*>(x + row * X_BYTES);
      uint32_t most = 0;
      for (int i = lane; i < share.mine * (QUARTER / 8); i += 32) most = largest_of(most, from[i]);
      const float scale = board.scales[min(lane, HFL_STREAMED_PARTS - 1)][row];
      if (board.slots[row] >= 0 || scale != scale) {
        const RowUnit unit(__reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16)), p.a.dtype);
        factor = unit.unit * scale;
        minus = factor * write_places(p, lane, unit.factor, share.mine, x, planes);
      }
    }
    if (lane >= HFL_STREAMED_PARTS) return;
    board.factors[side][lane][row] = 2.0f * factor, board.minus[side][lane][row] = minus;
  }

 private:
  __device__ __forceinline__ static int slots_now(const StreamTask& p) {
    const int row = lane_of_thread();
    int found = -1;
    if (row < p.a.rows) {
      asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(p.a.slots_of_rows + row) : "memory");
    }
    return found;
  }
  // Bits of whole numbers, of each 32 inputs a word of each place; the sum of these numbers. Of each word eight lanes
  // have four inputs, 8 apart: so a byte of these is a byte of words.
  __device__ __forceinline__ float write_places(const StreamTask& p, int lane, float factor, int quarters,
                                                const unsigned char* x, unsigned char* planes) const {
    constexpr int APART = STEP_BYTES / PLACES / 4;  // words from place to place
    const Transposed transposed(lane);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x + row * X_BYTES) + lane / 8 * WORD + lane % 8;
    uint32_t* to = reinterpret_cast<uint32_t*>(planes + row * STEP_BYTES) + lane % 8 * APART + lane / 8;
    int sum = 0;
#pragma unroll 1
    for (int quarter = 0; quarter < quarters; ++quarter) {
      uint32_t whole[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int number = __float2int_rn(to_float(from[quarter * QUARTER + j * 8], p.a.dtype) * factor);
        sum += number, whole[j] = static_cast<uint32_t>(number);
      }
      const uint32_t low = __byte_perm(whole[0], whole[1], 0x5140), far = __byte_perm(whole[2], whole[3], 0x5140);
      const uint32_t bytes[PLACES / 8] = {__byte_perm(low, far, 0x5410), __byte_perm(low, far, 0x7632),
                                          __byte_perm(__byte_perm(whole[0], whole[1], 0x62),
                                                      __byte_perm(whole[2], whole[3], 0x62), 0x5410)};
#pragma unroll
      for (int i = 0; i < PLACES / 8; ++i) to[i * 8 * APART + quarter * 4] = transposed.of(bytes[i]);
    }
    const float low = static_cast<float>(__reduce_add_sync(0xffffffffu, sum & 0xffff)),
                high = static_cast<float>(__reduce_add_sync(0xffffffffu, sum >> 16));
    return fmaf(high, 65536.0f, low);
  }
};

#endif

}  // namespace hfl
