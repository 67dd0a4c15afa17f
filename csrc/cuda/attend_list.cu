// A step over a list of blocks, for one query a row of 16 bits and 128 channels: the list is chosen where it is read.
//
// Work: the slabs of 16 keys of a list are cut into `splits` parts, a block each, whose 8 warps take every 8th slab of
//   it. Where the list is chosen, each block finds all of the choice, and the entries of its own part, which it also
//   writes down for later steps. Where it stands, it and the keys it names are read before the kernels before this one
//   are done, and what these may have written is read again: the list, and keys of the last tokens. The step's own
//   token comes from where it is fresh; a block beside the parts stores it. The last block of a KV head merges all, in
//   their order: results do not depend on timing.
// Grid: (1 + splits, B * Hkv); 256 threads. Shared memory: 19 to 36 KiB.
// Bound by: latency. Two blocks of a multiprocessor keep 128 KiB on their way.
#include <algorithm>

#include "attend_list.cuh"

namespace hfl {
namespace {

constexpr int THREADS = CHOOSERS;
constexpr int PARTS = 128;  // of all lists, about: one for each multiprocessor, which leaves room for what comes next

// What a block leaves for the last one: for each of its rows LIST_DIM sums, and the largest logit and the total.
__device__ __forceinline__ float* scratch_of(const ListTask& p, int problem, int split) {
  return static_cast<float*>(p.a.scratch) + (static_cast<int64_t>(problem) * p.splits + split) * p.group * LIST_OUT;
}

__device__ __forceinline__ void add(float2& sum, float weight, const float2& x) {
  sum.x += weight * x.x, sum.y += weight * x.y;
}

// Two channels of a row, of all warps.
__device__ __forceinline__ void merge_warps(const unsigned char* room, const ListShared& shared, int rows, int row,
                                            int channel, float* to) {
  float2 state = make_float2(NOTHING, 0.0f), sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int w = 0; w < LIST_WARPS; ++w) state.x = fmaxf(state.x, shared.states[w][row].x);
  const float base = state.x == NOTHING ? 0.0f : state.x;
#pragma unroll
  for (int w = 0; w < LIST_WARPS; ++w) {
    const float2 own = shared.states[w][row];
    const float weight = power_of_two(own.x - base);
    state.y += weight * own.y;
    add(sum, weight, reinterpret_cast<const float2*>(room + w * ListShared::warp_bytes(rows))[(row * LIST_OUT + channel) / 2]);
  }
  *reinterpret_cast<float2*>(to + row * LIST_OUT + channel) = sum;
  if (channel == 0) *reinterpret_cast<float2*>(to + row * LIST_OUT + LIST_DIM) = state;
}

// The same of all blocks.
template <typename T>
__device__ __forceinline__ void merge_blocks(const ListTask& p, int b, int head, int problem, int row, int channel) {
  constexpr int BATCH = 8;
  const int stride = p.group * LIST_OUT;
  const float* from = scratch_of(p, problem, 0) + row * LIST_OUT;
  float2 state = make_float2(NOTHING, 0.0f), sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
  for (int first = 0; first < p.splits; first += BATCH, from += BATCH * stride) {
    float2 states[BATCH], sums[BATCH];
    float higher = state.x;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const bool there = first + i < p.splits;
      states[i] = make_float2(NOTHING, 0.0f), sums[i] = make_float2(0.0f, 0.0f);
      if (there) states[i] = __ldcg(reinterpret_cast<const float2*>(from + i * stride + LIST_DIM));
      if (there) sums[i] = __ldcg(reinterpret_cast<const float2*>(from + i * stride + channel));
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) higher = fmaxf(higher, states[i].x);
    const float base = higher == NOTHING ? 0.0f : higher, down = power_of_two(state.x - base);
    state.x = higher, state.y *= down, sum.x *= down, sum.y *= down;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const float weight = power_of_two(states[i].x - base);
      state.y += weight * states[i].y;
      add(sum, weight, sums[i]);
    }
  }
  const int q_head = p.heads.of(head) * p.group + row;
  float total = state.y, factor = 1.0f;
  if (p.a.sink_logits) {
    const float logit = p.a.sink_logits[q_head] * LOG2E, higher = fmaxf(state.x, logit);
    factor = power_of_two(state.x - higher);
    total = total * factor + power_of_two(logit - higher + lift(T()));
  }
  factor = state.y == 0.0f ? 0.0f : __fdividef(factor, total);
  T* to = static_cast<T*>(p.a.out) + b * p.a.out_b + q_head * p.a.out_h + channel;
  const uint32_t both = factor == 0.0f ? 0u : pack(sum.x * factor, sum.y * factor, T());
  *reinterpret_cast<uint32_t*>(to) = both;
}

// Entries `start` to `end` - 1 of the list of a row and KV head, once its scores are there. By all threads.
template <int EACH>
__device__ __forceinline__ void choose_part(const hfl_pick& a, const int* scored, int tiles, ChooseRoom& room, int b,
                                            int problem, int start, int end, int* list) {
  const ListShape shape(a, b);
  if (threadIdx.x == 0) wait_until(scored + problem, tiles);
  __syncthreads();
#pragma unroll 1
  for (int i = start + static_cast<int>(threadIdx.x); i < end; i += THREADS) {
    const int block = shape.at(i);
    if (block != -2) list[i - start] = block;
  }
  if (!shape.chosen()) return;
  Chooser<EACH> chooser(room);
  chooser.load(a.scores + static_cast<int64_t>(problem) * CHOOSERS * EACH, shape.first, shape.last);
  chooser.choose(shape.taken, shape.first, start, end, list);
}

// All of the list, for others to read.
template <int EACH>
__global__ void __launch_bounds__(THREADS, 2) choose_kernel(const __grid_constant__ ChooseTask p) {
  __shared__ __align__(16) ChooseRoom room;
  const int problem = static_cast<int>(blockIdx.x), b = p.heads.divide(problem);
  room.clear();
  begin_turn(p.turn.turn, b);
  int32_t* to = p.a.ids + static_cast<int64_t>(problem) * p.a.chosen;
  choose_part<EACH>(p.a, p.turn.scored, p.tiles, room, b, problem, 0, p.a.chosen, to);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.turn.scored[problem] = 0;
    store_in_order(p.turn.picked + problem, p.turn.readers);
  }
  end_turn(p.turn.turn);
}

// Which of the parts a block has, read anew where registers are short.
struct Part {
  int split, problem, b, head;

  __device__ __forceinline__ explicit Part(const ListTask& p) {
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(split));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(problem));
    --split;
    b = p.kv_heads.divide(problem), head = problem - b * p.kv_heads.by;
  }
};

// What the warps left, to scratch, and what all blocks did to the output, by the last one.
template <typename T>
__device__ __forceinline__ void merge(const ListTask& p, ListShared& shared, const unsigned char* room, bool choice) {
  const int thread = static_cast<int>(threadIdx.x), all = p.group * (LIST_DIM / 2);
  const Part part(p);
  for (int i = thread; i < all; i += THREADS) {
    float* to = scratch_of(p, part.problem, part.split);
    merge_warps(room, shared, p.group, i / (LIST_DIM / 2), i % (LIST_DIM / 2) * 2, to);
  }
  __syncthreads();
  if (thread == 0) shared.arrived = add_in_order(p.a.counters + part.problem, 1);
  __syncthreads();
  if (shared.arrived != p.splits - 1) return;
  if (thread == 0) p.a.counters[part.problem] = 0;
  if (thread == 0 && choice) p.scored[part.problem] = 0;
  for (int i = thread; i < all; i += THREADS) {
    merge_blocks<T>(p, part.b, part.head, part.problem, i / (LIST_DIM / 2), i % (LIST_DIM / 2) * 2);
  }
}

template <typename T, int EACH>
__global__ void __launch_bounds__(THREADS, 2) attend_list_kernel(const __grid_constant__ ListTask p) {
  extern __shared__ __align__(16) unsigned char memory[];
  ListShared& shared = *reinterpret_cast<ListShared*>(memory);
  unsigned char* room = memory + ListShared::start();
  const hfl_attend& a = p.a;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Part part(p);
  if (part.split < 0) {
    begin_turn(p.turn, part.b | part.head);
    append_token<THREADS>(p.append, p.heads.of(part.head), part.b, part.head, nullptr, 0,
                          reinterpret_cast<float*>(room));
    end_turn(p.turn);
    return;
  }
  // Entries of the list that the part has something of, and slabs counted from the first one's.
  const int from = part.split * p.share, start = p.each.divide(from);
  const int entries = p.each.divide(min(from + p.share, p.slabs) - 1) + 1 - start;
  const int first = from - start * p.each.by + warp, end = min(p.share, p.slabs - from) + first - warp;
  const auto key_of = [&](int slab, int id) {  // the first one of the slab; -1: none
    return id < 0 ? -1 : id * a.block + (slab - p.each.divide(slab) * p.each.by) * LIST_SLAB;
  };
  const auto find = [&](int slab) { return slab < end ? key_of(slab, shared.list[p.each.divide(slab)]) : -1; };
  const int32_t* ids = a.ids + part.b * a.ids_b + (a.select_heads == 1 ? 0 : part.head) * a.ids_h + start;
  ListWarp<T> mine(p, part.b, part.head, room + warp * ListShared::warp_bytes(p.group), lane);
  int at = -1;
  if constexpr (EACH > 0) {
    reinterpret_cast<ChooseRoom*>(room)->clear();
  } else {
    if (first < end) at = key_of(first, __ldcg(ids + p.each.divide(first)));
    if (at >= 0 && at + LIST_SLAB <= a.stored) mine.load_keys(at), mine.copy_values(at);
  }
  begin_turn(p.turn, at + 1);
  if (EACH == 0) {
    for (int i = thread; i < entries; i += THREADS) shared.list[i] = __ldcg(ids + i);
  }
  mine.limit = static_cast<int>(min(a.q_pos[part.b * a.q_pos_b], static_cast<int64_t>(a.stored)));
  if (warp < LIST_DIM / 32) {
    uint4 q = make_uint4(0, 0, 0, 0);
    const int head = p.heads.of(part.head) * p.group + (lane >> 2);
    const T* of = static_cast<const T*>(a.q) + part.b * a.q_b + head * a.q_h;
    if ((lane >> 2) < p.group) q = *reinterpret_cast<const uint4*>(of + warp * 32 + (lane & 3) * 8);
    shared.queries[warp][lane] = q;
  }
  if constexpr (EACH > 0) {
    choose_part<EACH>(p.pick, p.scored, p.tiles, *reinterpret_cast<ChooseRoom*>(room), part.b, part.problem, start,
                      start + entries, shared.list);
    __syncthreads();
    int32_t* to = p.pick.ids + static_cast<int64_t>(part.problem) * a.chosen + start;
    for (int i = thread; i < entries; i += THREADS) to[i] = shared.list[i];
  } else {
    __syncthreads();
  }
  {
    const int again = find(first);
    const bool stands = EACH == 0 && again == at && mine.whole(at + RECENT);
    at = again;
    if (EACH == 0 && !stands) {
      copy_wait<0>();
      __syncwarp();
    }
    if (!stands && mine.whole(at)) mine.load_keys(at), mine.copy_values(at);
  }
#pragma unroll 1
  for (int slab = first; slab < end; slab += LIST_WARPS) {
    const int after = find(slab + LIST_WARPS);
    if (at >= 0 && !mine.whole(at)) mine.load_last(p, at);
    if (at >= 0) mine.attend(p, shared.queries, at, mine.whole(after) ? after : -1);
    at = after;
  }
  mine.leave(shared.states[warp], p.group);
  __syncthreads();
  merge<T>(p, shared, room, EACH > 0);
  end_turn(p.turn);
}

template <typename T>
const void* kernel_of(int each) {
  if (each == 0) return reinterpret_cast<const void*>(&attend_list_kernel<T, 0>);
  return each == 12 ? reinterpret_cast<const void*>(&attend_list_kernel<T, 12>)
                    : reinterpret_cast<const void*>(&attend_list_kernel<T, 36>);
}

bool same_rows(const hfl_rows& x) { return x.bits == 0 && x.t == LIST_DIM; }

int chosen_each(const hfl_layer_group& g) { return g.score.scores ? each_of(g.pick.blocks) : 0; }

ListTask task_of(const hfl_layer_group& g) {
  const hfl_attend& a = g.attend;
  ListTask p = {};
  p.a = a, p.append = g.append, p.group = a.q_heads / a.kv_heads;
  p.each = Divisor(a.block / LIST_SLAB), p.kv_heads = Divisor(a.kv_heads);
  p.slabs = a.chosen * p.each.by;
  const int parts = std::max(PARTS / (a.batch * a.kv_heads), 1);
  p.share = std::clamp((p.slabs - 1) / parts + 1, LIST_WARPS, MOST_SHARE), p.splits = (p.slabs - 1) / p.share + 1;
  return p;
}

}  // namespace

bool chooses(const hfl_layer_group& g) {
  return g.score.scores && score_streams(g.score) && g.append.bounds && g.append.ring <= 0;
}

int64_t chosen_scores(const hfl_layer_group& g) {
  return static_cast<int64_t>(g.score.batch) * g.score.kv_heads * CHOOSERS * chosen_each(g);
}

const char* choose_in_turn(const hfl_layer_group& g, const float* scores, const PickTurn& turn, void* stream) {
  ChooseTask p = {};
  p.a = g.pick, p.a.scores = scores, p.heads = Divisor(g.pick.heads), p.tiles = score_tiles(g.score), p.turn = turn;
  const void* kernel = chosen_each(g) == 12 ? reinterpret_cast<const void*>(&choose_kernel<12>)
                                            : reinterpret_cast<const void*>(&choose_kernel<36>);
  void* arguments[] = {&p};
  const unsigned problems = static_cast<unsigned>(g.pick.batch) * static_cast<unsigned>(g.pick.heads);
  const cudaError_t error = launch(kernel, dim3(problems), THREADS, 0, stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool list_takes(const hfl_layer_group& g) {
  const hfl_attend& a = g.attend;
  if (!a.ids || a.pages || a.q_before || a.slopes || a.softcap != 0.0f || !same_rows(a.k) || !same_rows(a.v)) return false;
  if (a.dim != LIST_DIM || a.v_dim != LIST_DIM || a.q_heads / a.kv_heads > LIST_ROWS || a.block % LIST_SLAB) return false;
  if (a.select_heads != 1 && a.select_heads != a.kv_heads) return false;
  if (g.append.ring > 0 || g.append.dtype != a.dtype || !waits(kernel_of<__half>(0))) return false;
  if (static_cast<int64_t>(a.chosen) * (a.block / LIST_SLAB) > INT_MAX / 2) return false;
  return !g.score.scores || (chooses(g) && g.score.dtype == a.dtype);
}

int64_t list_scratch(const hfl_layer_group& g) {
  const ListTask p = task_of(g);
  return static_cast<int64_t>(g.attend.batch) * g.attend.kv_heads * p.splits * p.group * LIST_OUT * 4;
}

const char* list_in_turn(const hfl_layer_group& g, const ListTurn& turn) {
  ListTask p = task_of(g);
  p.a.scratch = turn.scratch, p.a.counters = turn.arrived, p.heads = turn.heads, p.turn = turn.turn;
  p.pick = g.pick, p.pick.scores = turn.scores, p.scored = turn.scored;
  if (g.score.scores) p.tiles = score_tiles(g.score);
  const int each = chosen_each(g), bytes = ListShared::bytes(p.group);
  const void* kernel = g.attend.dtype == HFL_BF16 ? kernel_of<__nv_bfloat16>(each) : kernel_of<__half>(each);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ListShared::bytes(LIST_ROWS));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* arguments[] = {&p};
  const dim3 grid(static_cast<unsigned>(p.splits) + 1, static_cast<unsigned>(g.attend.batch * g.attend.kv_heads));
  error = launch(kernel, grid, THREADS, static_cast<size_t>(bytes), g.attend.stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl
