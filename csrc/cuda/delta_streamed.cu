// ops.linear_with_delta of up to 16 rows on sm_90: weights and bits are read once, as they lie, by one kernel.
//
// Paper: BitDelta, arXiv 2402.10193. Shapes: x [R, K], weight [N, K], bits [S, N, K / 32], out [R, N]; K a multiple of
// 128; up to three layers of the same x.
// Two launches. The first makes whole numbers of 24 bits of x, as delta_rows.cuh does, and of each 32 of them the words
//   of each place: so that bits of a delta meet bits of x, and a tensor core counts where both are set, 16 outputs x 256
//   inputs x 8 places at a time. Nothing is unpacked.
// Blocks of the second are clusters of 8, each of which has an eighth of the inputs, which fit into shared memory with
//   the places of their bits; a cluster has a run of outputs. A warp takes 16 of them after the other: 512 inputs of the
//   weights and of each row's bits, a quarter at a time, in registers, the next quarter on its way. Sums go through the
//   memory of the cluster to the block that adds up those of all eight, in order.
// Weights are not written by kernels, so the first of them are on their way before the kernel before this one is done.
// A row's sums do not depend on the others: all are added in the same order. Bound by: bytes of weights and bits.
#include "delta_streamed.cuh"

namespace hfl {
namespace {

constexpr int PLANE_THREADS = 128, PLANE_WARPS = PLANE_THREADS / 32, PLANE_QUARTERS = 8;

__global__ void __launch_bounds__(PLANE_THREADS) planes_kernel(const StreamTask p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // The next kernel reads weights first, and waits for this one before anything else.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  __shared__ uint32_t all[PLANE_WARPS];
  const int row = static_cast<int>(blockIdx.y), lane = lane_of_thread(), warp = warp_of_thread();
  const uint16_t* x = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r;
  uint32_t most = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < p.a.inputs / 8; i += PLANE_THREADS) {
    most = largest_of(most, reinterpret_cast<const uint4*>(x)[i]);
  }
  most = __reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16));
  if (lane == 0) all[warp] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PLANE_WARPS; ++i) most = max(most, all[i]);
  const RowUnit unit(most, p.a.dtype);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.units[row] = unit.unit;
  const int first = static_cast<int>(blockIdx.x) * PLANE_QUARTERS, end = min(first + PLANE_QUARTERS, p.quarters);
  for (int quarter = first + warp; quarter < end; quarter += PLANE_WARPS) {
    int numbers[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      numbers[w] = __float2int_rn(to_float(x[quarter * QUARTER + w * 32 + lane], p.a.dtype) * unit.factor);
    }
    uint32_t own[4] = {};
#pragma unroll
    for (int place = 0; place < PLACES; ++place)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t word = __ballot_sync(0xffffffffu, numbers[w] >> place & 1);
        if (lane == place) own[w] = word;
      }
    const int rank = quarter / p.each, of_rank = quarter % p.each;
    uint32_t* to = p.planes + ((static_cast<int64_t>(row) * RANKS + rank) * p.steps + of_rank / 4) * (STEP_BYTES / 4);
    if (lane < PLACES) {
      reinterpret_cast<uint4*>(to)[lane * 4 + of_rank % 4] = make_uint4(own[0], own[1], own[2], own[3]);
    }
    const int sum = __reduce_add_sync(0xffffffffu, numbers[0] + numbers[1] + numbers[2] + numbers[3]);
    if (lane == 0) p.sums[row * p.quarters + quarter] = sum;
  }
}

const char* check(const hfl_streamed& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "linear_with_delta: expected float16 or bfloat16";
  if (a.rows < 1 || a.rows > HFL_STREAMED_ROWS) return "linear_with_delta: expected 1 to 16 rows";
  if (a.parts < 1 || a.parts > HFL_STREAMED_PARTS) return "linear_with_delta: expected 1 to 3 layers";
  if (a.inputs < QUARTER || a.inputs % QUARTER) return "linear_with_delta: expected a multiple of 128 inputs";
  if (a.slots < 1) return "linear_with_delta: expected at least 1 slot";
  if (a.x_r % 8 || reinterpret_cast<uintptr_t>(a.x) % 16)
    return "linear_with_delta: expected rows that begin at multiples of 16 bytes";
  for (int p = 0; p < a.parts; ++p) {
    if (a.outputs[p] < 1 || a.outputs[p] > INT32_MAX / 8) return "linear_with_delta: expected outputs";
    if (a.weight_r[p] % 8 || reinterpret_cast<uintptr_t>(a.weight[p]) % 16 ||
        reinterpret_cast<uintptr_t>(a.bits[p]) % 16) {
      return "linear_with_delta: expected weights and bits that begin at multiples of 16 bytes";
    }
  }
  return nullptr;
}

template <bool BF16>
const void* kernel_for(int rows) {
  if (rows > 8) return reinterpret_cast<const void*>(&streamed_kernel<4, BF16>);
  return rows > 4 ? reinterpret_cast<const void*>(&streamed_kernel<2, BF16>)
                  : reinterpret_cast<const void*>(&streamed_kernel<1, BF16>);
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
  const void* kernel = a.dtype == HFL_BF16 ? kernel_for<true>(a.rows) : kernel_for<false>(a.rows);
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
  const int most = std::min(MOST_OWNED, bytes / task.owned_bytes());
  if (bytes < 0 || most < 1) return "linear_with_delta: expected fewer inputs for so many rows";
  void* arguments[] = {&task};
  const dim3 rows(static_cast<unsigned>((task.quarters + PLANE_QUARTERS - 1) / PLANE_QUARTERS),
                  static_cast<unsigned>(a.rows));
  error = launch(reinterpret_cast<const void*>(&planes_kernel), rows, PLANE_THREADS, 0, a.stream, arguments);
  for (int left = task.tiles; left && error == cudaSuccess; left -= task.tiles, task.first += task.tiles) {
    task.tiles = std::min(left, most * RANKS * groups);
    const int used = std::min(groups, task.tiles), each = (task.tiles + used - 1) / used;
    task.owned = (each + RANKS - 1) / RANKS;
    const int needed = task.owned * task.owned_bytes() + task.known_bytes();
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, needed);
    if (error != cudaSuccess) break;
    error = launch(kernel, dim3(static_cast<unsigned>(used * RANKS)), STREAM_THREADS, static_cast<size_t>(needed),
                   a.stream, arguments, true, RANKS);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_streamed_scratch(const hfl_streamed* a) { return hfl::StreamTask(*a).scratch_bytes; }

extern "C" const char* hfl_streamed_cuda(const hfl_streamed* a) {
  const char* message = hfl::check(*a);
  return message ? message : hfl::run(*a);
}
