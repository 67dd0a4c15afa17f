// A whole step of a short row that chooses, by a cluster of blocks for each KV head: scores, the choice, and attention.
// attend_cluster.cu says how the work is cut.
#pragma once
#include "attend_list_merge.cuh"
#include "barrier.cuh"
#include "score_stream.cuh"

#ifdef STAMPS
__device__ __forceinline__ void stamp_at(void* to, int which) {
  if (!to || threadIdx.x) return;
  long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  static_cast<long long*>(to)[400 * 16 + (blockIdx.y * gridDim.x + blockIdx.x) * 16 + which] = t;
}
#define STAMP(k) stamp_at(p.pick.scratch, k)
#else
#define STAMP(k)
#endif
#ifndef LET
#define LET 2
#endif

namespace hfl {

constexpr int CLUSTER = 16;                      // blocks
constexpr int CLUSTER_TILES = 11;                // tiles of bounds of a block, at most
constexpr int CLUSTER_SLICE = LIST_DIM / CLUSTER;  // channels that a block sums up

struct ClusterTask {
  ListTask list;
  const void* summary;  // bounds, [B, Hkv, entries, 2, 128]
  int64_t s_b, s_h;
  int entries, tiles;
};

struct alignas(128) ClusterShared {
  static constexpr int MOST = CLUSTER_TILES * CHOOSERS, WORDS = MOST / 32, BINS = 256, FEW = 32;
  uint32_t ranks[MOST];                             // of the row, by all blocks
  float parts[CLUSTER][LIST_ROWS][CLUSTER_SLICE];   // of all blocks
  float2 totals[CLUSTER][LIST_ROWS];
  uint4 queries[LIST_DIM / 32][32];
  float2 states[LIST_WARPS][LIST_ROWS];
  uint32_t bins[BINS];
  uint32_t above[96], within[96];  // a bit for each block of the row: of a larger rank, and of the last bin
  uint32_t few_ranks[FEW];
  int few_blocks[FEW];
  uint32_t most[LIST_WARPS], least[LIST_WARPS], second[LIST_WARPS];
  int full[LIST_WARPS];
  int few;
  uint64_t tiles[CLUSTER_TILES + 1], ranks_there, parts_there;
};

// To the shared memory of a block of the cluster, where a barrier counts bytes.
__device__ __forceinline__ uint32_t at_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
               "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, const float2& x) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(to), "r"(bar),
               "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y))
               : "memory");
}
__device__ __forceinline__ int64_t glance(const int64_t* at) {
  int64_t x;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
  return x;
}

// The choice among the ranks of a row, by all threads of a block.
struct ClusterChooser {
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
  __device__ __forceinline__ void choose(int first, int last, uint32_t take, void* stamps) {
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t x[CLUSTER_TILES];
    uint32_t best = 0, second = 0, least = UINT32_MAX;
#pragma unroll
    for (int j = 0; j < CLUSTER_TILES; ++j) {
      const int block = j * CHOOSERS + thread;
      x[j] = block >= first && block < last ? room.ranks[block] : 0;
      second = max(second, min(best, x[j])), best = max(best, x[j]), least = min(least, x[j] - 1);
    }
    const int full = 2 * __popc(__ballot_sync(0xffffffffu, second != 0));
    best = __reduce_max_sync(0xffffffffu, best), least = __reduce_min_sync(0xffffffffu, least);
    second = __reduce_min_sync(0xffffffffu, second - 1);
    if (lane == 0) room.most[warp] = best, room.least[warp] = least, room.second[warp] = second, room.full[warp] = full;
    __syncthreads();
    const uint32_t most = __reduce_max_sync(0xffffffffu, room.most[lane % LIST_WARPS]);
    least = __reduce_min_sync(0xffffffffu, room.least[lane % LIST_WARPS]);
    second = __reduce_min_sync(0xffffffffu, room.second[lane % LIST_WARPS]);
    const uint32_t many = __reduce_add_sync(0xffffffffu, lane < LIST_WARPS ? room.full[lane] : 0);
    uint32_t base = (many >= take ? second : least) + 1, over = most - base;
    int shift = max(24 - __clz(static_cast<int>(over)), 0);
    left = take;
#ifdef STAMPS
    stamp_at(stamps, 4);
#endif
    const uint32_t bins = shared_address(room.bins);
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int j = 0; j < CLUSTER_TILES; ++j) {
        if (j * CHOOSERS >= last) break;
        asm volatile("{\n.reg .pred p;\nsetp.le.u32 p, %0, %1;\n@p red.shared.add.u32 [%2], 1;\n}" ::"r"(x[j] - base),
                     "r"(over), "r"(bins + ((x[j] - base) >> shift) * 4)
                     : "memory");
      }
      __syncthreads();
      base += find_bin() << shift, over = (1u << shift) - 1;
      if (count <= ClusterShared::FEW || shift == 0) break;
      shift = max(shift - 8, 0);
      __syncthreads();
      room.bins[thread] = 0;
      __syncthreads();
    }
#ifdef STAMPS
    stamp_at(stamps, 5);
#endif
    const bool few = count != left && count <= ClusterShared::FEW;
#pragma unroll
    for (int j = 0; j < CLUSTER_TILES; ++j) {
      const bool in = x[j] - base <= over;
      const uint32_t higher = __ballot_sync(0xffffffffu, x[j] > base && !in), same = __ballot_sync(0xffffffffu, in);
      if (lane == j) room.above[j * LIST_WARPS + warp] = higher, room.within[j * LIST_WARPS + warp] = same;
      if (few && in) {
        const int place = atomicAdd(&room.few, 1);
        room.few_ranks[place] = x[j], room.few_blocks[place] = j * CHOOSERS + thread;
      }
    }
    __syncthreads();
  }

  // The block that is the one at `place` of all that are taken, in order; by a warp.
  __device__ __forceinline__ int find(int place) {
    uint32_t taken[3], same[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) taken[i] = room.above[3 * lane + i], same[i] = room.within[3 * lane + i];
    if (count == left) {
#pragma unroll
      for (int i = 0; i < 3; ++i) taken[i] |= same[i];
    } else if (count <= ClusterShared::FEW) {
      const bool there = lane < static_cast<int>(count);
      const uint32_t mine = there ? room.few_ranks[lane] : 0;
      const int where = there ? room.few_blocks[lane] : INT_MAX;
      uint32_t before = 0;
#pragma unroll 1
      for (int i = 0; i < static_cast<int>(count); ++i) {
        const uint32_t other = room.few_ranks[i];
        before += other > mine || (other == mine && room.few_blocks[i] < where) ? 1u : 0u;
      }
#pragma unroll 1
      for (uint32_t bits = __ballot_sync(0xffffffffu, there && before < left); bits; bits &= bits - 1) {
        const int block = __shfl_sync(0xffffffffu, where, __ffs(static_cast<int>(bits)) - 1), word = block / 32 - 3 * lane;
#pragma unroll
        for (int i = 0; i < 3; ++i) taken[i] |= word == i ? 1u << block % 32 : 0u;
      }
    } else {  // all alike: the first ones
      const int own = __popc(same[0]) + __popc(same[1]) + __popc(same[2]);
      int rest = static_cast<int>(left) - (sum_up_to(own, lane) - own);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
#pragma unroll 1
        for (uint32_t bits = same[i]; bits && rest > 0; bits &= bits - 1, --rest) taken[i] |= bits & (0u - bits);
      }
    }
    const int first = __popc(taken[0]), next = first + __popc(taken[1]), own = next + __popc(taken[2]);
    int rest = place - (sum_up_to(own, lane) - own), block = -1;
    if (rest >= 0 && rest < own) {
      const int which = rest < first ? 0 : rest < next ? 1 : 2;
      uint32_t bits = which == 0 ? taken[0] : which == 1 ? taken[1] : taken[2];
      rest -= which == 0 ? 0 : which == 1 ? first : next;
#pragma unroll 1
      for (; rest > 0; --rest) bits &= bits - 1;
      block = (3 * lane + which) * 32 + __ffs(static_cast<int>(bits)) - 1;
    }
    return __reduce_max_sync(0xffffffffu, block);
  }
};

// What a cluster does for a row and KV head: one block of it.
template <typename T>
struct ClusterRow {
  const ClusterTask& s;
  ClusterShared& room;
  unsigned char* ring;
  int rank, problem, b, head, warp, lane;

  __device__ __forceinline__ int first_of_tile(int local) const { return (local * CLUSTER + rank) * TILE; }
  // Begin to copy a tile, by one lane.
  __device__ __forceinline__ void begin(int local) const {
    const int entry = first_of_tile(local), bytes = min(TILE, s.entries - entry) * 512;
    const char* from = static_cast<const char*>(s.summary) + (b * s.s_b + head * s.s_h) * 2 + entry * int64_t{512};
    barrier_expect(room.tiles[local], bytes);
    copy_bulk(ring + local * STREAM_TILE, from, bytes, room.tiles[local]);
  }
  // Whether a tile has candidates of which the last tokens before `pos` may have changed the bounds.
  __device__ __forceinline__ bool changed(int local, int64_t pos, int last) const {
    const int entry = first_of_tile(local), end = min(entry + TILE, last);
    return entry < end && entry * int64_t{LIST_SLAB} < pos && end * int64_t{LIST_SLAB} > pos - JUST_STORED;
  }
  // A tile's ranks to all blocks.
  __device__ __forceinline__ void score(int local, const StreamQueries<T>& queries) const {
    const uint4* entries = reinterpret_cast<const uint4*>(ring + local * STREAM_TILE);
    const StreamSums sums = stream_sums<T>(entries, queries, lane);
    const float2 best = stream_scores(sums, s.list.group, lane);
    const uint32_t low = order_of(best.x), high = order_of(best.y);
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = (lane % 2 * 4 + i) * 4;
      const uint32_t y = __shfl_sync(0xffffffffu, low, from), z = __shfl_sync(0xffffffffu, high, from);
      x[i] = lane & 2 ? z : y;
    }
    const uint32_t to = shared_address(room.ranks + first_of_tile(local) + lane % 4 * 4);
    const uint32_t bar = shared_address(&room.ranks_there);
#pragma unroll
    for (int i = 0; i < CLUSTER / 8; ++i) {
      const int target = lane / 4 + i * 8;
      send(at_rank(to, target), at_rank(bar, target), x[0], x[1], x[2], x[3]);
    }
  }
  // What the warps left: a slice of channels to each block.
  __device__ __forceinline__ void hand_out(int rows) const {
    const uint32_t bar = shared_address(&room.parts_there);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * (LIST_DIM / 2); i += CHOOSERS) {
      const int row = i / (LIST_DIM / 2), channel = i % (LIST_DIM / 2) * 2, target = channel / CLUSTER_SLICE;
      float2 state = make_float2(NOTHING, 0.0f), sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < LIST_WARPS; ++w) state.x = fmaxf(state.x, room.states[w][row].x);
      const float base = state.x == NOTHING ? 0.0f : state.x;
#pragma unroll
      for (int w = 0; w < LIST_WARPS; ++w) {
        const float2 own = room.states[w][row];
        const float weight = power_of_two(own.x - base);
        state.y += weight * own.y;
        const float* outs = reinterpret_cast<const float*>(ring + w * STREAM_TILE);
        add(sum, weight, *reinterpret_cast<const float2*>(outs + row * LIST_OUT + channel));
      }
      const uint32_t there = at_rank(bar, target);
      send(at_rank(shared_address(&room.parts[rank][row][channel % CLUSTER_SLICE]), target), there, sum);
      if (channel % CLUSTER_SLICE == 0) send(at_rank(shared_address(&room.totals[rank][row]), target), there, state);
    }
  }
  // The block's slice of the output, a row a warp.
  __device__ __forceinline__ void finish_slice(int rows) const {
    barrier_wait(room.parts_there, 0);
    if (warp >= rows) return;
    const float2 own = room.totals[lane % CLUSTER][warp];
    float2 state = own;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) {
      state.x = fmaxf(state.x, __shfl_xor_sync(0xffffffffu, state.x, step));
    }
    const float weight = power_of_two(own.x - (state.x == NOTHING ? 0.0f : state.x));
    state.y = weight * own.y;
#pragma unroll
    for (int step = 1; step < CLUSTER; step *= 2) state.y += __shfl_xor_sync(0xffffffffu, state.y, step);
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < CLUSTER / 8; ++i) {
      const int from = lane / 4 + 8 * i;
      add(sum, __shfl_sync(0xffffffffu, weight, from),
          *reinterpret_cast<const float2*>(&room.parts[from][warp][lane % 4 * 2]));
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step), sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
    }
    if (lane < 4) finish<ListWarp<T>>(s.list, b, head, warp, rank * CLUSTER_SLICE + lane * 2, sum, state);
  }
};
static_assert(CLUSTER_SLICE == 8, "four lanes a row");

}  // namespace hfl
