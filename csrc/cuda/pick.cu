// ops.pick_blocks with `take`: the forced blocks of each row of scores and the best candidates, ascending.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3. The least score that is taken is found with a histogram of
// 2048 bins over the range of the scores, then, if just few share a bin with it, among those, else with finer bins of
// that bin; of candidates with just that score the first are taken, as blocks are counted off in order. NaN counts as
// -inf, as in the definition.
// Shapes: scores [B, Hs, N, M] float32, M to 2^31; ids [B, Hs, N, K] int32.
// Grid: (B * Hs * N): a row each. Block: 512 threads.
// Shared memory: 9 KiB, and 4 bytes a block where they fit (54 K of them on sm_90); where they do not, each pass reads
//   the scores again from the L2. Bound by: latency of one load and of about ten barriers.
#include <atomic>

#include "../hf_longctx.h"
#include "divide.cuh"
#include "pick_ranks.cuh"
#include "step.cuh"

namespace hfl {
namespace {

struct Threshold {
  uint32_t least;  // rank of the last one taken
  uint32_t ties;   // how many of just that rank are taken
};

struct Room {
  uint32_t bins[BINS];
  uint32_t sums[2][WARPS], least[WARPS], most[WARPS];
  uint32_t found[3];  // a bin, how many are taken of it, how many it holds
  uint32_t few;
};

// Largest and least rank of all candidates, at least one; `ahead`: scores of a thread's first blocks.
__device__ void range(const Ranks& ranks, float (&ahead)[EACH], Room& room, uint32_t& least, uint32_t& most) {
  const int thread = static_cast<int>(threadIdx.x);
  least = UINT32_MAX, most = 0;
#pragma unroll 1
  for (int own = thread * EACH; own < ranks.last; own += CHUNK) {
    if (own >= CHUNK) ranks.load(ahead, own);
    uint32_t x[EACH];
    ranks.rank(x, ahead, own);
#pragma unroll
    for (int i = 0; i < EACH; ++i) least = min(least, x[i] - 1), most = max(most, x[i]);  // none: 0 - 1 is the largest
  }
  room.least[thread / 32] = __reduce_min_sync(0xffffffffu, least);
  room.most[thread / 32] = __reduce_max_sync(0xffffffffu, most);
  __syncthreads();
  least = __reduce_min_sync(0xffffffffu, room.least[thread % WARPS]) + 1;
  most = __reduce_max_sync(0xffffffffu, room.most[thread % WARPS]);
}

// The `left`-th largest of the room.found[2] <= FEW candidates with ranks of base to base + width - 1; bins are zeros.
__device__ Threshold find_among_few(const Ranks& ranks, uint32_t base, uint32_t width, uint32_t left, Room& room) {
  const uint32_t thread = threadIdx.x, count = room.found[2];
#pragma unroll 1
  for (int own = static_cast<int>(thread) * EACH; own < ranks.last; own += CHUNK) {
    uint32_t x[EACH];
    int mine = 0;  // bit i: candidate i of this thread
    ranks.get(x, own);
#pragma unroll
    for (int i = 0; i < EACH; ++i) mine |= x[i] && x[i] - base < width ? 1 << i : 0;
#pragma unroll 1
    for (; mine; mine &= mine - 1) room.bins[atomicAdd(&room.few, 1u)] = ranks.get_one(own + __ffs(mine) - 1);
  }
  __syncthreads();
  if (thread < count) {
    const uint32_t mine = room.bins[thread];
    uint32_t larger = 0, equal = 0;
    for (uint32_t i = 0; i < count; i += 4) {  // zeros beyond
      const uint4 x = *reinterpret_cast<const uint4*>(room.bins + i);
      larger += (x.x > mine) + (x.y > mine) + (x.z > mine) + (x.w > mine);
      equal += (x.x == mine) + (x.y == mine) + (x.z == mine) + (x.w == mine);
    }
    if (larger < left && left <= larger + equal) room.found[0] = mine, room.found[1] = left - larger;
  }
  __syncthreads();
  return Threshold{room.found[0], room.found[1]};
}

// The `left`-th largest rank, 0 < left < candidates; bins are zeros.
__device__ Threshold find(const Ranks& ranks, float (&ahead)[EACH], uint32_t left, Room& room) {
  uint32_t base, most;
  range(ranks, ahead, room, base, most);
  int shift = max(21 - __clz(static_cast<int>(most - base)), 0);
  uint32_t width = BINS;
#pragma unroll 1
  for (int pass = 0;; ++pass) {  // `width` bins, of 2^shift ranks each
#pragma unroll 1
    for (int own = static_cast<int>(threadIdx.x) * EACH; own < ranks.last; own += CHUNK) {
      uint32_t x[EACH];
      ranks.get(x, own);
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const uint32_t bin = (x[i] - base) >> shift;
        if (x[i] && bin < width) atomicAdd(room.bins + bin, 1u);
      }
    }
    __syncthreads();
    const uint32_t low = BINS - 4 - 4 * threadIdx.x;  // a thread's bins, from the largest down
    const uint4 own = *reinterpret_cast<const uint4*>(room.bins + low);
    *reinterpret_cast<uint4*>(room.bins + low) = make_uint4(0, 0, 0, 0);
    const uint32_t counts[4] = {own.x, own.y, own.z, own.w};
    uint32_t before = sum_before(own.x + own.y + own.z + own.w, room.sums[pass % 2]);
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (before < left && left <= before + counts[i]) {
        room.found[0] = low + i, room.found[1] = left - before, room.found[2] = counts[i];
      }
      before += counts[i];
    }
    __syncthreads();
    base += room.found[0] << shift, left = room.found[1];
    if (shift == 0) return Threshold{base, left};
    if (room.found[2] <= FEW) return find_among_few(ranks, base, 1u << shift, left, room);
    width = 1u << min(shift, DIGIT), shift = max(shift - DIGIT, 0);
  }
}

// Candidates at or above the threshold, in order, to `to`, of which there are `places`.
__device__ void emit(const Ranks& ranks, const Threshold& from, int32_t* to, int64_t places, Room& room) {
  uint32_t above = 0, equal = 0;  // in the chunks before
#pragma unroll 1
  for (int start = 0, pass = 0; start < ranks.last; start += CHUNK, ++pass) {
    const int own = start + static_cast<int>(threadIdx.x) * EACH;
    uint32_t taken = 0, tied = 0, x[EACH];  // bit i: candidate i of this thread
    ranks.get(x, own);
#pragma unroll
    for (int i = 0; i < EACH; ++i) taken |= x[i] >= from.least ? 1u << i : 0u;
#pragma unroll 1
    for (uint32_t left = taken; left; left &= left - 1) {  // few of them
      if (ranks.get_one(own + __ffs(static_cast<int>(left)) - 1) == from.least) tied |= left & (0u - left);
    }
    uint32_t total;
    const uint32_t counts = static_cast<uint32_t>(__popc(taken ^ tied)) << 16 | static_cast<uint32_t>(__popc(tied));
    const uint32_t before = sum_before(counts, room.sums[pass % 2], &total);
    uint32_t place = above + (before >> 16), ties = equal + (before & 0xffffu);
#pragma unroll 1
    for (uint32_t left = taken; left; left &= left - 1) {
      const uint32_t bit = left & (0u - left);
      const int64_t at = static_cast<int64_t>(place) + min(ties, from.ties);
      if (tied & bit ? ties++ < from.ties : (++place, true)) {
        if (at < places) to[at] = own + __ffs(static_cast<int>(bit)) - 1;
      }
    }
    above += total >> 16, equal += total & 0xffffu;
  }
}
static_assert(CHUNK < 1 << 16, "two counts in one word");

struct PickTask {
  hfl_pick a;
  Divisor queries, heads;
  bool held;  // ranks fit into shared memory
  PickTurn turn;
};

// What a row takes; `ahead`: scores of a thread's first blocks.
__device__ __forceinline__ void pick_row(const hfl_pick& a, Ranks& ranks, int64_t low, int64_t high, int32_t* to,
                                         float (&ahead)[EACH], Room& room) {
  const int thread = static_cast<int>(threadIdx.x);
  const int end = high < 0 ? 0 : static_cast<int>(high < a.blocks ? high + 1 : a.blocks);  // no block from here on
  const int first = ranks.first = min(a.sink, end);
  const int last = ranks.last = low < first ? first : static_cast<int>(low < end ? low : end);
  const int count = last - first, taken = min(a.take, count);
#pragma unroll 1
  for (int i = thread; i < min(first, a.chosen); i += THREADS) to[i] = i;
  const int before = first + taken, filled = before + end - last;
#pragma unroll 1
  for (int i = before + thread; i < a.chosen; i += THREADS) to[i] = i < filled ? last + i - before : -1;
  if (taken == count) {
#pragma unroll 1
    for (int i = first + thread; i < min(last, a.chosen); i += THREADS) to[i] = i;
    return;
  }
  if (taken == 0) return;
  const Threshold from = find(ranks, ahead, static_cast<uint32_t>(taken), room);
  emit(ranks, from, to + first, static_cast<int64_t>(a.chosen) - first, room);
}

__global__ void __launch_bounds__(THREADS, 1) pick_kernel(const __grid_constant__ PickTask p) {
  extern __shared__ __align__(16) uint32_t ranks_of_row[];
  __shared__ __align__(16) Room room;
  const int thread = static_cast<int>(threadIdx.x);
  reinterpret_cast<uint4*>(room.bins)[thread] = make_uint4(0, 0, 0, 0);
  if (thread == 0) room.few = 0;
  const hfl_pick& a = p.a;
  const int row = static_cast<int>(blockIdx.x), line = p.queries.divide(row), n = row - line * a.queries;
  const int b = p.heads.divide(line);
  const float* scores = a.scores + static_cast<int64_t>(row) * a.blocks;
  begin_turn(p.turn.turn, b | n);
  const bool aligned = reinterpret_cast<uintptr_t>(scores) % 16 == 0;
  Ranks ranks = {scores, p.held ? ranks_of_row : nullptr, a.blocks, aligned, 0, 0};
  const int64_t low = a.low[b * a.low_b + n], high = a.high[b * a.high_b + n];
  if (p.turn.scored) {
    if (thread == 0) {
      wait_until(p.turn.scored + row, p.turn.blocks);
      p.turn.scored[row] = 0;
    }
    __syncthreads();
  }
  float ahead[EACH];
  ranks.load(ahead, thread * EACH);  // before it is known which of them are candidates
  pick_row(a, ranks, low, high, a.ids + static_cast<int64_t>(row) * a.chosen, ahead, room);
  if (p.turn.picked) {
    __syncthreads();
    if (thread == 0) store_in_order(p.turn.picked + row, p.turn.readers);
  }
  end_turn(p.turn.turn);
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

const char* pick_in_turn(const hfl_pick& a, const PickTurn& turn) {
  const char* message = check(a);
  if (message) return message;
  if (a.chosen == 0) return nullptr;
  int room = 0;
  cudaError_t error = room_on_device(room);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t wanted = (static_cast<int64_t>(a.blocks) + EACH - 1) / EACH * EACH * 4;
  PickTask task = {a, Divisor(a.queries), Divisor(a.heads), wanted <= room, turn};
  const unsigned rows =
      static_cast<unsigned>(a.batch) * static_cast<unsigned>(a.heads) * static_cast<unsigned>(a.queries);
  void* arguments[] = {&task};
  error = launch(reinterpret_cast<const void*>(&pick_kernel), dim3(rows), THREADS,
                 task.held ? static_cast<size_t>(wanted) : 0, a.stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl

extern "C" int64_t hfl_pick_scratch(const hfl_pick*) { return 0; }

extern "C" const char* hfl_pick_cuda(const hfl_pick* a) { return hfl::pick_in_turn(*a, hfl::PickTurn()); }
