// Decode attention: the kernel. attend.cu says what it computes and how the work is cut.
#pragma once
#include "append.cuh"
#include "attend_merge.cuh"
#include "attend_queries.cuh"

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

// The last of a unit's blocks to be done has read what it waited for.
__device__ __forceinline__ void count_down(const AttendTurn& turn, int problem, int row) {
  if (threadIdx.x != 0 || !turn.appended) return;
  wait_until(turn.appended + problem, 1);  // a row without a query waited for no token
  atomicSub(turn.appended + problem, 1);
  if (turn.picked) atomicSub(turn.picked + row, 1);
}

// What a block does; split -1: stores the token.
template <int D, Format F>
__device__ __forceinline__ void attend_part(const AttendTask& p, unsigned char* shared, int index, int split,
                                            int problem) {
  using R = Room<D, F>;
  const AttendTurn& turn = p.turn;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Unit unit(p, index, problem);
  Keys<Slab<D, F>::KEYS> keys(p, unit);
  begin_turn(turn.turn, unit.batch | unit.kv_head | unit.first | unit.last | unit.token | keys.count | keys.window);
  if (split < 0) {
    if (index == 0) {
      append_token<R::WARPS * 32>(turn.append, turn.heads.of(unit.kv_head), unit.batch, unit.kv_head,
                                  turn.appended + problem, p.units, reinterpret_cast<float*>(shared));
    }
    end_turn(turn.turn);
    return;
  }

  const int place = unit.position(p, lane % ROWS);
  int blocks = 0;  // that have something to do
  {
    Warp<D, F> mine(p, unit, keys, shared, warp, lane);
    typename Warp<D, F>::Found found[R::STAGES];
    int first = 0, end = 0;
    const auto share_out = [&] {
      const int wanted = p.share.divide(keys.count + p.share.by - 1);
      const int each = slabs_of_warp(keys.count, wanted, R::WARPS) * R::WARPS;
      blocks = max((keys.count + each - 1) / each, 1);
      first = split * R::WARPS + warp, end = keys.count, mine.step = blocks * R::WARPS;
    };
    const auto find = [&] {
      if (mine.plain()) return;
#pragma unroll
      for (int i = 0; i < R::STAGES; ++i) found[i] = mine.find(first + i * mine.step, end);
    };
    if (keys.listed()) share_out();
    if (keys.listed() && !turn.picked) find();
    Queries<D, F>::copy(p, unit, shared);  // while positions, and what tells where keys lie, are on their way
    const int high = __reduce_max_sync(0xffffffffu, place);
    const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
    keys.bound(p.a, high < 0 ? 0 : low, high);
    if (!keys.listed()) share_out(), find();
    if (split >= blocks) {
      copy_wait<0>();
      end_turn(turn.turn);
      return;
    }
    if (turn.picked) {
      if (threadIdx.x == 0) wait_until(turn.picked + keys.row, 1);
      __syncthreads();
      find();
    }
    mine.begin(first, end, found);
    prepare_queries<D, F>(p, unit, shared, place);  // while the first keys are on their way
    mine.walk(first, end);
    __syncthreads();  // the rings are free
    leave(mine, reinterpret_cast<float*>(shared) + warp * ROWS * R::OUT,
          reinterpret_cast<float2*>(shared + R::STATES) + warp * ROWS);
  }
  __syncthreads();
  const Scratch<D> scratch(p, problem, index);
  merge_warps<D, F>(p, unit, shared, scratch, split, blocks == 1);
  bool last = blocks == 1;
  if (!last) {
    int* arrived = reinterpret_cast<int*>(shared + R::FACTORS);
    last = last_to_arrive(p.a.counters + problem * p.units + index, blocks, arrived);
    if (last) merge_blocks<D, F>(p, unit, shared, scratch, blocks);
  }
  if (last) count_down(turn, problem, keys.row);
  end_turn(turn.turn);
}

template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_kernel(const __grid_constant__ AttendTask p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int split = static_cast<int>(blockIdx.y) - (p.turn.appended ? 1 : 0);
  attend_part<D, F>(p, shared, static_cast<int>(blockIdx.x), split, static_cast<int>(blockIdx.z));
}

// Two groups of heads of a step.
template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_both_kernel(
    const __grid_constant__ AttendTasks all) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int line = static_cast<int>(blockIdx.x), second = line >= all.first ? 1 : 0;
  const int own = line - (second ? all.first : 0);
  const AttendTask& p = all.of[second];
  const int problem = all.blocks[second].divide(own), split = own - problem * all.blocks[second].by - 1;
  attend_part<D, F>(p, shared, 0, split, problem);
}

}  // namespace hfl
