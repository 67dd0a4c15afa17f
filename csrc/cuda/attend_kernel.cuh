// Decode attention: the kernel. attend.cu says what it computes and how the work is cut.
#pragma once
#include "attend_merge.cuh"
#include "attend_queries.cuh"
#include "launch.cuh"

namespace hfl {

// For all warps: positions and slopes of a unit's queries, and these, whose copies have been begun before those of the
// ring, as operands.
template <int D, Format F>
__device__ void prepare_queries(const AttendTask& p, const Unit& unit, unsigned char* shared, int place) {
  using R = Room<D, F>;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < ROWS) {
    reinterpret_cast<int*>(shared + R::PLACES)[thread] = place;
    reinterpret_cast<float*>(shared + R::SLOPES)[thread] =
        p.a.slopes && thread < unit.rows() ? p.a.slopes[unit.head(p, thread)] : 0.0f;
  }
  copy_wait<2 * R::STAGES>();
  __syncthreads();
  if constexpr (Slab<D, F>::PACKED) {
    for (int v = thread / 32; v < p.variants; v += R::WARPS) Queries<D, F>::scale(p, shared, v, thread % 32);
    __syncthreads();
  }
}

template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_kernel(const __grid_constant__ AttendTask p) {
  using R = Room<D, F>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int index = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int problem = static_cast<int>(blockIdx.z);
  const Unit unit(p, index, problem);
  Keys<Slab<D, F>::KEYS> keys(p, unit);
  wait_for_previous(unit.batch | unit.kv_head | unit.first | unit.last | unit.token | keys.count | keys.window);

  const int place = unit.position(p, lane % ROWS);
  int each = 0;  // slabs of a block
  {
    Warp<D, F> mine(p, unit, keys, shared, warp, lane);
    typename Warp<D, F>::Found found[R::STAGES];
    int first = 0, end = 0;
    const auto share_out = [&] {
      const int wanted = p.share.divide(keys.count + p.share.by - 1);
      each = slabs_of_warp(keys.count, wanted, R::WARPS) * R::WARPS;
      first = split * each + warp, end = min(keys.count, (split + 1) * each);
#pragma unroll
      for (int i = 0; i < R::STAGES; ++i) found[i] = mine.find(first + i * R::WARPS, end);
    };
    if (keys.listed()) share_out();
    Queries<D, F>::copy(p, unit, shared);  // while positions, and what tells where keys lie, are on their way
    const int high = __reduce_max_sync(0xffffffffu, place);
    const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
    keys.bound(p.a, high < 0 ? 0 : low, high);
    if (!keys.listed()) share_out();
    if (split > 0 && split * each >= keys.count) {
      copy_wait<0>();
      return;
    }
    mine.begin(first, end, found);
    prepare_queries<D, F>(p, unit, shared, place);  // while the first keys are on their way
    mine.walk(first, end);
    __syncthreads();  // the rings are free
    mine.leave(reinterpret_cast<float*>(shared) + warp * ROWS * R::OUT,
               reinterpret_cast<float2*>(shared + R::STATES) + warp * ROWS);
  }
  const int blocks = max((keys.count + each - 1) / each, 1);  // that have something to do
  __syncthreads();
  const Scratch<D> scratch(p, problem, index);
  merge_warps<D, F>(p, unit, shared, scratch, blocks == 1);
  if (blocks == 1) return;
  int* arrived = reinterpret_cast<int*>(shared + R::FACTORS);
  if (last_to_arrive(p.a.counters + problem * p.units + index, blocks, arrived)) {
    merge_blocks<D, F>(p, unit, shared, scratch, blocks);
  }
}

}  // namespace hfl
