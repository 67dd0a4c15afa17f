// ops.linears_with_delta: up to three linear layers of the same many rows, each with the weights of its tenant, on
// sm_90.
//
// Shapes: x [R, K], weight [N, K], bits [S, N, K / 32], out [R, N]; K a multiple of 64.
// A product of all rows with the signs alone would cost as much as the layer itself. So it is one product, of weights
//   that become those of the rows' tenant on their way into the tensor cores: weight + scale * sign, in float32,
//   rounded to the dtype of the weights, as if they had been merged.
// Three launches for all layers. The first sorts rows into pieces of at most 256 that have the same slots, the second
//   copies them in that order. Blocks of the third, as many as multiprocessors, take one item after the other: 128
//   outputs of a layer and a piece; the pieces of some outputs follow each other, since they share the weights.
// Block: 384 threads. One copies 64 inputs of 256 rows at a time; two groups of four warps have 64 outputs each. They
//   merge the next weights in registers while they multiply the ones before. So that a lane reads 8 inputs of a weight
//   at once and has what a product wants of it, the inputs of the rows were put in another order.
// Shared memory: six stages of 32 KiB. Bound by: tensor cores; on an H200 460 TFLOP/s with 2048 rows, all three
//   launches together, where the base layer alone has 790.
#include <algorithm>

#include "delta_merged.cuh"
#include "tensor_map.cuh"

namespace hfl {
namespace {

constexpr int COPY_THREADS = 128;

__global__ void __launch_bounds__(ROW_THREADS) sort_kernel(const hfl_delta a, const MergedRows to) {
  extern __shared__ int kinds[];
  wait_for_previous(a.slots);
  sort_rows(a, to, MergedStages::ROWS, kinds, kinds + a.slots + 2);
}

// Four numbers of each of four lanes side by side, transposed.
__device__ __forceinline__ uint4 transposed(uint4 x) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const auto swap = [](uint32_t& low, uint32_t& high, bool second, int apart) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? low : high, apart);
    (second ? low : high) = other;
  };
  swap(x.x, x.y, odd, 1), swap(x.z, x.w, odd, 1);
  swap(x.x, x.z, upper, 2), swap(x.y, x.w, upper, 2);
  return x;
}

// A row in its place; four threads have 32 inputs, each of them a pair of each eight.
__global__ void __launch_bounds__(COPY_THREADS) order_kernel(const hfl_delta a, const MergedRows to) {
  wait_for_previous(a.rows);
  const int64_t row = to.order[blockIdx.x];
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.x) + row * a.x_r);
  uint4* at = reinterpret_cast<uint4*>(to.x + static_cast<int64_t>(blockIdx.x) * a.inputs);
  const int parts = a.inputs / 8;
#pragma unroll 4
  for (int first = 0; first < parts; first += COPY_THREADS) {
    const int i = first + static_cast<int>(threadIdx.x);
    const uint4 x = transposed(i < parts ? from[i] : uint4{});  // s = i / 2 % 2, h = i % 2: pairs 2 s + h of the four
    if (i < parts) at[i] = x;
  }
}

const char* check(const hfl_merged& a) {
  const hfl_delta& d = a.delta;
  if (d.dtype != HFL_F16 && d.dtype != HFL_BF16) return "linear_with_delta: expected float16 or bfloat16";
  if (d.rows < 1 || d.outputs < 1 || d.slots < 1 || d.planes < 1) return "linear_with_delta: expected no empty axis";
  if (d.inputs < 64 || d.inputs % 64) return "linear_with_delta: expected a multiple of 64 inputs";
  if (d.groups < 1 || d.inputs / 64 % d.groups) return "linear_with_delta: expected groups of a multiple of 64 inputs";
  if (d.outputs % 2) return "linear_with_delta: expected an even number of outputs";
  if (d.slots > 4096) return "linear_with_delta: expected at most 4096 slots";
  if (d.scale_rows != 1 && d.scale_rows != d.outputs)
    return "linear_with_delta: expected a scale for each output, or for all";
  if ((static_cast<int64_t>(d.outputs) / 128 + 1) * d.rows > INT32_MAX)
    return "linear_with_delta: expected fewer tiles";
  for (const void* x : {d.x, static_cast<const void*>(d.bits), a.weight, static_cast<const void*>(d.out)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16)
      return "linear_with_delta: expected tensors that begin at multiples of 16 bytes";
  }
  return d.x_r % 8 || a.weight_r % 8 ? "linear_with_delta: expected rows that begin at multiples of 16 bytes" : nullptr;
}

template <bool PLAIN>
const void* kernel_for(int dtype) {
  return dtype == HFL_BF16 ? reinterpret_cast<const void*>(&merged_wgmma_kernel<true, PLAIN>)
                           : reinterpret_cast<const void*>(&merged_wgmma_kernel<false, PLAIN>);
}

const char* check(const hfl_joined& a) {
  if (a.parts < 1 || a.parts > HFL_JOINED_PARTS) return "linears_with_delta: expected 1 to 3 layers";
  int64_t tiles = 0;
  for (int i = 0; i < a.parts; ++i) {
    const hfl_merged of = MergedTask::layer_of(a, i);
    const char* message = check(of);
    if (message) return message;
    tiles += of.delta.outputs / 128 + 1;
  }
  return tiles * a.first.delta.rows > INT32_MAX ? "linears_with_delta: expected fewer tiles" : nullptr;
}

const char* run(const hfl_joined& a) {
  using S = MergedStages;
  const hfl_delta& d = a.first.delta;
  const void* kernel = d.planes > 1 || d.groups > 1 ? kernel_for<false>(d.dtype) : kernel_for<true>(d.dtype);
  MergedTask task(a);
  CUtensorMap map;
  cudaFuncAttributes found;
  cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error != cudaSuccess || !found.sharedSizeBytes)
    return "linear_with_delta: expected a device of sm_90, and code for it";
  const int64_t inputs = d.inputs, rows = d.rows;
  if (!map_rows(map, d.dtype == HFL_BF16, task.rows.x, {inputs, rows, 1, 1},
                {inputs, inputs * rows, inputs * rows}, S::ROWS)) {
    return "linear_with_delta: expected a driver that makes tensor maps";
  }
  int device = 0, processors = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const size_t kinds = static_cast<size_t>(d.slots + 2) * 2 * sizeof(int);
  void* of_rows[] = {&task.delta, &task.rows};
  error = launch(reinterpret_cast<const void*>(&sort_kernel), dim3(1), ROW_THREADS, kinds, d.stream, of_rows);
  if (error == cudaSuccess) {
    error = launch(reinterpret_cast<const void*>(&order_kernel), dim3(static_cast<unsigned>(rows)), COPY_THREADS, 0,
                   d.stream, of_rows);
  }
  void* arguments[] = {&task, &map};
  const int64_t blocks = std::min<int64_t>(processors, rows * task.tiles);
  if (error == cudaSuccess) {
    error = launch(kernel, dim3(static_cast<unsigned>(blocks)), S::THREADS, static_cast<size_t>(S::BYTES),
                   d.stream, arguments);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_merged_scratch(const hfl_merged* a) { return hfl::MergedRows(a->delta).bytes; }

extern "C" const char* hfl_joined_cuda(const hfl_joined* a) {
  const char* message = hfl::check(*a);
  return message ? message : hfl::run(*a);
}
