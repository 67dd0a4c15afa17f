// The choice of a step where it is needed: each block that reads chosen keys finds all of its list that it reads itself.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3, as pick.cu defines it. A thread holds EACH scores in
// registers, of blocks that follow on each other. That `take` of them lie above some score is known from the two best of
// each thread, mostly; a histogram of what lies above it finds the bin of the last one taken, and of the few in that bin
// each warp finds it for itself.
#pragma once
#include <limits.h>
#include <math.h>

#include "../hf_longctx.h"
#include "choose_place.cuh"

namespace hfl {

constexpr int CHOOSERS = 256;  // threads

struct ChooseRoom {
  static constexpr int BINS = 1024, FEW = 32, WARPS = CHOOSERS / 32;
  uint32_t bins[BINS];
  uint32_t most[WARPS], least[WARPS], second[WARPS];
  int full[WARPS], counts[2][WARPS];
  uint32_t ranks[FEW];
  int blocks[FEW];
  int few, tie;

  // Before `choose`, by all threads; a barrier comes between.
  __device__ __forceinline__ void clear() {
    reinterpret_cast<uint4*>(bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) few = 0;
  }
};
static_assert(ChooseRoom::BINS == 4 * CHOOSERS, "four bins a thread");

// A score as a whole number of the same order, never 0; that of -0 is that of 0, of NaN that of -inf.
__device__ __forceinline__ uint32_t order_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.0f);
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT_MIN));
}

template <typename T>
__device__ __forceinline__ T sum_up_to(T x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, x, step);
    x += lane >= step ? other : T(0);
  }
  return x;
}

template <int EACH>
struct Chooser {
  using R = ChooseRoom;
  R& room;
  const int thread, warp, lane, own;  // own: a thread's first block
  uint32_t x[EACH];                   // its blocks in order; 0: no candidate

  __device__ explicit Chooser(R& room_)
      : room(room_), thread(static_cast<int>(threadIdx.x)), warp(thread / 32), lane(thread % 32), own(thread * EACH) {}

  // Scores of a row, as `place_of` puts them, of which those from `first` and before `last` are candidates.
  __device__ void load(const float* scores, int first, int last) {
    const float4* from = reinterpret_cast<const float4*>(scores) + warp * 8 * EACH + lane;
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      const float4 four = __ldcg(from + i * 8);
      x[i] = order_of(four.x), x[i + 1] = order_of(four.y), x[i + 2] = order_of(four.z), x[i + 3] = order_of(four.w);
    }
    if (own >= first && own + EACH <= last) return;
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = own + i >= first && own + i < last ? x[i] : 0u;
  }

  // Write those of the `take` best candidates, 0 < take < candidates, that stand at places from `start` on and before
  // `end`, if the first of them stands at `before`, to `list`, in order. By all threads.
  __device__ void choose(int take, int before, int start, int end, int* list) {
    uint32_t tie_rank;
    int tie_block;
    find(static_cast<uint32_t>(take), tie_rank, tie_block);
    uint64_t taken = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (x[i] > tie_rank || (x[i] == tie_rank && own + i <= tie_block)) taken |= uint64_t{1} << i;
    }
    int place = before + sum_before(__popcll(taken), room.counts[0]);
#pragma unroll 1
    for (; taken; taken &= taken - 1, ++place) {
      if (place >= start && place < end) list[place - start] = own + __ffsll(static_cast<int64_t>(taken)) - 1;
    }
  }

 private:
  // Over the threads before this one.
  __device__ int sum_before(int count, int (&counts)[R::WARPS]) {
    const int running = sum_up_to(count, lane);
    if (lane == 31) counts[warp] = running;
    __syncthreads();
    const int others = lane < warp ? counts[lane] : 0;
    return static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<uint32_t>(others))) + running - count;
  }

  // Some rank that at least `take` candidates do not fall below, and the largest.
  __device__ void range(int take, uint32_t& base, uint32_t& most) {
    uint32_t least = UINT32_MAX, best = 0, second = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      second = max(second, min(best, x[i])), best = max(best, x[i]);
      least = min(least, x[i] - 1);  // none: 0 - 1 is the largest
    }
    const int full = 2 * __popc(__ballot_sync(0xffffffffu, second != 0));
    best = __reduce_max_sync(0xffffffffu, best), least = __reduce_min_sync(0xffffffffu, least);
    second = __reduce_min_sync(0xffffffffu, second - 1);
    if (lane == 0) room.most[warp] = best, room.least[warp] = least, room.second[warp] = second, room.full[warp] = full;
    __syncthreads();
    most = __reduce_max_sync(0xffffffffu, room.most[lane % R::WARPS]);
    least = __reduce_min_sync(0xffffffffu, room.least[lane % R::WARPS]);
    second = __reduce_min_sync(0xffffffffu, room.second[lane % R::WARPS]);
    const uint32_t many = __reduce_add_sync(0xffffffffu, lane < R::WARPS ? room.full[lane] : 0);
    base = (many >= static_cast<uint32_t>(take) ? second : least) + 1;
  }

  // The bin, counted from the largest, in which the `left`-th is; then it is the `left`-th of `count` there.
  __device__ uint32_t find_bin(uint32_t& left, uint32_t& count) const {
    const int low = R::BINS - 32 * (lane + 1);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // lanes read other banks at a time
      const uint4 four = *reinterpret_cast<const uint4*>(room.bins + low + (i + lane) % 8 * 4);
      sum += four.x + four.y + four.z + four.w;
    }
    uint32_t running = sum_up_to(sum, lane);
    const int which = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, running >= left))) - 1;
    left -= __shfl_sync(0xffffffffu, running - sum, which);
    const int first = R::BINS - 32 * which - 1;
    const uint32_t mine = room.bins[first - lane];
    running = sum_up_to(mine, lane);
    const int bin = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, running >= left))) - 1;
    left -= __shfl_sync(0xffffffffu, running - mine, bin);
    count = __shfl_sync(0xffffffffu, mine, bin);
    return static_cast<uint32_t>(first - bin);
  }

  // The last one taken: its rank, and its block, after which none of that rank is taken.
  __device__ void find(uint32_t left, uint32_t& rank, int& block) {
    uint32_t base, most, count;
    range(static_cast<int>(left), base, most);
    int shift = max(22 - __clz(static_cast<int>(most - base)), 0);
    uint32_t above = most - base;  // ranks that are counted are base to base + above
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        if (x[i] >= base && x[i] - base <= above) atomicAdd(room.bins + ((x[i] - base) >> shift), 1u);
      }
      __syncthreads();
      const uint32_t bin = find_bin(left, count);
      base += bin << shift, above = (1u << shift) - 1;
      if (count <= R::FEW || shift == 0) break;
      shift = max(shift - 10, 0);
      __syncthreads();
      reinterpret_cast<uint4*>(room.bins)[thread] = make_uint4(0, 0, 0, 0);
      __syncthreads();
    }
    if (count > R::FEW) {
      rank = base, block = last_of_equal(base, static_cast<int>(left));
    } else {
      last_of_few(base, above, left, count, rank, block);
    }
  }

  __device__ void last_of_few(uint32_t base, uint32_t above, uint32_t left, uint32_t count, uint32_t& rank,
                              int& block) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      if (x[i] >= base && x[i] - base <= above) {
        const int at = atomicAdd(&room.few, 1);
        room.ranks[at] = x[i], room.blocks[at] = own + i;
      }
    }
    __syncthreads();
    const bool there = lane < static_cast<int>(count);
    const uint32_t mine = there ? room.ranks[lane] : 0;
    const int at = there ? room.blocks[lane] : INT_MAX;
    uint32_t before = 0;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(count); ++i) {
      const uint32_t other = __shfl_sync(0xffffffffu, mine, i);
      const int where = __shfl_sync(0xffffffffu, at, i);
      before += other > mine || (other == mine && where < at) ? 1u : 0u;
    }
    const int last = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, there && before == left - 1))) - 1;
    rank = __shfl_sync(0xffffffffu, mine, last), block = __shfl_sync(0xffffffffu, at, last);
  }

  // The `left`-th block of this rank.
  __device__ int last_of_equal(uint32_t rank, int left) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) count += x[i] == rank ? 1 : 0;
    int before = sum_before(count, room.counts[1]);
    if (before < left && left <= before + count) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        if (x[i] == rank && ++before == left) room.tie = own + i;
      }
    }
    __syncthreads();
    return room.tie;
  }
};

// A row's list, as pick.cu says: candidates are blocks `first` to `last` - 1, of which `taken` are taken; those before
// and those from `last` to `end` - 1 are forced.
struct ListShape {
  int first, last, end, taken;

  __device__ ListShape(const hfl_pick& a, int b) {
    const int64_t low = a.low[b * a.low_b], high = a.high[b * a.high_b];
    end = high < 0 ? 0 : static_cast<int>(high < a.blocks ? high + 1 : a.blocks);
    first = min(a.sink, end);
    last = low < first ? first : static_cast<int>(low < end ? low : end);
    taken = min(a.take, last - first);
  }
  __device__ bool chosen() const { return taken > 0 && taken < last - first; }
  // What is there without a choice at a place of the list; -2: a candidate.
  __device__ int at(int place) const {
    if (place < first) return place;
    if (place < first + taken) return chosen() ? -2 : place;
    const int block = last + place - first - taken;
    return block < end ? block : -1;
  }
};

}  // namespace hfl
