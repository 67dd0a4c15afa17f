// A step over a list of blocks, for one query a row of 16 bits and 128 channels: the list is chosen where it is read.
//
// Work: the slabs of 16 keys of a list are cut into `splits` parts, as alike as can be, a block each, whose 8 warps take
//   every 8th slab of it. Where the list is chosen, each block finds all of the choice, and the entries of its own part,
//   which it also writes down for later steps; the next step's kernel is set up once it has the scores, as what that
//   reads early would be in their way where there are many. Where the list stands, it and the keys it names for the
//   first two slabs of each warp are read before the kernels before this one are done, and what these may have written
//   is read again: the list, and keys of the last tokens. The step's own token comes from where it is fresh; blocks
//   behind all parts store it, which find a place on the device last, or before them if parts wait for that. The last
//   block of a KV head to be done merges all, in their order: results do not depend on timing.
// Grid: (splits, B * Hkv, and rows for blocks that store); 256 threads. Shared memory: 36 to 78 KiB, or 100 KiB where
//   second slabs are read early.
// Bound by: latency. Two blocks of a multiprocessor keep 128 KiB on their way, and twice that of lists that stand.
#include <algorithm>

#include "attend_list4.cuh"
#include "attend_list_merge.cuh"

namespace hfl {
namespace {

constexpr int THREADS = CHOOSERS;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int AT_ONCE = 1;  // blocks of a multiprocessor; two would not have enough registers
#else
constexpr int AT_ONCE = 2;
#endif

// All of the list, for others to read.
__global__ void __launch_bounds__(THREADS, 2) choose_kernel(const __grid_constant__ ChooseTask p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  const int problem = static_cast<int>(blockIdx.x), b = p.heads.divide(problem);
  reinterpret_cast<ChooseRoom*>(memory)->clear();
  begin_turn(p.turn.turn, b);
  int32_t* to = p.a.ids + static_cast<int64_t>(problem) * p.a.chosen;
  choose_part(p.a, p.each, p.turn.scored, p.tiles, memory, b, problem, 0, p.a.chosen, to);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.turn.scored[problem] = 0;
    store_in_order(p.turn.picked + problem, p.turn.readers);
  }
  end_turn(p.turn.turn);
  clear_scores(p.a.scores, p.each, problem);
#endif
}

// Which of the parts a block has, read anew where registers are short; blocks behind all parts have none, and one of
// them for each row and KV head stores its token. They come before all parts where these wait for what they store.
struct Part {
  int split, problem, b, head;
  bool stores = false;

  __device__ __forceinline__ explicit Part(const ListTask& p) {
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(split));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(problem));
    problem -= p.before, stores = problem < 0 || problem >= p.problems;
    if (stores) problem = (problem + (problem < 0 ? p.before : -p.problems)) * p.splits.by + split;
    b = p.kv_heads.divide(problem), head = problem - b * p.kv_heads.by;
  }
};

// What the warps left, to scratch, and what all blocks did to the output, by the last one.
template <typename W>
__device__ __forceinline__ void merge(const ListTask& p, ListShared& shared, unsigned char* room, bool choice) {
  const int thread = static_cast<int>(threadIdx.x), all = p.group * (LIST_DIM / 2);
  const Part part(p);
#pragma unroll 1
  for (int i = thread; i < all; i += THREADS) {
    float* to = scratch_of(p, part.problem, part.split);
    merge_warps(room, shared, p.group, i / (LIST_DIM / 2), i % (LIST_DIM / 2) * 2, to);
  }
  __syncthreads();
  if (thread == 0) shared.arrived = add_in_order(p.a.counters + part.problem, 1);
  __syncthreads();
  if (shared.arrived != p.splits.by - 1) return;
  if (thread == 0) p.a.counters[part.problem] = 0;
  if (choice) {
    end_turn(p.turn);  // all scores are there
    clear_scores(p.pick.scores, p.chooses, part.problem);
    if (thread == 0) p.scored[part.problem] = 0;
  }
  if (thread == 0 && p.appended) {
    wait_until(p.appended + part.problem, 1);
    p.appended[part.problem] = 0;
  }
  merge_parts<W>(p, shared, room, part.b, part.head, part.problem);
}

template <typename W, bool CHOICE>
__global__ void __launch_bounds__(THREADS, AT_ONCE) attend_list_kernel(const __grid_constant__ ListTask p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  ListShared& shared = *reinterpret_cast<ListShared*>(memory);
  unsigned char* room = memory + ListShared::start();
  const hfl_attend& a = p.a;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  touch(p);
  const Part part(p);
  if (part.stores) {
    if (part.problem >= p.problems) return;
    begin_turn(p.turn, part.b | part.head);
    W::store(p, part.b, part.head, part.problem, room);
    end_turn(p.turn);
    return;
  }
  // Entries of the list that the part has something of, and slabs counted from the first one's.
  const int from = p.splits.divide(part.split * p.slabs), to = p.splits.divide((part.split + 1) * p.slabs);
  const int start = p.each.divide(from), entries = p.each.divide(to - 1) + 1 - start;
  const int first = from - start * p.each.by + warp, end = to - start * p.each.by;
  const auto key_of = [&](int slab, int id) {  // the first one of the slab; -1: none
    return id < 0 ? -1 : id * a.block + (slab - p.each.divide(slab) * p.each.by) * LIST_SLAB;
  };
  const auto find = [&](int slab) { return slab < end ? key_of(slab, shared.list[p.each.divide(slab)]) : -1; };
  int limit = -1;
  const auto prepare = [&] {  // by other warps each, so that none waits for one before it asks for the next
    using T = typename W::T;
    if (CHOICE || thread == THREADS - 1) {
      limit = static_cast<int>(min(a.q_pos[part.b * a.q_pos_b], static_cast<int64_t>(a.stored)));
      if (!CHOICE) shared.limit = limit;
    }
    if (warp < LIST_DIM / 32) {
      uint4 q = make_uint4(0, 0, 0, 0);
      const int head = p.heads.of(part.head) * p.group + (lane >> 2);
      const T* of = static_cast<const T*>(a.q) + part.b * a.q_b + head * a.q_h;
      if ((lane >> 2) < p.group) q = W::operands(*reinterpret_cast<const uint4*>(of + W::channel(warp, lane & 3)));
      shared.queries[warp][lane] = q;
    }
  };
  if constexpr (CHOICE) {
    reinterpret_cast<ChooseRoom*>(room)->clear();
    if (p.followed || p.turn != Turn::later) begin_turn(p.turn, first);
    prepare();
    choose_part(p.pick, p.chooses, p.scored, p.awaited, room, part.b, part.problem, start, start + entries,
                shared.list);
    __syncthreads();
  }
  W mine(p, part.b, part.head, room + warp * ListShared::warp_bytes(p.group), lane);
  int at = -1, second = -1;
  if constexpr (!CHOICE) {
    const int32_t* ids = a.ids + part.b * a.ids_b + (a.select_heads == 1 ? 0 : part.head) * a.ids_h + start;
    if (first < end) at = key_of(first, __ldcg(ids + p.each.divide(first)));
    if (at >= 0 && at + LIST_SLAB <= a.stored) mine.load(at);
    if (p.ahead && first + LIST_WARPS < end) {
      second = key_of(first + LIST_WARPS, __ldcg(ids + p.each.divide(first + LIST_WARPS)));
    }
    if (second >= 0 && second + LIST_SLAB <= a.stored) mine.load_ahead(second, p.group);
    begin_turn(p.turn, at + 1);
    prepare();
#pragma unroll 1
    for (int i = THREADS - 33 - thread; i < entries; i += THREADS) {
      if (i >= 0) shared.list[i] = __ldcg(ids + i);
    }
    __syncthreads();
  }
  mine.limit = CHOICE ? limit : shared.limit;
  {
    const int again = find(first);
    const bool stands = !CHOICE && again == at && mine.whole(at + RECENT);
    at = again;
    if (!CHOICE && !stands) {
      copy_wait<0>();
      __syncwarp();
    }
    if (!stands && mine.whole(at)) mine.load(at);
  }
  if constexpr (CHOICE) {
    int32_t* to = p.pick.ids + static_cast<int64_t>(part.problem) * a.chosen + start;
#pragma unroll 1
    for (int i = thread; i < entries; i += THREADS) to[i] = shared.list[i];
  }
  mine.prepare(shared.queries);
  bool early = !CHOICE && second >= 0 && find(first + LIST_WARPS) == second && mine.whole(second + RECENT);
#pragma unroll 1
  for (int slab = first; slab < end; slab += LIST_WARPS) {
    const int after = find(slab + LIST_WARPS);
    if (at >= 0 && !mine.whole(at)) mine.load_last(p, at);
    if (at >= 0) mine.attend(p, shared.queries, at, mine.whole(after) ? after : -1, early);
    at = after, early = false;
  }
  mine.leave(shared.states[warp], p.group, room + warp * ListShared::warp_bytes(p.group));
  __syncthreads();
  merge<W>(p, shared, room, CHOICE);
  end_turn(p.turn);
#endif
}

template <typename W>
const void* kernel_of(bool choice) {
  return choice ? reinterpret_cast<const void*>(&attend_list_kernel<W, true>)
                : reinterpret_cast<const void*>(&attend_list_kernel<W, false>);
}

bool same_rows(const hfl_rows& x) { return (x.bits == 0 && x.t == LIST_DIM) || (x.bits == 4 && x.t == LIST_DIM / 2); }

// Let a kernel have so much shared memory.
cudaError_t allow(const void* kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error == cudaSuccess ? keep_shared(kernel) : error;
}

// Shared memory of a choice.
int choose_bytes(int each) { return static_cast<int>(sizeof(ChooseRoom)) + CHOOSERS * each * 4; }

int chosen_each(const hfl_layer_group& g) { return g.score.scores ? each_of(g.pick.blocks) : 0; }

// How many tiles of scores are waited for, before they are looked at one by one. All come at once where each warp has
// one; else looking too early would be in the way of those who still read.
int awaited_of(const hfl_score& score, int processors) {
  const int rounds = score_rounds(score, processors), tiles = score_tiles(score);
  return rounds == 1 ? 0 : rounds <= 4 ? tiles - tiles / 4 : tiles;
}

ListTask task_of(const hfl_layer_group& g) {
  const hfl_attend& a = g.attend;
  ListTask p = {};
  p.a = a, p.append = g.append, p.group = a.q_heads / a.kv_heads;
  p.each = Divisor(a.block / LIST_SLAB), p.kv_heads = Divisor(a.kv_heads);
  p.slabs = a.chosen * p.each.by;
  p.problems = a.batch * a.kv_heads;
  const int parts = std::max((g.score.scores && a.k.bits ? 64 : 128) / p.problems, 4);
  const int least = std::max((p.slabs - 1) / MOST_PARTS + 1, LIST_WARPS);
  const int share = std::clamp((p.slabs - 1) / parts + 1, least, std::max(MOST_SHARE, least));
  p.splits = Divisor((p.slabs - 1) / share + 1);
  return p;
}

}  // namespace

bool chooses(const hfl_layer_group& g) {
  const hfl_pick& a = g.pick;
  return g.score.scores && score_streams(g.score) && g.append.bounds && g.append.ring <= 0 && a.sink >= 0 &&
         a.take >= 0 && a.blocks == (g.score.entries - 1) / g.score.subs + 1;
}

int64_t chosen_scores(const hfl_layer_group& g) {
  return static_cast<int64_t>(g.score.batch) * g.score.kv_heads * CHOOSERS * chosen_each(g);
}

const char* choose_in_turn(const hfl_layer_group& g, const float* scores, const PickTurn& turn, void* stream) {
  ChooseTask p = {};
  p.a = g.pick, p.a.scores = scores, p.heads = Divisor(g.pick.heads), p.tiles = score_tiles(g.score), p.turn = turn;
  p.each = chosen_each(g);
  const void* kernel = reinterpret_cast<const void*>(&choose_kernel);
  cudaError_t error = allow(kernel, choose_bytes(MOST_EACH));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* arguments[] = {&p};
  const unsigned problems = static_cast<unsigned>(g.pick.batch) * static_cast<unsigned>(g.pick.heads);
  error = launch(kernel, dim3(problems), THREADS, static_cast<size_t>(choose_bytes(p.each)), stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool list_takes(const hfl_layer_group& g) {
  const hfl_attend& a = g.attend;
  if (!a.ids || a.pages || a.q_before || a.slopes || a.softcap != 0.0f || attend_units(a) == 0) return false;
  if (a.dim != LIST_DIM || !same_rows(a.k) || !same_rows(a.v) || a.q_heads / a.kv_heads > LIST_ROWS) return false;
  if (a.k.bits && (a.dtype != HFL_BF16 || !g.score.scores)) return false;
  if (a.block % LIST_SLAB || (a.select_heads != 1 && a.select_heads != a.kv_heads)) return false;
  if (g.append.ring > 0 || g.append.dtype != a.dtype || !waits(kernel_of<ListWarp4>(false))) return false;
  if (static_cast<int64_t>(a.chosen) * (a.block / LIST_SLAB) > MOST_SHARE * MOST_PARTS) return false;
  return !g.score.scores || (chooses(g) && g.score.dtype == a.dtype);
}

int64_t list_scratch(const hfl_layer_group& g) {
  const ListTask p = task_of(g);
  return static_cast<int64_t>(g.attend.batch) * g.attend.kv_heads * p.splits.by * p.group * LIST_OUT * 4;
}

const char* list_in_turn(const hfl_layer_group& g, const ListTurn& turn, void* stream) {
  ListTask p = task_of(g);
  p.a.scratch = turn.scratch, p.a.counters = turn.arrived, p.heads = turn.heads, p.turn = turn.turn;
  p.followed = turn.followed;
  p.pick = g.pick, p.pick.scores = turn.scores, p.scored = turn.scored;
  p.chooses = chosen_each(g);
  const int needed = ListShared::bytes(p.group) + LIST_WARPS * ListWarp<__half>::AHEAD;
  int device = 0, most = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (p.chooses) p.awaited = awaited_of(g.score, processors);
  p.ahead = !p.chooses && !g.attend.k.bits && 2 * (needed + 1024) <= most;  // two blocks of a multiprocessor
  const int room = p.ahead ? needed
                   : std::max(ListShared::bytes(p.group), p.chooses ? ListShared::start() + choose_bytes(p.chooses) : 0);
  const void* kernel = g.attend.k.bits ? kernel_of<ListWarp4>(p.chooses > 0)
                       : g.attend.dtype == HFL_BF16 ? kernel_of<ListWarp<__nv_bfloat16>>(p.chooses > 0)
                                                    : kernel_of<ListWarp<__half>>(p.chooses > 0);
  p.appended = g.attend.k.bits ? turn.appended : nullptr;
  error = allow(kernel, std::max(room, ListShared::start() + choose_bytes(MOST_EACH)));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* arguments[] = {&p};
  const int more = (p.problems - 1) / p.splits.by + 1;
  p.before = p.appended ? more : 0;
  const dim3 grid(static_cast<unsigned>(p.splits.by), static_cast<unsigned>(p.problems + more));
  error = launch(kernel, grid, THREADS, static_cast<size_t>(room), stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl
