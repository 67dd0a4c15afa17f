// ops.linear_with_delta of up to 16 rows on sm_90: one kernel reads weights and bits, once and as they lie.
//
// Paper: BitDelta, arXiv 2402.10193. Shapes: x [R, K], weight [N, K], bits [S, N, K / 32], out [R, N]; K a multiple of
// 128; up to three layers of the same x.
// Grid: clusters of 8 blocks, which read 4096 inputs side by side, then the next ones, a phase each. A cluster has a
//   run of outputs, of which each of the 16 warps of a block takes 16 after the other; sums of the phases before wait in
//   shared memory. An H200 runs 15 clusters at a time, so 4096 outputs are 17 tiles or 18 of each: the last ones, which
//   are fewer than warps, are done by four warps each, a quarter of the inputs. Products of a quarter are added up by
//   themselves, so that it does not matter who does it.
// Of its inputs of a row a block makes whole numbers of 24 bits, as delta_rows.cuh does, and of each 32 of them the
//   words of each place. So bits of a delta meet bits of x, and a tensor core counts where both are set, 16 outputs x
//   256 inputs x 8 places at a time: nothing is unpacked. Then sum(+-x) = 2 sum(x where 1) - sum(x). A warp makes those
//   of a row, of the first phase while the first weights are on their way, of the others between two quarters: what is
//   known of a phase has one of two places, so warps need not meet, only be less than a phase apart.
// A warp has a ring in shared memory, of chunks of 1 KiB: 32 inputs of the weights of its 16 outputs, or 512 of the bits
//   of a row. As soon as it has used one it asks for another, of the next tile or phase, too. Each lane copies what it
//   will use, so none waits for others. Four chunks are enough for the memory to be busy, or three where sums of many
//   tiles need the room; of more, what is asked for last waits behind them, as a kernel's rows of x do: linears of a
//   layer of Llama 3 8B, 16 rows, take 235 us with up to 4 chunks, 238 with 5 and 242 with 7 on an H200; with registers
//   in place of a ring, 255. A tile's sums go to the block of the cluster that adds up those of all eight, in order.
// Weights are not written by kernels, so the first of them are on their way before the kernel before this one is done,
//   and so are those of some tiles to the L2, with their bits: as much as memory gives until rows are known. With that,
//   and copies that ask the L2 for 128 bytes in place of 256 and leave it first, a step of 16 tenants of 8B takes 8.57
//   ms in place of 8.81.
//   Slots may be written: they are looked at before, so that they and what they lead to are near, and again.
// A row's sums do not depend on the others: all are added in the same order. Bound by: bytes of weights and bits.
#include "delta_streamed.cuh"

namespace hfl {

// In code for other architectures it is empty, which shows as a kernel without static shared memory.
template <int EACH, int DEEP, bool BF16>
__global__ void __launch_bounds__(STREAM_THREADS, 1) streamed_kernel(const __grid_constant__ StreamTask p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char stream_shared[];
  __shared__ StreamBoard board;
  const int rank = rank_here(), group = static_cast<int>(blockIdx.x) / RANKS, lane = lane_of_thread();
  const int warp = __shfl_sync(0xffffffffu, warp_of_thread(), 0);
  const int first = p.first + group * p.each + min(group, p.more), tiles = p.each + (group < p.more),
            owned = (tiles - rank + RANKS - 1) / RANKS;
  const uint32_t slots = shared_address(stream_shared), kept_at = static_cast<uint32_t>(p.owned * p.owned_bytes()),
                 told_at = kept_at + static_cast<uint32_t>(p.owned * p.kept_bytes()),
                 x_at = told_at + static_cast<uint32_t>(p.all_told_bytes()),
                 ring_at = x_at + static_cast<uint32_t>((p.phases > 1 ? 2 : 1) * p.phase_bytes());
  const auto x_of = [&](int side) { return stream_shared + x_at + side * p.phase_bytes(); };
  const auto planes_of = [&](int side) { return x_of(side) + p.columns() * X_BYTES; };
  using S = Streamer<EACH, DEEP, BF16>;
  const uint32_t ring = slots + ring_at + static_cast<uint32_t>(warp * DEEP * CHUNK_BYTES + lane * 16);
  S own = {p, board, first, warp, lane, ring, ring, 0, 0, 0, 0, {}, {}};
  const StreamDeal deal(tiles, p.phases);
  StreamStep now = deal.begin(warp);
  StreamPlace here = own.place_of(now);
  StreamRow row(p, warp);
  own.ask_first(here, now.quarter);
  if (threadIdx.x == 0) {
    for (int i = 0; i < owned; ++i) barrier_init(board.sent[i], 1);
    for (int i = 0; i < 2; ++i) barrier_init(board.known[i], STREAM_WARPS), barrier_init(board.over[i], STREAM_WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < owned; ++i) barrier_expect(board.sent[i], p.owned_bytes());
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  row.look(p);
  if (warp < p.near_warps() && deal.there(now) && now.phase == 0) own.bring_tile_near(first + now.tile, row);
  wait_for_previous(warp);
  row.bring(p, board, StreamShare(p, 0, rank), x_of(0));
  row.know(p, board, 0, StreamShare(p, 0, rank), x_of(0), planes_of(0));
  __syncthreads();
  for (int i = 0; i < STREAM_ROWS; ++i) own.some |= (board.slots[i] >= 0 ? 1u : 0u) << i;
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  int phase = -1, turn = 2;
  // What a warp does beside, once all are done with the phase before: its row's inputs of the next one.
  const auto look_ahead = [&](int to) {
    if (turn >= to || phase + 1 == p.phases) return;
    const StreamShare ahead(p, phase + 1, rank_here());
    const int side = (phase + 1) % 2;
    if (turn == 0) {
      if (phase) barrier_wait(board.over[side], (phase - 1) / 2 % 2);
      row.fetch(p, ahead, x_of(side));
      if (to == 2) copy_commit(), copy_wait<0>();
    }
    if (to == 2) {
      row.know(p, board, side, ahead, x_of(side), planes_of(side));
      come_by(board.known[side]);
    }
    turn = to;
  };
  const auto go_on = [&](int to) {
#pragma unroll 1
    while (phase < to) {
      if (phase >= 0) look_ahead(2), come_by(board.over[phase % 2]);
      ++phase, turn = 0;
    }
  };
#pragma unroll 1
  while (deal.there(now)) {
    float4* const kept = reinterpret_cast<float4*>(stream_shared + kept_at) + now.tile * S::NT * 32 + lane;
    const bool together = now.tile >= deal.whole, last = now.phase + 1 == p.phases;
    if (phase < now.phase) {
      go_on(now.phase);
      own.side = phase % 2;
      const int row_at = lane / 8 + lane / 4 % 2 * 4;
      own.x = shared_address(x_of(own.side)) + static_cast<uint32_t>(row_at * X_BYTES + lane % 4 * 16);
      own.planes = shared_address(planes_of(own.side)) + static_cast<uint32_t>(lane * 16);
      if (phase) barrier_wait(board.known[own.side], (phase - 1) / 2 % 2);
    }
    if (together && phase) barrier_wait(board.over[1 - own.side], (phase - 1) / 2 % 2);  // who did it is done with it
    if (together || now.quarter == 0) own.begin(phase && now.quarter == 0 ? kept : nullptr);
    const StreamStep next = deal.after(now, warp);
    StreamPlace there = here;
    if (now.quarter + 1 == now.end) there = own.place_of(next);
    if (now.quarter) look_ahead(now.quarter < 2 + warp / 4 % 2 ? 1 : 2);
    own.run(now, here, next.quarter, there);
    if (now.quarter + 1 == now.end) {
      if (together) own.gather(now.quarter, stream_shared + told_at + warp / 4 * 3 * p.told_bytes());
      if (!together || now.quarter == 0) {
        const int owner = now.tile % RANKS, slot = now.tile / RANKS;
        const uint32_t to =
            slots + static_cast<uint32_t>(slot * p.owned_bytes() + (rank_here() * S::NT * 32 + lane) * 16);
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
          const float4 sums = own.sums_of(n, here.part);
          if (!last) {
            kept[n * 32] = sums;
          } else {
            send(over_there(to + static_cast<uint32_t>(n * 512), owner),
                 over_there(shared_address(&board.sent[slot]), owner), sums);
          }
        }
      }
    }
    now = next, here = there;
  }
  go_on(p.phases - 1);
  copy_wait<0>();
#pragma unroll 1
  for (int slot = warp; slot * RANKS + rank_here() < tiles; slot += STREAM_WARPS) {
    wait_for_cluster(board.sent[slot], 0);
    own.finish(first + slot * RANKS + rank_here(), slots + static_cast<uint32_t>(slot * p.owned_bytes()));
  }
#endif
}

namespace {

const char* check(const hfl_streamed& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "linear_with_delta: expected float16 or bfloat16";
  if (a.rows < 1 || a.rows > HFL_STREAMED_ROWS) return "linear_with_delta: expected 1 to 16 rows";
  if (a.parts < 1 || a.parts > HFL_STREAMED_PARTS) return "linear_with_delta: expected 1 to 3 layers";
  if (a.inputs < QUARTER || a.inputs % QUARTER) return "linear_with_delta: expected a multiple of 128 inputs";
  if (a.slots < 1) return "linear_with_delta: expected at least 1 slot";
  if (a.x_r % 8 || reinterpret_cast<uintptr_t>(a.x) % 16)
    return "linear_with_delta: expected rows that begin at multiples of 16 bytes";
  for (int p = 0; p < a.parts; ++p) {
    if (a.outputs[p] < 1) return "linear_with_delta: expected outputs";
    if (int64_t{a.outputs[p]} * a.inputs / WORD > INT32_MAX) return "linear_with_delta: expected a smaller layer";
    if (a.weight_r[p] > INT32_MAX / 8) return "linear_with_delta: expected fewer inputs";
    if (a.weight_r[p] % 8 || reinterpret_cast<uintptr_t>(a.weight[p]) % 16 ||
        reinterpret_cast<uintptr_t>(a.bits[p]) % 16) {
      return "linear_with_delta: expected weights and bits that begin at multiples of 16 bytes";
    }
  }
  return nullptr;
}

// Chunks of a warp that are on their way, and where there is less room.
constexpr int DEEP = 4, LESS = 3;

template <bool BF16>
const void* kernel_for(int rows, int deep) {
  if (rows <= 4) return reinterpret_cast<const void*>(&streamed_kernel<1, DEEP, BF16>);
  return deep == DEEP ? reinterpret_cast<const void*>(&streamed_kernel<4, DEEP, BF16>)
                      : reinterpret_cast<const void*>(&streamed_kernel<4, LESS, BF16>);
}

// How many clusters the current device runs at a time; a block has most of a multiprocessor's registers.
cudaError_t clusters(const void* kernel, int& count) {
  static std::atomic<int> known[MOST_DEVICES];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>& here = known[std::min(device, MOST_DEVICES - 1)];
  count = device < MOST_DEVICES ? here.load(std::memory_order_relaxed) : 0;
  if (count) return cudaSuccess;
  cudaLaunchAttribute size;
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = RANKS, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(RANKS), config.blockDim = dim3(STREAM_THREADS), config.attrs = &size, config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  int processors = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  count = std::min(count, processors / RANKS);
  if (error == cudaSuccess && count < 1) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) here.store(count, std::memory_order_relaxed);
  return error;
}

const char* run(const hfl_streamed& a) {
  const auto kernel_of = [&](int deep) {
    return a.dtype == HFL_BF16 ? kernel_for<true>(a.rows, deep) : kernel_for<false>(a.rows, deep);
  };
  const void* kernel = kernel_of(DEEP);
  cudaFuncAttributes found;
  cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error != cudaSuccess || !found.sharedSizeBytes)
    return "linear_with_delta: expected a device of sm_90, and code for it";
  StreamTask task(a);
  int device = 0, bytes = 0, groups = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = clusters(kernel, groups);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  bytes -= static_cast<int>(found.sharedSizeBytes) + task.known_bytes();
  const int each = task.owned_bytes() + task.kept_bytes();
  const auto owned_of = [&](int tiles) {
    const int used = std::min(groups, tiles), of_cluster = (tiles + used - 1) / used;
    return (of_cluster + RANKS - 1) / RANKS;
  };
  const auto most_of = [&](int deep) { return std::min(MOST_OWNED, (bytes - StreamTask::ring_bytes(deep)) / each); };
  const int deep = a.rows > 4 && owned_of(task.tiles) > most_of(DEEP) ? LESS : DEEP;
  const int most = most_of(deep);
  if (bytes < StreamTask::ring_bytes(deep) || most < 1)
    return "linear_with_delta: expected a device with 228 KiB of shared memory";
  kernel = kernel_of(deep);
  if (error == cudaSuccess) error = keep_shared(kernel);
  void* arguments[] = {&task};
  for (int left = task.tiles; left && error == cudaSuccess; left -= task.tiles, task.first += task.tiles) {
    task.tiles = std::min(left, most * RANKS * groups);
    task.owned = owned_of(task.tiles);
    const int used = std::min(groups, task.tiles);
    task.each = task.tiles / used, task.more = task.tiles % used;
    const int needed = task.owned * each + task.known_bytes() + StreamTask::ring_bytes(deep);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, needed);
    if (error != cudaSuccess) break;
    error = launch(kernel, dim3(static_cast<unsigned>(used * RANKS)), STREAM_THREADS,
                   static_cast<size_t>(needed), a.stream, arguments, true, RANKS);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_streamed_cuda(const hfl_streamed* a) {
  const char* message = hfl::check(*a);
  return message ? message : hfl::run(*a);
}
