// A whole step of a short row that chooses, by a cluster of blocks for each KV head: scores, the choice, and attention.
// attend_cluster.cu says how the work is cut.
#pragma once
#include "attend_cluster_choice.cuh"
#include "attend_list_merge.cuh"
#include "barrier.cuh"

namespace hfl {

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
      float2 state;
      const float2 sum = sum_of_warps(ring, STREAM_TILE, room.states, row, channel, state);
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
