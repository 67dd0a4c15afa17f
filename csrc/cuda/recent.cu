// ops.attend_recent and ops.step_recent: attention of up to 8 queries a row to two stores of the same tokens, near keys
// in one of 16 bits and far ones in one of 8 or 4; and, before that, one token a row into both.
//
// Shapes: as attend.cu's. Work: as there, of two tasks for each unit: some blocks read far keys, others near ones, and
//   all are merged as the blocks of one task are, near ones first. Each that reads near keys stores the token itself:
//   nobody waits for another. The first one packs it, too, for the far keys, of which it is none yet. They come last:
//   where more blocks are than the device holds, they run where it has a place left.
// Grid: (units of a KV head, B * Hkv, parts of far and of near keys); 128 threads, 64 for D = 256.
// Shared memory: as attend.cu's of the larger of both formats. Bound by: bytes of far keys and values.
#include <algorithm>

#include "../recent.h"
#include "attend_kernel.cuh"

namespace hfl {
namespace {

constexpr int NEAR_SLABS = 4;  // that a warp reads, as far as there are places

struct RecentTask {
  AttendTask near, far;
  int far_parts;  // blocks of a unit that read far keys, at most
};

// Both a unit's tasks as far as they tell how many blocks have something to do.
struct Share {
  int blocks, each;
  template <int N>
  __device__ Share(const AttendTask& p, Keys<N>& keys, int warps, int place) {
    const int high = __reduce_max_sync(0xffffffffu, place);
    const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
    keys.bound(p.a, high < 0 ? 0 : low, max(high, -1));
    each = slabs_of_warp(keys.count, p.share.divide(keys.count + p.share.by - 1), warps) * warps;
    blocks = max((keys.count + each - 1) / each, 1);
  }
};

// Store a row's token as it is, and packed where that is asked for. By all warps of a block.
template <int WARPS>
__device__ __forceinline__ void store_both(const RecentTask& p, const Unit& unit, bool packed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const hfl_append& near = p.near.turn.append;
  const int64_t pos = near.pos[unit.batch * near.pos_b];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / 32; i < (packed ? 4 : 2); i += WARPS) {
    const hfl_append& a = i < 2 ? near : p.far.turn.append;
    const bool value = i % 2;
    const bool active = lane * 8 < a.dim;
    Raw raw = {};
    if (active) {
      const int64_t from_b = value ? a.fv_b : a.fk_b, from_h = value ? a.fv_h : a.fk_h;
      const int64_t at = unit.batch * from_b + unit.kv_head * from_h + lane * 8;
      raw = load(value ? a.fresh_v : a.fresh_k, at, a.dtype);
    }
    const int64_t slot = slot_of(a, pos);
    if (pos < 0 || slot >= a.capacity) continue;
    write_token(value ? a.v : a.k, unit.batch, unit.kv_head, slot, raw, a.dtype, lane, active);
  }
  __syncthreads();  // the block sees what it has written
}

// What one block does of either task: of far keys, of format F, or of near ones, of format N. Results are merged in F.
template <int D, Format F, Format N, bool NEAR>
__device__ __forceinline__ void recent_part(const RecentTask& both, unsigned char* shared, int index, int part,
                                            int problem) {
  constexpr Format OWN = NEAR ? N : F, OTHER = NEAR ? F : N;
  constexpr int KEYS = Slab<D, OWN>::KEYS, OTHERS = Slab<D, OTHER>::KEYS;
  using R = Room<D, OWN>;
  using M = Room<D, F>;
  const AttendTask& p = NEAR ? both.near : both.far;
  const AttendTask& other = NEAR ? both.far : both.near;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Unit unit(p, index, problem);
  Keys<KEYS> keys(p, unit);
  wait_for_previous(unit.batch | unit.kv_head | unit.first | unit.last | unit.token | keys.count | keys.window);
  Queries<D, OWN>::copy(p, unit, shared);  // while positions are on their way
  const int place = unit.position(both.near, lane % ROWS);
  const int place_far = place < 0 ? place : place - both.far.before;
  int blocks, split = part;  // of the unit, that have something to do
  {
    Warp<D, OWN> mine(p, unit, keys, shared, warp, lane);
    const Share own(p, keys, R::WARPS, NEAR ? place : place_far);
    {
      Keys<OTHERS> others(other, unit);
      const Share theirs(other, others, R::WARPS, NEAR ? place_far : place);
      blocks = own.blocks + theirs.blocks;
      if (!NEAR) split += theirs.blocks;
    }
    mine.step = own.blocks * R::WARPS;
    const int first = part * R::WARPS + warp, end = keys.count;
    typename Warp<D, OWN>::Found found[R::STAGES];
    if (!mine.plain()) {
#pragma unroll
      for (int i = 0; i < R::STAGES; ++i) found[i] = mine.find(first + i * mine.step, end);
    }
    if (NEAR && both.near.turn.append.fresh_k) store_both<R::WARPS>(both, unit, index == 0 && part == 0);
    if (part >= own.blocks) {
      copy_wait<0>();
      return;
    }
    mine.begin(first, end, found);
    prepare_queries<D, OWN>(p, unit, shared, NEAR ? place : place_far);
    mine.walk(first, end);
    __syncthreads();  // the rings are free
    leave(mine, reinterpret_cast<float*>(shared) + warp * ROWS * R::OUT,
          reinterpret_cast<float2*>(shared + R::STATES) + warp * ROWS);
  }
  __syncthreads();
  constexpr float LIFT = Warp<D, F>::LIFT - Warp<D, OWN>::LIFT;  // sums are as if weights had been that of F
  if constexpr (LIFT != 0.0f) {
    if (threadIdx.x < R::WARPS * ROWS) reinterpret_cast<float2*>(shared + R::STATES)[threadIdx.x].x += LIFT;
    __syncthreads();
  }
  const Scratch<D> scratch(both.far, problem, index);
  merge_warps<D, OWN>(p, unit, shared, scratch, split, false);
  int* arrived = reinterpret_cast<int*>(shared + M::FACTORS);
  if (!last_to_arrive(both.far.a.counters + problem * p.units + index, blocks, arrived)) return;
  if (threadIdx.x < ROWS) reinterpret_cast<int*>(shared + M::PLACES)[threadIdx.x] = place;
  merge_blocks<D, F>(both.far, unit, shared, scratch, blocks);
}

template <int D, Format F, Format N>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_recent_kernel(
    const __grid_constant__ RecentTask both) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int index = static_cast<int>(blockIdx.x), problem = static_cast<int>(blockIdx.y);
  const int part = static_cast<int>(blockIdx.z);
  if (part < both.far_parts) {
    recent_part<D, F, N, false>(both, shared, index, part, problem);
  } else {
    recent_part<D, F, N, true>(both, shared, index, part - both.far_parts, problem);
  }
}

struct Kernel {
  const void* function;
  int warps, bytes, slab, near_slab;  // shared memory; keys of a slab
  std::atomic<int>* fits;             // blocks that the device holds at a time; 0: not known yet
};

template <int D, Format F, Format N>
const Kernel& kernel() {
  static std::atomic<int> fits[MOST_DEVICES];
  static const Kernel it = {reinterpret_cast<const void*>(&attend_recent_kernel<D, F, N>),
                            Room<D, F>::WARPS,
                            std::max(Room<D, F>::bytes(1), Room<D, N>::bytes(1)),
                            Slab<D, F>::KEYS,
                            Slab<D, N>::KEYS,
                            fits};
  return it;
}

template <int D, Format F>
const Kernel& kernel_of(const hfl_attend& a) {
  return a.dtype == HFL_BF16 ? kernel<D, F, Format::bf16>() : kernel<D, F, Format::f16>();
}

template <int D>
const Kernel& kernel_of(const hfl_attend& a) {
  return a.k.bits == 4 ? kernel_of<D, Format::int4>(a) : kernel_of<D, Format::int8>(a);
}

const Kernel& kernel_of(const hfl_attend& a) {
  if (a.dim == 64) return kernel_of<64>(a);
  if (a.dim == 96) return kernel_of<96>(a);
  return a.dim == 128 ? kernel_of<128>(a) : kernel_of<256>(a);
}

AttendTask task_of(const hfl_attend& a, int parts, const Kernel& kernel) {
  AttendTask p = {};
  p.turn.append = {}, p.a = a, p.group = a.q_heads / a.kv_heads, p.variants = 1;
  p.units = (p.group * a.tokens + ROWS - 1) / ROWS;
  p.kv_heads = Divisor(a.kv_heads), p.tokens = Divisor(a.tokens), p.tiles = Divisor(p.units), p.block = Divisor(1);
  p.share = Divisor(parts * kernel.warps);
  return p;
}

cudaError_t blocks_that_fit(const Kernel& kernel, int& blocks) {
  int device = 0, each = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  blocks = device < MOST_DEVICES ? kernel.fits[device].load(std::memory_order_acquire) : 0;
  if (blocks) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, kernel.warps * 32,
                                                          static_cast<size_t>(kernel.bytes));
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  blocks = each * processors;
  if (device < MOST_DEVICES) kernel.fits[device].store(blocks, std::memory_order_release);
  return cudaSuccess;
}

// Blocks of a unit for so many keys, of at most `most`.
int parts_of(int64_t keys, int slab, int warps, int most) {
  const int slabs = static_cast<int>((keys + slab - 1) / slab);
  const int wanted = (slabs + most * warps - 1) / (most * warps);
  const int each = slabs_of_warp(slabs, wanted, warps) * warps;
  return (slabs + each - 1) / each;
}

const char* check(const hfl_recent& a) {
  for (const hfl_attend* one : {&a.near, &a.far}) {
    const char* message = wrong_attend(*one);
    if (message) return message;
    if (one->ids || one->q_before || one->slopes || one->sink || !one->q_pos) {
      return "attend_recent: expected positions, and neither a selection nor turns, slopes or sinks";
    }
  }
  const hfl_attend &near = a.near, &far = a.far;
  if (near.k.bits || !far.k.bits || far.window >= 0 || a.recent < 1) {
    return "attend_recent: expected near keys of 16 bits, and all far ones, of few bits";
  }
  if (near.batch != far.batch || near.q_heads != far.q_heads || near.kv_heads != far.kv_heads ||
      near.tokens != far.tokens || near.dim != far.dim || near.dtype != far.dtype || near.q != far.q) {
    return "attend_recent: expected the same queries for near and for far keys";
  }
  if (!a.near_append.fresh_k && !a.far_append.fresh_k) return nullptr;
  for (const hfl_append* one : {&a.near_append, &a.far_append}) {
    const char* message = wrong_append(*one);
    if (message) return message;
    if (one->tokens != 1 || far.tokens != 1 || one->batch != far.batch || one->kv_heads != far.kv_heads ||
        one->dim != far.dim || one->dtype != far.dtype || one->bounds || !one->fresh_k || !one->fresh_v) {
      return "step_recent: expected one token a row and KV head, and no bounds";
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_recent_counters(const hfl_recent* a) {
  if (hfl::check(*a)) return 0;  // hfl_recent_cuda will say why
  const int64_t queries = static_cast<int64_t>(a->far.q_heads / a->far.kv_heads) * a->far.tokens;
  return static_cast<int64_t>(a->far.batch) * a->far.kv_heads * ((queries + hfl::ROWS - 1) / hfl::ROWS);
}

extern "C" int64_t hfl_recent_scratch(hfl_recent* a) {
  a->near.splits = a->far.splits = 1;
  const int64_t units = hfl_recent_counters(a);
  if (!units) return 0;
  const hfl::Kernel& kernel = hfl::kernel_of(a->far);
  int fit = 0;
  if (hfl::blocks_that_fit(kernel, fit) == cudaSuccess) {
    const int all = static_cast<int>(std::clamp<int64_t>(fit / units, 2, hfl::MOST_SPLITS));
    const int near = hfl::parts_of(a->near.stored, kernel.near_slab * hfl::NEAR_SLABS, kernel.warps, all / 4 + 1);
    // near keys take a place for a moment: where that is one of few, they come on top
    const int far = 8 * near <= all ? all - near : std::min(all, hfl::MOST_SPLITS - near);
    a->near.splits = near, a->far.splits = hfl::parts_of(a->far.stored, kernel.slab, kernel.warps, far);
  }
  return units * (a->near.splits + a->far.splits) * hfl::ROWS * (a->far.dim + 2) * static_cast<int64_t>(sizeof(float));
}

extern "C" const char* hfl_recent_cuda(const hfl_recent* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const int parts = a->near.splits + a->far.splits;
  if (a->near.splits < 1 || a->far.splits < 1 || parts > hfl::MOST_SPLITS || !a->far.scratch || !a->far.counters) {
    return "attend_recent: expected the splits of hfl_recent_scratch, scratch and counters";
  }
  const hfl::Kernel& kernel = hfl::kernel_of(a->far);
  hfl::RecentTask task = {};
  task.far_parts = a->far.splits;
  task.near = hfl::task_of(a->near, a->near.splits, kernel), task.far = hfl::task_of(a->far, a->far.splits, kernel);
  task.near.splits = task.far.splits = parts;
  task.near.turn.append = a->near_append, task.far.turn.append = a->far_append;
  task.far.before = a->recent;
  int fit = 0;
  cudaError_t error = hfl::blocks_that_fit(kernel, fit);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 grid(static_cast<unsigned>(task.far.units),
                  static_cast<unsigned>(a->far.batch) * static_cast<unsigned>(a->far.kv_heads),
                  static_cast<unsigned>(parts));
  void* arguments[] = {&task};
  error = hfl::launch(kernel.function, grid, kernel.warps * 32, static_cast<size_t>(kernel.bytes), a->far.stream,
                      arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
