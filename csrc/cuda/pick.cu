// ops.pick_blocks with `take`: the forced blocks of each row of scores and the best candidates, ascending.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3. The least score that is taken is found by digits, 11 bits
// at a time, with a histogram of those candidates that share the digits before; of candidates with just that score the
// first are taken, as blocks are counted off in order. NaN counts as -inf, as in the definition.
// Shapes: scores [B, Hs, N, M] float32, M to 2^31; ids [B, Hs, N, K] int32.
// Grid: (B * Hs * N): a row each. Block: 1024 threads.
// Shared memory: 8 KiB of histogram, and 4 bytes a candidate where they fit (56 K of them on sm_90); where they do not,
//   the four passes read the scores again from the L2. Bound by: latency of the passes, about 3 us for 8192 scores.
#include "../hf_longctx.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048, EACH = 8, CHUNK = THREADS * EACH;

// A score as a whole number of the same order; -0 is 0.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score != score ? -INFINITY : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum of x over the threads before this one; total: over all. `sums`: one place for each warp.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t* sums, uint32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t running = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, running, step);
    running += lane >= step ? other : 0u;
  }
  __syncthreads();  // nobody still reads the sums of the call before
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  const uint32_t mine = sums[lane];
  uint32_t before = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, before, step);
    before += lane >= step ? other : 0u;
  }
  total = __shfl_sync(0xffffffffu, before, 31);
  return __shfl_sync(0xffffffffu, before - mine, warp) + running - x;
}
static_assert(WARPS == 32, "a warp sums up the warps");

// Candidates of a row: their ranks in shared memory, or their scores.
struct Ranks {
  const float* scores;
  uint32_t* held;  // nullptr: they do not fit
  int count;

  __device__ uint32_t operator()(int i) const { return held ? held[i] : rank_of(scores[i]); }
};

struct Threshold {
  uint32_t least;  // rank of the last one taken
  uint32_t ties;   // how many of just that rank are taken
};

// The `take`-th largest rank, 0 < take < count.
__device__ Threshold find(const Ranks& ranks, uint32_t take, uint32_t* bins, uint32_t* sums) {
  __shared__ uint32_t found[2];
  uint32_t prefix = 0, left = take;
  for (int shift = 21, bits = 0; ; shift -= 11) {
    const int down = shift < 0 ? 0 : shift, width = shift < 0 ? 10 : 11;
    for (int i = static_cast<int>(threadIdx.x); i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < ranks.count; i += THREADS) {
      uint32_t rank;
      if (bits == 0 && ranks.held) {
        rank = ranks.held[i] = rank_of(ranks.scores[i]);
      } else {
        rank = ranks(i);
      }
      if (bits == 0 || (rank >> (32 - bits)) == prefix) atomicAdd(bins + ((rank >> down) & ((1u << width) - 1)), 1u);
    }
    __syncthreads();
    const int top = BINS - 1 - 2 * static_cast<int>(threadIdx.x);  // from the largest digit down
    const uint32_t first = bins[top], second = bins[top - 1];
    uint32_t total;
    const uint32_t before = sum_before(first + second, sums, total);
    if (before < left && left <= before + first) {
      found[0] = static_cast<uint32_t>(top), found[1] = left - before;
    } else if (before + first < left && left <= before + first + second) {
      found[0] = static_cast<uint32_t>(top) - 1, found[1] = left - before - first;
    }
    __syncthreads();
    prefix = prefix << width | found[0];
    left = found[1];
    bits += width;
    if (bits == 32) return Threshold{prefix, left};
  }
}

// Candidates at or above the threshold, in order, to `to`, of which there are `room` places.
__device__ void emit(const Ranks& ranks, const Threshold& from, int first, int32_t* to, int64_t room, uint32_t* sums) {
  uint32_t above = 0, equal = 0;  // in the chunks before
  for (int start = 0; start < ranks.count; start += CHUNK) {
    const int own = start + static_cast<int>(threadIdx.x) * EACH;
    uint32_t larger = 0, tied = 0;  // bit i: candidate i of this thread
    if (ranks.held && own + EACH <= ranks.count) {
      const uint4 x = *reinterpret_cast<const uint4*>(ranks.held + own);
      const uint4 y = *reinterpret_cast<const uint4*>(ranks.held + own + 4);
      const uint32_t all[EACH] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        larger |= static_cast<uint32_t>(all[i] > from.least) << i;
        tied |= static_cast<uint32_t>(all[i] == from.least) << i;
      }
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const bool there = own + i < ranks.count;
        const uint32_t rank = there ? ranks(own + i) : 0u;  // no rank is 0
        larger |= static_cast<uint32_t>(there && rank > from.least) << i;
        tied |= static_cast<uint32_t>(there && rank == from.least) << i;
      }
    }
    uint32_t total;
    const uint32_t counts = static_cast<uint32_t>(__popc(larger)) << 16 | static_cast<uint32_t>(__popc(tied));
    const uint32_t before = sum_before(counts, sums, total);
    uint32_t place = above + (before >> 16), ties = equal + (before & 0xffffu);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const bool is_tied = tied >> i & 1u, picked = (larger >> i & 1u) || (is_tied && ties < from.ties);
      const int64_t at = static_cast<int64_t>(place) + min(ties, from.ties);
      if (picked && at < room) to[at] = first + own + i;
      place += larger >> i & 1u;
      ties += is_tied;
    }
    above += total >> 16, equal += total & 0xffffu;
  }
}
static_assert(CHUNK < 1 << 16, "two counts in one word");

__global__ void __launch_bounds__(THREADS, 1) pick_kernel(const hfl_pick a, bool held) {
  extern __shared__ __align__(16) uint32_t room[];
  __shared__ uint32_t bins[BINS];
  __shared__ uint32_t sums[WARPS];
  wait_for_previous();
  const int64_t row = blockIdx.x, n = row % a.queries, b = row / a.queries / a.heads;
  const int64_t low = a.low[b * a.low_b + n], high = a.high[b * a.high_b + n];
  const int end = high < 0 ? 0 : static_cast<int>(high < a.blocks ? high + 1 : a.blocks);  // no block from here on
  const int first = min(a.sink, end);                                            // candidates are from here on,
  const int last = low < first ? first : static_cast<int>(low < end ? low : end);  // and before this one
  const int count = last - first, taken = min(a.take, count), thread = static_cast<int>(threadIdx.x);
  int32_t* to = a.ids + row * a.chosen;
  for (int i = thread; i < min(first, a.chosen); i += THREADS) to[i] = i;
  const int before = first + taken, filled = before + end - last;
  for (int i = before + thread; i < a.chosen; i += THREADS) to[i] = i < filled ? last + i - before : -1;
  if (taken == count) {
    for (int i = first + thread; i < min(last, a.chosen); i += THREADS) to[i] = i;
    return;
  }
  if (taken == 0) return;
  const Ranks ranks = {a.scores + row * a.blocks + first, held ? room : nullptr, count};
  const Threshold from = find(ranks, static_cast<uint32_t>(taken), bins, sums);
  emit(ranks, from, first, to + first, static_cast<int64_t>(a.chosen) - first, sums);
}

// Bytes of dynamic shared memory that the current device allows the kernel, which it is then allowed.
cudaError_t room_on_device(int& bytes) {
  static std::atomic<int> known[MOST_DEVICES];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  bytes = device < MOST_DEVICES ? known[device].load(std::memory_order_acquire) : 0;
  if (bytes) return cudaSuccess;
  cudaFuncAttributes of_kernel;
  error = cudaFuncGetAttributes(&of_kernel, pick_kernel);
  int most = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  bytes = (most - static_cast<int>(of_kernel.sharedSizeBytes)) / 128 * 128;
  error = cudaFuncSetAttribute(pick_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < MOST_DEVICES) known[device].store(bytes, std::memory_order_release);
  return error;
}

const char* check(const hfl_pick& a) {
  if (a.batch < 1 || a.heads < 1 || a.queries < 1 || a.blocks < 0 || a.chosen < 0) {
    return "pick_blocks: expected no empty axis";
  }
  if (static_cast<int64_t>(a.batch) * a.heads * a.queries > INT32_MAX) return "pick_blocks: expected fewer rows";
  return a.sink < 0 || a.take < 0 ? "pick_blocks: expected sink and take of at least 0" : nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_pick_scratch(const hfl_pick*) { return 0; }

extern "C" const char* hfl_pick_cuda(const hfl_pick* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  if (a->chosen == 0) return nullptr;
  int room = 0;
  cudaError_t error = hfl::room_on_device(room);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t wanted = static_cast<int64_t>(a->blocks) * 4;
  const bool held = wanted <= room;
  const unsigned rows = static_cast<unsigned>(a->batch) * static_cast<unsigned>(a->heads) *
                        static_cast<unsigned>(a->queries);
  hfl_pick block = *a;
  void* arguments[] = {&block, const_cast<bool*>(&held)};
  error = hfl::launch(reinterpret_cast<const void*>(&hfl::pick_kernel), dim3(rows), hfl::THREADS,
                      held ? static_cast<size_t>(wanted) : 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
