// A whole step of a short row that chooses, by a cluster of blocks for each KV head: scores, the choice, and attention.
// attend_cluster.cu says how the work is cut.
#pragma once
#include "attend_list_merge.cuh"
#include "barrier.cuh"
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

// A kernel's arguments to shared memory, where reading them takes the same time whenever that is; by all threads.
__device__ __forceinline__ void keep(const ClusterTask& from, ClusterTask& to) {
  const uint64_t base = __cvta_generic_to_grid_constant(&from);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(ClusterTask) / 4); i += CLUSTER_THREADS) {
    uint32_t x;
    asm volatile("ld.param.u32 %0, [%1];" : "=r"(x) : "l"(base + i * 4));
    reinterpret_cast<uint32_t*>(&to)[i] = x;
  }
}
static_assert(sizeof(ClusterTask) % 4 == 0);

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
    for (int i = static_cast<int>(threadIdx.x); i < rows * (LIST_DIM / 2); i += CLUSTER_THREADS) {
      const int row = i / (LIST_DIM / 2), channel = i % (LIST_DIM / 2) * 2, target = channel / CLUSTER_SLICE;
      float2 state = make_float2(NOTHING, 0.0f), sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < CLUSTER_WARPS; ++w) state.x = fmaxf(state.x, room.states[w][row].x);
      const float base = state.x == NOTHING ? 0.0f : state.x;
#pragma unroll
      for (int w = 0; w < CLUSTER_WARPS; ++w) {
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
    constexpr int LANES = CLUSTER_SLICE / 2;  // of a source
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
    for (int i = 0; i < CLUSTER * LANES / 32; ++i) {
      const int from = lane / LANES + 32 / LANES * i;
      add(sum, __shfl_sync(0xffffffffu, weight, from),
          *reinterpret_cast<const float2*>(&room.parts[from][warp][lane % LANES * 2]));
    }
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step), sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
    }
    if (lane < LANES) finish<ListWarp<T>>(s.list, b, head, warp, rank * CLUSTER_SLICE + lane * 2, sum, state);
  }
};
static_assert(CLUSTER % 8 == 0 && CLUSTER <= 16 && LIST_ROWS <= CLUSTER_WARPS, "lanes and warps");

}  // namespace hfl
