// ops.rms_norm: rows by the root of their mean square, times a weight, maybe of their own: one launch instead of eight.
//
// Shapes: x [outer, middle, inner, D] with any strides of rows, D a multiple of 8 up to 16384; out contiguous.
// Grid: a block for a row. Block: a thread for 8 channels, or for 16 where D > 8192; they stay in registers.
// Shared memory: a sum of each warp. Bound by: a load, a barrier and a store that wait for each other.
//
// Roundings are those of the definition; only the order of the sum is not.
#include "eight.cuh"
#include "launch.cuh"

namespace hfl {
namespace {

constexpr int WARP = 32, MOST_THREADS = 1024, MOST_CHANNELS = 2 * 8 * MOST_THREADS;

__device__ __forceinline__ float rounded(float x, int dtype) {
  if (dtype == HFL_BF16) return __bfloat162float(__float2bfloat16_rn(x));
  return dtype == HFL_F16 ? __half2float(__float2half_rn(x)) : x;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The same in all threads.
__device__ __forceinline__ float sum_of_block(float x) {
  __shared__ float sums[MOST_THREADS / WARP];
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  const float own = sum_of_warp(x);
  if (blockDim.x == WARP) return own;
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  return sum_of_warp(lane < static_cast<int>(blockDim.x) / WARP ? sums[lane] : 0.0f);
}

template <int PIECES>
__global__ void __launch_bounds__(MOST_THREADS) norm_kernel(const hfl_norm a) {
  const int row = static_cast<int>(blockIdx.x), inner = row % a.inner, rest = row / a.inner;
  const int64_t from = rest / a.middle * a.x_o + rest % a.middle * a.x_m + inner * a.x_i;
  wait_for_previous(row);
  const int64_t number = a.of_row ? a.of_row[row / a.each] : 0;
  const bool there = !a.of_row || (number >= 0 && number < a.weights);
  Raw x[PIECES] = {}, weight[PIECES] = {};
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = static_cast<int>(threadIdx.x + p * blockDim.x) * 8;
    if (channel >= a.dim) continue;
    x[p] = load(a.x, from + channel, a.dtype);
    if (there) weight[p] = load(a.weight, number * a.weight_r + channel, a.weight_dtype);
  }
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const Eight part = unpack(x[p], a.dtype);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(part.x[i], part.x[i], sum);
  }
  const float mean = __fmul_rn(sum_of_block(sum), __fdiv_rn(1.0f, static_cast<float>(a.dim)));
  const float factor = rsqrtf(__fadd_rn(mean, a.eps));
  const int out_dtype = a.early && a.weight_dtype == HFL_F32 ? HFL_F32 : a.dtype;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int channel = static_cast<int>(threadIdx.x + p * blockDim.x) * 8;
    if (channel >= a.dim) continue;
    Eight part = unpack(x[p], a.dtype);
    const Eight scale = unpack(weight[p], a.weight_dtype);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float unit = __fmul_rn(part.x[i], factor);
      part.x[i] = __fmul_rn(a.early ? rounded(unit, a.dtype) : unit, __fadd_rn(scale.x[i], a.offset));
    }
    store(a.out, static_cast<int64_t>(row) * a.dim + channel, part, out_dtype);
  }
}

const char* check(const hfl_norm& a) {
  for (int dtype : {a.dtype, a.weight_dtype}) {
    if (dtype < HFL_F32 || dtype > HFL_BF16) return "rms_norm: expected float32, float16 or bfloat16";
  }
  if (a.dtype != a.weight_dtype && a.dtype != HFL_F32 && a.weight_dtype != HFL_F32) {
    return "rms_norm: expected one of the dtypes to be float32 where they differ";
  }
  if (a.dim < 8 || a.dim % 8 || a.dim > MOST_CHANNELS) {
    return "rms_norm: expected a multiple of 8 channels, at most 16384";
  }
  if (a.outer < 1 || a.middle < 1 || a.inner < 1) return "rms_norm: expected no empty axis";
  if (static_cast<int64_t>(a.outer) * a.middle > INT32_MAX / a.inner) return "rms_norm: expected fewer than 2^31 rows";
  if (a.of_row && (a.each < 1 || a.outer * a.middle * a.inner % a.each)) {
    return "rms_norm: expected as many rows for each number of weights";
  }
  const int64_t bytes = a.dtype == HFL_F32 ? 4 : 2, weight_bytes = a.weight_dtype == HFL_F32 ? 4 : 2;
  for (const void* x : {a.x, a.weight, static_cast<const void*>(a.out)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "rms_norm: expected tensors that begin at multiples of 16 bytes";
  }
  for (int64_t stride : {a.x_o, a.x_m, a.x_i}) {
    if (stride * bytes % 16) return "rms_norm: expected rows that begin at multiples of 16 bytes";
  }
  if (a.weight_r * weight_bytes % 16) return "rms_norm: expected weights that begin at multiples of 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_norm_cuda(const hfl_norm* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const int warps = (a->dim / 8 + hfl::WARP - 1) / hfl::WARP, most = hfl::MOST_THREADS / hfl::WARP;
  const unsigned rows = static_cast<unsigned>(a->outer * a->middle * a->inner);
  const bool one = warps <= most;
  const void* kernel = reinterpret_cast<const void*>(one ? hfl::norm_kernel<1> : hfl::norm_kernel<2>);
  hfl_norm task = *a;
  void* arguments[] = {&task};
  const int threads = (one ? warps : (warps + 1) / 2) * hfl::WARP;
  const cudaError_t error = hfl::launch(kernel, dim3(rows), threads, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
