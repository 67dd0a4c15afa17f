// layers.project, layers.project_gated: products of up to 4 rows with weights as they lie; one launch for the three of
// queries, keys and values, or for both halves of a gate.
//
// Shapes: x [R, K], weight[p] [N_p, K], out[p] [R, N_p]; 16 bits, sums in float32. K a multiple of 8.
// Grid: a block for 8 rows of a weight; gated, for 4 of each of both. Block: 4 warps, each with every fourth piece of
// 256 channels; a lane has 8 channels of 8 rows at a time, and those of the next piece are on their way.
// Shared memory: a sum of each warp, row and output. Bound by: reading the weights.
//
// Weights are not written by kernels, so the first of them are read before the kernel before this one is done.
// A row's sums do not depend on the others: all are added in the same order.
#include "../project.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {
namespace {

constexpr int LANES = 32, WARPS = 4, OUTPUTS = 8, PIECE = 8 * LANES;

struct Weights {
  uint4 of[OUTPUTS];
};

// 16 bytes that are read once: they need no place in the L1.
__device__ __forceinline__ uint4 read_once(const uint16_t* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
}

template <bool BF16>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  return BF16 ? unpack_bf16(word) : unpack_f16(word);
}

template <bool BF16>
__device__ __forceinline__ float rounded(float x) {
  return BF16 ? __bfloat162float(__float2bfloat16_rn(x)) : __half2float(__float2half_rn(x));
}

template <bool BF16>
__device__ __forceinline__ float value(const void* from, int64_t index) {
  if (BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[index]);
  return __half2float(static_cast<const __half*>(from)[index]);
}

template <bool BF16>
__device__ __forceinline__ void put(void* to, int64_t index, float x) {
  if (BF16) {
    static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(to)[index] = __float2half_rn(x);
  }
}

// Eight sums of a warp, of which lane l gets that of output l / 4.
__device__ __forceinline__ float sum_of_warp(float (&x)[OUTPUTS], int lane) {
#pragma unroll
  for (int half = OUTPUTS / 2, step = LANES / 2; half; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, step);
    }
  }
  x[0] += __shfl_xor_sync(0xffffffffu, x[0], 2);
  return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// The weights of one of the block's outputs: the first half of them are at `low`, the others at `high`.
__device__ __forceinline__ const uint16_t* row_of(const uint16_t* low, const uint16_t* high, int i, int inputs) {
  return i < OUTPUTS / 2 ? low + i * inputs : high + (i - OUTPUTS / 2) * inputs;
}

template <int ROWS, bool BF16>
__global__ void __launch_bounds__(LANES* WARPS, ROWS > 2 ? 3 : 4) project_kernel(const hfl_project a) {
  const int lane = static_cast<int>(threadIdx.x) % LANES, warp = static_cast<int>(threadIdx.x) / LANES;
  const int each = a.gated ? OUTPUTS / 2 : OUTPUTS;  // outputs of a part in this block
  const int second = a.outputs[0] / each, third = second + (a.parts > 2 ? a.outputs[1] / each : INT32_MAX / 2);
  const int block = static_cast<int>(blockIdx.x), part = a.gated || block < second ? 0 : block < third ? 1 : 2;
  const int first = (block - (part == 0 ? 0 : part == 1 ? second : third)) * each;
  const int outputs = part == 0 ? a.outputs[0] : part == 1 ? a.outputs[1] : a.outputs[2];
  const void* bias = part == 0 ? a.bias[0] : part == 1 ? a.bias[1] : a.bias[2];
  void* out = part == 0 ? a.out[0] : part == 1 ? a.out[1] : a.out[2];
  const void* weight = part == 0 ? a.weight[0] : part == 1 ? a.weight[1] : a.weight[2];
  const uint16_t* low = static_cast<const uint16_t*>(weight) + static_cast<int64_t>(first) * a.inputs;
  const uint16_t* high = low + static_cast<int64_t>(OUTPUTS / 2) * a.inputs;
  if (a.gated) high = static_cast<const uint16_t*>(a.weight[1]) + (low - static_cast<const uint16_t*>(weight));
  int channel = warp * PIECE + lane * 8;
  Weights next = {};
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) {
    if (channel < a.inputs) next.of[i] = read_once(row_of(low, high, i, a.inputs) + channel);
  }
  wait_for_previous(channel);
  float sums[ROWS][OUTPUTS] = {};
  const uint16_t* x = static_cast<const uint16_t*>(a.x);
  for (; channel < a.inputs; channel += WARPS * PIECE) {
    const Weights now = next;
    const int later = channel + WARPS * PIECE;
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      if (later < a.inputs) next.of[i] = read_once(row_of(low, high, i, a.inputs) + later);
    }
    uint4 own[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) own[r] = *reinterpret_cast<const uint4*>(x + r * a.x_r + channel);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float2 pairs[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) pairs[r] = unpack<BF16>((&own[r].x)[word]);
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) {
        const float2 weight = unpack<BF16>((&now.of[i].x)[word]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          sums[r][i] = fmaf(pairs[r].x, weight.x, sums[r][i]);
          sums[r][i] = fmaf(pairs[r].y, weight.y, sums[r][i]);
        }
      }
    }
  }
  __shared__ float of_warps[WARPS][ROWS][OUTPUTS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float sum = sum_of_warp(sums[r], lane);
    if (lane % 4 == 0) of_warps[warp][r][lane / 4] = sum;
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / OUTPUTS, i = static_cast<int>(threadIdx.x) % OUTPUTS;
  if (row >= ROWS || i >= each) return;
  float made = 0.0f, other = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    made += of_warps[w][row][i];
    other += of_warps[w][row][(i + OUTPUTS / 2) % OUTPUTS];
  }
  if (a.gated) {
    const float gate = rounded<BF16>(made);
    made = rounded<BF16>(gate / (1.0f + expf(-gate))) * rounded<BF16>(other);
  } else if (bias) {
    made += value<BF16>(bias, first + i);
  }
  put<BF16>(out, static_cast<int64_t>(row) * outputs + first + i, made);
}

template <int ROWS>
const void* kernel_for(int dtype) {
  return reinterpret_cast<const void*>(dtype == HFL_BF16 ? project_kernel<ROWS, true> : project_kernel<ROWS, false>);
}

const char* check(const hfl_project& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "project: expected float16 or bfloat16";
  if (a.rows < 1 || a.rows > HFL_PROJECT_ROWS) return "project: expected 1 to 4 rows";
  if (a.parts < 1 || a.parts > HFL_PROJECT_PARTS) return "project: expected 1 to 3 weights";
  if (a.gated && (a.parts != 2 || a.outputs[0] != a.outputs[1] || a.outputs[0] % (OUTPUTS / 2))) {
    return "project_gated: expected two weights of as many outputs, a multiple of 4";
  }
  if (a.inputs < 8 || a.inputs % 8 || a.x_r % 8) return "project: expected a multiple of 8 inputs";
  if (a.inputs > INT32_MAX / OUTPUTS) return "project: expected fewer inputs";
  if (reinterpret_cast<uintptr_t>(a.x) % 16) return "project: expected rows that begin at multiples of 16 bytes";
  for (int p = 0; p < a.parts; ++p) {
    if (a.outputs[p] < 1 || (!a.gated && a.outputs[p] % OUTPUTS)) return "project: expected a multiple of 8 outputs";
    if (a.gated && a.bias[p]) return "project_gated: expected no bias";
    if (reinterpret_cast<uintptr_t>(a.weight[p]) % 16) {
      return "project: expected weights that begin at multiples of 16 bytes";
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_project_cuda(const hfl_project* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  unsigned blocks = 0;
  const int each = a->gated ? hfl::OUTPUTS / 2 : hfl::OUTPUTS;
  for (int p = 0; p < (a->gated ? 1 : a->parts); ++p) blocks += static_cast<unsigned>(a->outputs[p] / each);
  const void* const kernels[] = {hfl::kernel_for<1>(a->dtype), hfl::kernel_for<2>(a->dtype),
                                 hfl::kernel_for<3>(a->dtype), hfl::kernel_for<4>(a->dtype)};
  hfl_project task = *a;
  void* arguments[] = {&task};
  const cudaError_t error =
      hfl::launch(kernels[a->rows - 1], dim3(blocks), hfl::LANES * hfl::WARPS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
