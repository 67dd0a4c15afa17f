// What a block of a cluster has in shared memory, and the choice that each of them makes from what all have sent it.
// attend_cluster.cu says how the work is cut.
#pragma once
#include "attend_list.cuh"
#include "score_stream.cuh"

namespace hfl {

constexpr int CLUSTER = 16;                   // blocks; 8 of twice as many warps take as long
constexpr int CLUSTER_WARPS = 128 / CLUSTER;  // of a block
constexpr int CLUSTER_THREADS = CLUSTER_WARPS * 32;
constexpr int CLUSTER_TILES = 176 / CLUSTER;                  // of a block, at most, 16 bounds each
constexpr int CLUSTER_SLICE = LIST_DIM / CLUSTER;             // channels that a block sums up
constexpr int CLUSTER_MOST = CLUSTER * CLUSTER_TILES * TILE;  // blocks of keys of a row

struct ClusterTask {
  ListTask list;
  const void* summary;  // bounds, [B, Hkv, entries, 2, 128]
  int64_t s_b, s_h;
  int entries, tiles;
};

struct alignas(128) ClusterShared {
  static constexpr int BINS = 256, FEW = 32, WORDS = 96;
  uint32_t ranks[CLUSTER_MOST];                    // of the row, from all blocks
  float parts[CLUSTER][LIST_ROWS][CLUSTER_SLICE];  // likewise of results
  float2 totals[CLUSTER][LIST_ROWS];
  uint4 queries[LIST_DIM / 32][32];
  float2 states[CLUSTER_WARPS][LIST_ROWS];
  uint32_t bins[BINS];
  uint32_t taken[WORDS];  // a bit for each block of the row
  alignas(16) uint32_t few_ranks[FEW];
  alignas(16) int few_blocks[FEW];
  uint32_t most[CLUSTER_WARPS], least[CLUSTER_WARPS], second[CLUSTER_WARPS];
  int full[CLUSTER_WARPS];
  int few;
  ClusterTask task;
  uint64_t tiles[CLUSTER_TILES], ranks_there, parts_there;
};

// The choice among the ranks of a row, by all threads of a block.
struct ClusterChooser {
  static constexpr int EACH = (CLUSTER_MOST - 1) / CLUSTER_THREADS + 1;  // blocks of keys of a thread

  ClusterShared& room;
  int warp, lane;
  uint32_t left = 0, count = 0;  // of the last bin, so many are taken of so many

  // Which bin, counted from the largest, the `left`-th is in.
  __device__ __forceinline__ uint32_t find_bin() {
    const int low = ClusterShared::BINS - 8 * (lane + 1);
    const uint4 a = *reinterpret_cast<const uint4*>(room.bins + low);
    const uint4 b = *reinterpret_cast<const uint4*>(room.bins + low + 4);
    const uint32_t x[8] = {b.w, b.z, b.y, b.x, a.w, a.z, a.y, a.x};
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i];
    uint32_t running = sum_up_to(sum, lane) - sum, bin = 0, rest = 0, many = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (running < left && running + x[i] >= left) bin = low + 7 - i, rest = left - running, many = x[i];
      running += x[i];
    }
    const int which = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, many != 0))) - 1;
    left = __shfl_sync(0xffffffffu, rest, which), count = __shfl_sync(0xffffffffu, many, which);
    return __shfl_sync(0xffffffffu, bin, which);
  }

  // Find which are the `take` best of blocks `first` to `last` - 1, 0 < take < last - first.
  __device__ __forceinline__ void choose(int first, int last, uint32_t take) {
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t x[EACH];
    uint32_t best = 0, second = 0, least = UINT32_MAX;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int block = j * CLUSTER_THREADS + thread;
      x[j] = block >= first && block < last ? room.ranks[block] : 0;
      if (j * CLUSTER_THREADS >= last) continue;
      second = max(second, min(best, x[j])), best = max(best, x[j]), least = min(least, x[j] - 1);
    }
    const int full = 2 * __popc(__ballot_sync(0xffffffffu, second != 0));
    best = __reduce_max_sync(0xffffffffu, best), least = __reduce_min_sync(0xffffffffu, least);
    second = __reduce_min_sync(0xffffffffu, second - 1);
    if (lane == 0) room.most[warp] = best, room.least[warp] = least, room.second[warp] = second, room.full[warp] = full;
    __syncthreads();
    const uint32_t most = __reduce_max_sync(0xffffffffu, room.most[lane % CLUSTER_WARPS]);
    least = __reduce_min_sync(0xffffffffu, room.least[lane % CLUSTER_WARPS]);
    second = __reduce_min_sync(0xffffffffu, room.second[lane % CLUSTER_WARPS]);
    const uint32_t many = __reduce_add_sync(0xffffffffu, lane < CLUSTER_WARPS ? room.full[lane] : 0);
    uint32_t base = (many >= take ? second : least) + 1, over = most - base;
    int shift = max(24 - __clz(static_cast<int>(over)), 0);
    left = take;
    const uint32_t bins = shared_address(room.bins);
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        if (j * CLUSTER_THREADS >= last) break;
        asm volatile("{\n.reg .pred p;\nsetp.le.u32 p, %0, %1;\n@p red.shared.add.u32 [%2], 1;\n}" ::"r"(x[j] - base),
                     "r"(over), "r"(bins + ((x[j] - base) >> shift) * 4)
                     : "memory");
      }
      __syncthreads();
      base += find_bin() << shift, over = (1u << shift) - 1;
      if (count <= ClusterShared::FEW || shift == 0) break;
      shift = max(shift - 8, 0);
      __syncthreads();
      if (thread < ClusterShared::BINS) room.bins[thread] = 0;
      __syncthreads();
    }
    uint32_t rank = base - 1;
    int block = -1;
    if (count > ClusterShared::FEW) {
      rank = base, block = last_alike(x, base, last);
    } else if (count > left) {
      last_of_few(x, base, over, rank, block);
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      if (j * CLUSTER_THREADS >= last) break;
      const bool in = x[j] > rank || (x[j] == rank && j * CLUSTER_THREADS + thread <= block);
      const uint32_t taken = __ballot_sync(0xffffffffu, in);
      if (lane == j) room.taken[j * CLUSTER_WARPS + warp] = taken;
    }
    __syncthreads();
  }

  // The block that is the one at `place` of all that are taken, in order; by a warp.
  __device__ __forceinline__ int find(int place) const {
    uint32_t bits[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) bits[i] = room.taken[3 * lane + i];
    const int first = __popc(bits[0]), next = first + __popc(bits[1]), own = next + __popc(bits[2]);
    int rest = place - (sum_up_to(own, lane) - own), block = -1;
    if (rest >= 0 && rest < own) {
      const int which = rest < first ? 0 : rest < next ? 1 : 2;
      uint32_t word = which == 0 ? bits[0] : which == 1 ? bits[1] : bits[2];
      rest -= which == 0 ? 0 : which == 1 ? first : next;
#pragma unroll 1
      for (; rest > 0; --rest) word &= word - 1;
      block = (3 * lane + which) * 32 + __ffs(static_cast<int>(word)) - 1;
    }
    return __reduce_max_sync(0xffffffffu, block);
  }

 private:
  // Of the few of the last bin, the `left`-th: its rank, and its block, after which none of that rank is taken.
  __device__ __forceinline__ void last_of_few(const uint32_t (&x)[EACH], uint32_t base, uint32_t over,
                                              uint32_t& rank, int& block) {
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) own |= x[j] - base <= over ? 1u << j : 0u;
#pragma unroll 1
    for (; own; own &= own - 1) {  // most warps have none
      const int found = (__ffs(static_cast<int>(own)) - 1) * CLUSTER_THREADS + static_cast<int>(threadIdx.x);
      const int place = atomicAdd(&room.few, 1);
      room.few_ranks[place] = room.ranks[found], room.few_blocks[place] = found;
    }
    __syncthreads();
    const bool there = lane < static_cast<int>(count);
    const uint32_t mine = room.few_ranks[lane];  // 0 where there is none
    const int where = room.few_blocks[lane];
    uint32_t before = 0;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(count); i += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(room.few_ranks + i);
      const int4 blocks = *reinterpret_cast<const int4*>(room.few_blocks + i);
      before += others.x > mine || (others.x == mine && blocks.x < where) ? 1u : 0u;
      before += others.y > mine || (others.y == mine && blocks.y < where) ? 1u : 0u;
      before += others.z > mine || (others.z == mine && blocks.z < where) ? 1u : 0u;
      before += others.w > mine || (others.w == mine && blocks.w < where) ? 1u : 0u;
    }
    const int last = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, there && before == left - 1))) - 1;
    rank = __shfl_sync(0xffffffffu, mine, last), block = __shfl_sync(0xffffffffu, where, last);
  }

  // Of many that are alike, the `left`-th block.
  __device__ __forceinline__ int last_alike(const uint32_t (&x)[EACH], uint32_t base, int end) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      if (j * CLUSTER_THREADS >= end) break;
      const uint32_t same = __ballot_sync(0xffffffffu, x[j] == base);
      if (lane == j) room.taken[j * CLUSTER_WARPS + warp] = same;
    }
    __syncthreads();
    const int block = find(static_cast<int>(left) - 1);
    __syncthreads();
    return block;
  }
};

}  // namespace hfl
