// ops.count_blocks: what the layers of a step read of the blocks that they could see, in one launch.
//
// Grid: (parts, B). Block: 256 threads, which share out the numbers of a row. Shared memory: 32 bytes.
// Bound by: latency. Sums are of whole numbers, so their order does not matter.
#include "../count.h"
#include "launch.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

__global__ void __launch_bounds__(THREADS) count_kernel(const __grid_constant__ hfl_count a) {
  __shared__ uint32_t sums[WARPS];
  const int part = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), heads = a.heads[part], each = heads * a.queries * a.chosen;
  const int32_t* ids = a.ids[part] + static_cast<int64_t>(b) * each;
  wait_for_previous(thread);
  const auto last_of = [&](int query) {  // the block of a query
    const int64_t pos = a.pos[b * a.pos_b + query * a.pos_n];
    return pos < 0 ? int64_t{-1} : pos / a.block;
  };
  auto* tally = reinterpret_cast<unsigned long long*>(a.tally);
  for (int query = thread; query < a.queries; query += THREADS) {
    atomicAdd(tally + 1, static_cast<unsigned long long>((last_of(query) + 1) * heads));
  }
  int held = 0;
  int64_t last = last_of(0);
  uint32_t count = 0;
#pragma unroll 8
  for (int i = thread; i < each; i += THREADS) {
    const int id = ids[i], query = a.queries == 1 ? 0 : i / a.chosen % a.queries;
    if (query != held) held = query, last = last_of(query);
    count += id >= 0 && id <= last ? 1u : 0u;
  }
  count = __reduce_add_sync(0xffffffffu, count);
  if (thread % 32 == 0) sums[thread / 32] = count;
  __syncthreads();
  if (thread >= 32) return;
  count = __reduce_add_sync(0xffffffffu, thread < WARPS ? sums[thread] : 0u);
  if (thread == 0) atomicAdd(tally, static_cast<unsigned long long>(count));
}

const char* check(const hfl_count& a) {
  if (a.parts < 1 || a.parts > HFL_COUNT_PARTS) return "count_blocks: expected 1 to 64 parts";
  if (a.batch < 1 || a.batch > UINT16_MAX || a.queries < 1 || a.chosen < 1 || a.block < 1) {
    return "count_blocks: expected at least one row, of at most 65535, one query, one number and one token of a block";
  }
  for (int i = 0; i < a.parts; ++i) {
    if (a.heads[i] < 1 || static_cast<int64_t>(a.heads[i]) * a.queries * a.chosen > INT32_MAX - THREADS) {
      return "count_blocks: expected fewer than 2^31 numbers of a row";
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_count_cuda(const hfl_count* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  hfl_count task = *a;
  void* arguments[] = {&task};
  const dim3 grid(static_cast<unsigned>(a->parts), static_cast<unsigned>(a->batch));
  const void* kernel = reinterpret_cast<const void*>(&hfl::count_kernel);
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
