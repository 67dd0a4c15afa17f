// experts.sort_experts and combine_experts: where the rows of each expert are, and what tokens get out of theirs.
//
// sort_experts: one block; rows keep their order within an expert. A warp counts what its 32 rows have of each expert,
//   and the counts of all warps are added up one after the other. Bound by: steps that wait for each other.
// combine_experts: a block for 2048 numbers of a token; products and sums in float32, one after the other. Bound by:
//   bytes.
#include <initializer_list>

#include "../experts.h"
#include "eight.cuh"
#include "launch.cuh"

namespace hfl {
namespace {

constexpr int SORTERS = 1024, WARPS = SORTERS / 32, ROUNDS = HFL_MOST_SORTED / SORTERS;
constexpr int TABLE = WARPS * (HFL_MOST_EXPERTS + 1);
constexpr int THREADS = 256;

__global__ void __launch_bounds__(SORTERS) sort_experts_kernel(const hfl_sort a) {
  extern __shared__ int16_t counts[];                // [warp][expert]: of this round, then of those before
  __shared__ int total[HFL_MOST_EXPERTS + 1];        // of rounds before, then where an expert begins
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int experts = a.experts + 1, warps = min(WARPS, (a.rows + 31) / 32);  // the last one's: of no expert
  for (int e = thread; e < experts; e += SORTERS) total[e] = 0;
  wait_for_previous(warp);
  int ids[ROUNDS], places[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int row = round * SORTERS + thread;
    if (round * SORTERS >= a.rows) break;
    for (int i = thread; i < warps * experts; i += SORTERS) counts[i] = 0;
    __syncthreads();
    const int64_t id = row < a.rows ? a.ids[row] : -1;
    ids[round] = id >= 0 && id < a.experts ? static_cast<int>(id) : a.experts;
    const bool there = row < a.rows;
    const uint32_t alike = __match_any_sync(0xffffffffu, there ? ids[round] : -1);
    const int below = __popc(alike & ((1u << lane) - 1));
    if (there && below == 0) counts[warp * experts + ids[round]] = static_cast<int16_t>(__popc(alike));
    __syncthreads();
    for (int e = thread; e < experts; e += SORTERS) {
      int sum = total[e];
      for (int w = 0; w < warps; ++w) {
        const int own = counts[w * experts + e];
        counts[w * experts + e] = static_cast<int16_t>(sum), sum += own;
      }
      total[e] = sum;
    }
    __syncthreads();
    places[round] = there ? counts[warp * experts + ids[round]] + below : 0;
    __syncthreads();
  }
  if (warp == 0) {
    int upto = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane, own = e < experts ? total[e] : 0;
      int sum = own;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, sum, by);
        if (lane >= by) sum += before;
      }
      if (e < experts) total[e] = upto + sum - own;
      if (e < a.experts) a.ends[e] = upto + sum;
      upto += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const int row = round * SORTERS + thread;
    if (row >= a.rows) break;
    const int place = total[ids[round]] + places[round];
    a.places[row] = place, a.order[place] = row;
  }
}

__device__ __forceinline__ float weight_at(const hfl_combine& a, int64_t at) {
  if (a.weight_dtype == HFL_F32) return static_cast<const float*>(a.weights)[at];
  const uint32_t x = static_cast<const uint16_t*>(a.weights)[at];
  return a.weight_dtype == HFL_BF16 ? unpack_bf16(x).x : unpack_f16(x).x;
}

__global__ void __launch_bounds__(THREADS) combine_experts_kernel(const hfl_combine a) {
  const int64_t token = blockIdx.x;
  const int column = (static_cast<int>(blockIdx.y) * THREADS + static_cast<int>(threadIdx.x)) * 8;
  wait_for_previous(static_cast<int>(threadIdx.x));
  if (column >= a.columns) return;
  const int end = a.ends[a.experts - 1];
  Eight sum = {};
  for (int i = 0; i < a.top; ++i) {
    const int place = a.places[token * a.top + i];
    if (place >= end) continue;  // of no expert
    const float by = weight_at(a, token * a.top + i);
    const Eight x = unpack(load(a.rows, static_cast<int64_t>(place) * a.columns + column, a.dtype), a.dtype);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.x[j] = __fadd_rn(sum.x[j], __fmul_rn(x.x[j], by));
  }
  store(a.out, token * a.columns + column, sum, a.dtype);
}

const char* check(const hfl_sort& a) {
  if (a.rows < 1 || a.rows > HFL_MOST_SORTED) return "sort_experts: expected 1 to 4096 rows";
  if (a.experts < 1 || a.experts > HFL_MOST_EXPERTS) return "sort_experts: expected 1 to 512 experts";
  return nullptr;
}

const char* check(const hfl_combine& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "combine_experts: expected float16 or bfloat16";
  if (a.weight_dtype < HFL_F32 || a.weight_dtype > HFL_BF16) return "combine_experts: expected floating-point weights";
  if (a.tokens < 1 || a.top < 1 || a.columns < 8 || a.columns % 8) {
    return "combine_experts: expected no empty axis, and a multiple of 8 columns";
  }
  if (a.columns > 65535 * 8 * THREADS) return "combine_experts: expected fewer columns";
  for (const void* x : {a.rows, static_cast<const void*>(a.out)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "combine_experts: expected tensors at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_sort_cuda(const hfl_sort* a) {
  if (const char* message = hfl::check(*a)) return message;
  hfl_sort task = *a;
  void* arguments[] = {&task};
  const void* kernel = reinterpret_cast<const void*>(&hfl::sort_experts_kernel);
  const int bytes = hfl::TABLE * static_cast<int>(sizeof(int16_t));
  const cudaError_t error = hfl::launch(kernel, dim3(1), hfl::SORTERS, static_cast<size_t>(bytes), a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" const char* hfl_combine_cuda(const hfl_combine* a) {
  if (const char* message = hfl::check(*a)) return message;
  hfl_combine task = *a;
  void* arguments[] = {&task};
  const void* kernel = reinterpret_cast<const void*>(&hfl::combine_experts_kernel);
  const int each = 8 * hfl::THREADS;
  const dim3 grid(static_cast<unsigned>(a->tokens), static_cast<unsigned>((a->columns + each - 1) / each));
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
