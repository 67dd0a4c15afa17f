// A step of short rows that choose, in one kernel: a cluster of blocks for each row and KV head scores blocks of keys
// from their bounds, chooses, and attends to what is chosen, for one query a row of 16 bits and 128 channels, on sm_90.
//
// Paper: the top-k of Quest (arXiv:2406.10774) sections 3.2 and 3.3, as score.cu and pick.cu define them.
// Work: tile t of 16 bounds is copied by block t % CLUSTER, a warp each, before the kernels before this one are done;
//   those that the last tokens changed are read once more. A warp sends the scores of its tile to all blocks, so that
//   each of them finds the whole choice, by a histogram, and each warp the one block of keys that it attends to. The
//   results of a block's warps become one, of which every block of the cluster gets some channels, sums them up and
//   writes them. Nothing goes through global memory, and no cluster waits for another. The step's own token comes from
//   where it is fresh; clusters behind all others store it.
// Grid: (CLUSTER, B * Hkv, and rows for blocks that store), in clusters. Shared memory: bounds, at least 8 KiB a warp,
//   then values; and 24 KiB. Bound by: latency, and instructions of the choice, which each block makes for itself.
#include <algorithm>
#include <atomic>

#include "attend_cluster.cuh"

namespace hfl {
namespace {

constexpr int MOST_CLUSTERS = 8;  // rows times KV heads: more of them do not find room at a time

template <typename T>
__global__ void __launch_bounds__(CLUSTER_THREADS, CLUSTER / 8)
    attend_cluster_kernel(const __grid_constant__ ClusterTask given) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
  extern __shared__ __align__(128) unsigned char memory[];
  ClusterShared& room = *reinterpret_cast<ClusterShared*>(memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x);
  int problem = static_cast<int>(blockIdx.y);
  keep(given, room.task);
  const ClusterTask& s = room.task;
  const ListTask& p = s.list;
  __syncthreads();
  if (problem >= p.problems) {  // a block that stores a token, or none
    problem = (problem - p.problems) * CLUSTER + rank;
    if (problem >= p.problems) return;
    const int b = p.kv_heads.divide(problem), head = problem - b * p.kv_heads.by;
    wait_for_previous(b | head);
    if (thread < CHOOSERS) ListWarp<T>::store(p, b, head, problem, memory + sizeof(ClusterShared));
    return;
  }
  const int b = p.kv_heads.divide(problem), head = problem - b * p.kv_heads.by;
  const ClusterRow<T> row = {s, room, memory + sizeof(ClusterShared), rank, problem, b, head, warp, lane};
  const bool extra = (CLUSTER_WARPS + warp) * CLUSTER + rank < s.tiles && warp < CLUSTER_TILES - CLUSTER_WARPS;
  const bool there = warp * CLUSTER + rank < s.tiles;
  const int64_t* const pos_at = p.append.pos + b * p.append.pos_b;
  bool again = false;
  if (lane == 0) {
    if (thread == 0) barrier_init(room.ranks_there, 1), barrier_init(room.parts_there, 1);
    barrier_init(room.tiles[warp], 1);
    if (extra) barrier_init(room.tiles[CLUSTER_WARPS + warp], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (there) row.begin(warp);
    if (extra) row.begin(CLUSTER_WARPS + warp);
    const int64_t pos = glance(pos_at);  // which may not be its last word
    again = there && row.changed(warp, pos, static_cast<int>(pos / LIST_SLAB));
    if (again) barrier_wait(room.tiles[warp], 0);
    if (thread == 0) barrier_expect(room.parts_there, CLUSTER * p.group * (CLUSTER_SLICE + 2) * 4), room.few = 0;
  }
  if (thread < ClusterShared::BINS) room.bins[thread] = 0;
  if (thread < ClusterShared::WORDS) room.taken[thread] = 0;
  if (thread < ClusterShared::FEW) room.few_ranks[thread] = 0;
  __syncwarp();
  const int place = rank * CLUSTER_WARPS + warp;
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  wait_for_previous(lane);
  if (again) row.begin(warp);
  again = __shfl_sync(0xffffffffu, static_cast<int>(again), 0);
  const int64_t pos = __ldcg(pos_at);
  const int limit = static_cast<int>(min(__ldcg(p.a.q_pos + b * p.a.q_pos_b), static_cast<int64_t>(p.a.stored)));
  const ListShape shape(p.pick, b);
  StreamQueries<T> queries;
  {
    const int g = lane >> 2, q_head = p.heads.of(head) * p.group + g;
    const T* from = static_cast<const T*>(p.a.q) + b * p.a.q_b + q_head * p.a.q_h + (lane & 3) * 8;
    uint4 y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[j] = make_uint4(0, 0, 0, 0);
      if (g < p.group) y[j] = __ldcg(reinterpret_cast<const uint4*>(from + j * 32));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 low = make_uint4(below_zero(y[j].x, T()), below_zero(y[j].y, T()), below_zero(y[j].z, T()),
                                   below_zero(y[j].w, T()));
      queries.x[j] = low;
      queries.x[4 + j] = make_uint4(y[j].x ^ low.x, y[j].y ^ low.y, y[j].z ^ low.z, y[j].w ^ low.w);
      if (warp == 0) room.queries[j][lane] = y[j];
    }
  }
  const bool chosen = shape.chosen();
  const auto scored = [&](int local) {
    const int entry = row.first_of_tile(local);
    return chosen && entry < shape.last && entry + TILE > shape.first;
  };
  if (thread == 0 && chosen) {
    barrier_expect(room.ranks_there, ((shape.last - 1) / TILE - shape.first / TILE + 1) * TILE * 4);
  }
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#pragma unroll 1
  for (int local = warp; local < CLUSTER_WARPS + (extra ? warp + 1 : 0); local += CLUSTER_WARPS) {
    if (local == warp && !there) continue;
    const bool second = local == warp && again;
    barrier_wait(room.tiles[local], second ? 1 : 0);
    if (!scored(local)) continue;
    if (!second && row.changed(local, pos, shape.last)) {
      if (lane == 0) row.begin(local);
      barrier_wait(room.tiles[local], 1);
    }
    row.score(local, queries);
  }
  ClusterChooser chooser = {room, warp, lane};
  if (chosen) {
    barrier_wait(room.ranks_there, 0);
    chooser.choose(shape.first, shape.last, static_cast<uint32_t>(shape.taken));
  } else {
    __syncthreads();
  }
  int block = place < p.a.chosen ? shape.at(place) : -1;
  if (block == -2) block = chooser.find(place - shape.first);
  ListWarp<T> mine(p, b, head, row.ring + warp * STREAM_TILE, lane);
  mine.limit = limit;
  const int at = block < 0 ? -1 : block * LIST_SLAB;
  if (mine.whole(at)) {
    mine.load(at);
  } else if (at >= 0) {
    mine.load_last(p, at);
  }
  if (lane == 0 && place < p.a.chosen) p.pick.ids[static_cast<int64_t>(problem) * p.a.chosen + place] = block;
  if (at >= 0) mine.attend(p, room.queries, at, -1, false);
  mine.leave(room.states[warp], p.group, row.ring + warp * STREAM_TILE);
  __syncthreads();
  row.hand_out(p.group);
  row.finish_slice(p.group);
#endif
}

template <typename T>
const void* kernel_of() {
  return reinterpret_cast<const void*>(&attend_cluster_kernel<T>);
}

int bytes_of(int tiles) {
  const int local = std::max((tiles - 1) / CLUSTER + 1, CLUSTER_WARPS);
  return static_cast<int>(sizeof(ClusterShared)) + local * STREAM_TILE;
}

// Let the kernels have what they may need; whether the current device has room for all clusters of a step at a time.
bool fits() {
  static std::atomic<int> known[MOST_DEVICES];  // 0: not known yet, 1: no, 2: yes
  int device = 0, clusters = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= MOST_DEVICES) return false;
  const int answer = known[device].load(std::memory_order_acquire);
  if (answer) return answer == 2;
  bool all = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
  for (const void* kernel : {kernel_of<__half>(), kernel_of<__nv_bfloat16>()}) {
    const int bytes = bytes_of(CLUSTER * CLUSTER_TILES);
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = CLUSTER, size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(CLUSTER, MOST_CLUSTERS + 1), config.blockDim = dim3(CLUSTER_THREADS);
    config.dynamicSmemBytes = static_cast<size_t>(bytes), config.attrs = &size, config.numAttrs = 1;
    all = all && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess &&
          keep_shared(kernel) == cudaSuccess &&
          cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > MOST_CLUSTERS;
  }
  if (!all) static_cast<void>(cudaGetLastError());
  known[device].store(all ? 2 : 1, std::memory_order_release);
  return all;
}

}  // namespace

bool cluster_takes(const hfl_layer_group& g) {
  const hfl_attend& a = g.attend;
  const hfl_score& c = g.score;
  if (!c.scores || a.k.bits || !list_takes(g) || a.select_heads != a.kv_heads) return false;
  if (a.block != LIST_SLAB || g.append.sub != LIST_SLAB || c.subs != 1) return false;
  if (a.batch * a.kv_heads > MOST_CLUSTERS) return false;
  if (a.chosen > CLUSTER * CLUSTER_WARPS || c.entries > CLUSTER_MOST) return false;
  if (c.q != a.q || c.q_b != a.q_b || c.q_h != a.q_h) return false;
  return waits(kernel_of<__half>()) && fits();
}

const char* cluster_in_turn(const hfl_layer_group& g, const Heads& heads, void* stream) {
  const char* message = wrong_score(g.score);
  if (message) return message;
  const hfl_attend& a = g.attend;
  ClusterTask s = {};
  ListTask& p = s.list;
  p.a = a, p.append = g.append, p.pick = g.pick, p.group = a.q_heads / a.kv_heads, p.heads = heads;
  p.kv_heads = Divisor(a.kv_heads), p.problems = a.batch * a.kv_heads;
  s.summary = g.score.summary, s.s_b = g.score.s_b, s.s_h = g.score.s_h, s.entries = g.score.entries;
  s.tiles = score_tiles(g.score);
  const void* kernel = a.dtype == HFL_BF16 ? kernel_of<__nv_bfloat16>() : kernel_of<__half>();
  void* arguments[] = {&s};
  const int rows = p.problems + (p.problems - 1) / CLUSTER + 1;
  const cudaError_t error = launch(kernel, dim3(CLUSTER, static_cast<unsigned>(rows)), CLUSTER_THREADS,
                                   static_cast<size_t>(bytes_of(s.tiles)), stream, arguments, true, CLUSTER);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl
