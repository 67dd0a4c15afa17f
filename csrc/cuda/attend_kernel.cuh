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

template <int WARPS>
__device__ __forceinline__ int slabs_of_block(const AttendTask& p, int slabs) {
  return slabs_of_warp(slabs, p.share.divide(slabs + p.share.by - 1), WARPS) * WARPS;
}

// A slab of blocks that were chosen some steps ago, into the L2, while the kernels before this one may still run: which
// ones these are is read past the L1, which must not hold it, and where it is not what it will be, this was in vain.
template <int D, Format F>
__device__ __forceinline__ void prefetch_slab(const AttendTask& p, const Unit& unit, const int32_t* ids, int slab,
                                              int end, int lane) {
  using S = Slab<D, F>;
  const hfl_attend& a = p.a;
  const hfl_rows& rows = lane ? a.v : a.k;
  constexpr int WIDTH = S::PACKED ? 1 : 2;  // bytes of what strides count
  if (slab >= end || lane > 1 || a.pages || a.block % S::KEYS || rows.t * WIDTH != S::ROW) return;
  const int block = p.block.divide(slab * S::KEYS), within = slab * S::KEYS - block * a.block;
  const int64_t column = block < a.chosen ? static_cast<int64_t>(__ldcg(ids + block)) * a.block + within : -1;
  if (column < 0 || column + S::KEYS > a.stored) return;
  prefetch(static_cast<const char*>(rows.data) + (unit.batch * rows.b + unit.kv_head * rows.h) * WIDTH +
               column * S::ROW,
           S::BYTES);
}

// A step's token of a row and KV head. All blocks of the head store it, the same bits, so that none waits for another.
struct Token {
  const AttendTurn& turn;
  int batch, head;
  Raw raw;  // eight channels of a lane: of the key in the first warp, of the value in the second

  __device__ Token(const AttendTurn& turn_, const Unit& unit) : turn(turn_), batch(unit.batch), head(unit.kv_head) {
    const hfl_append& a = turn.append;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    raw = {};
    if (turn.turn == Turn::alone || warp > 1 || lane * 8 >= (warp ? a.v_dim : a.dim)) return;
    const int from = turn.heads.of(head);
    const int64_t at = warp ? batch * a.fv_b + from * a.fv_h : batch * a.fk_b + from * a.fk_h;
    raw = load(warp ? a.fresh_v : a.fresh_k, at + lane * 8, a.dtype);
  }
  // Then the block may read it.
  __device__ __forceinline__ void store(int pos) const {
    const hfl_append& a = turn.append;
    if (turn.turn == Turn::alone) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t slot = slot_of(a, pos);
    if (warp < 2 && pos >= 0 && slot < a.capacity) {
      write_token(warp ? a.v : a.k, batch, head, slot, raw, a.dtype, lane, lane * 8 < (warp ? a.v_dim : a.dim));
    }
    __syncthreads();
  }
  // The bounds of its sub-block, by a block that has stored it.
  template <int THREADS>
  __device__ __forceinline__ void sum_up(int pos, float* room) const {
    const hfl_append& a = turn.append;
    if (pos < 0 || pos >= a.capacity) return;
    const int entry = pos / a.sub;
    const int64_t at = batch * a.bounds_b + head * a.bounds_h + static_cast<int64_t>(entry) * 2 * a.dim;
    __syncthreads();  // there is room
    bound<THREADS>(a, batch, head, static_cast<int64_t>(entry) * a.sub, pos, static_cast<char*>(a.bounds) + at * 2,
                   room);
  }
};

template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_kernel(const __grid_constant__ AttendTask p) {
  using R = Room<D, F>;
  extern __shared__ __align__(128) unsigned char shared[];
  const AttendTurn& turn = p.turn;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int index = static_cast<int>(blockIdx.x), problem = static_cast<int>(blockIdx.z);
  const int split = static_cast<int>(blockIdx.y);
  const Unit unit(p, index, problem);
  Keys<Slab<D, F>::KEYS> keys(p, unit);
  int each = slabs_of_block<R::WARPS>(p, keys.count);
  if (turn.turn == Turn::first && keys.ids && !turn.picked) {  // while the kernel before this one ends
    const int first = split * each + warp, end = min(keys.count, (split + 1) * each);
    for (int i = 0; i < R::STAGES; ++i) prefetch_slab<D, F>(p, unit, keys.ids, first + i * R::WARPS, end, lane);
  }
  begin_turn(turn.turn, unit.batch | unit.kv_head | unit.first | unit.last | unit.token | keys.count | keys.window);

  const int place = unit.position(p, lane % ROWS);
  const Token token(turn, unit);
  {
    Warp<D, F> mine(p, unit, keys, shared, warp, lane);
    typename Warp<D, F>::Found found[R::STAGES];
    int first = 0, end = 0;
    const auto share_out = [&] {
      each = slabs_of_block<R::WARPS>(p, keys.count);
      first = split * each + warp, end = min(keys.count, (split + 1) * each);
    };
    const auto find = [&] {
#pragma unroll
      for (int i = 0; i < R::STAGES; ++i) found[i] = mine.find(first + i * R::WARPS, end);
    };
    if (keys.listed()) share_out();
    if (keys.listed() && !turn.picked) find();
    Queries<D, F>::copy(p, unit, shared);  // while positions, and what tells where keys lie, are on their way
    const int high = __reduce_max_sync(0xffffffffu, place);
    const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
    keys.bound(p.a, high < 0 ? 0 : low, high);
    if (!keys.listed()) share_out(), find();
    if (split > 0 && split * each >= keys.count) {
      copy_wait<0>();
      end_turn(turn.turn);
      return;
    }
    token.store(high);
    if (turn.picked) {
      if (threadIdx.x == 0) wait_until(turn.picked + keys.row, 1);
      __syncthreads();
      find();
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
  merge_warps<D, F>(p, unit, shared, scratch, split, blocks == 1);
  bool last = blocks == 1;
  if (!last) {
    int* arrived = reinterpret_cast<int*>(shared + R::FACTORS);
    last = last_to_arrive(p.a.counters + problem * p.units + index, blocks, arrived);
    if (last) merge_blocks<D, F>(p, unit, shared, scratch, blocks);
  }
  if (last && turn.picked && threadIdx.x == 0) atomicSub(turn.picked + keys.row, 1);  // all blocks have read it
  if (turn.append.bounds && split == 0 && index == 0) {
    token.template sum_up<R::WARPS * 32>(keys.high, reinterpret_cast<float*>(shared));
  }
  end_turn(turn.turn);
}

}  // namespace hfl
