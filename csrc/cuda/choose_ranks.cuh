// The choice among the ranks of a row in shared memory, by all threads of a block. choose.cuh brings them there.
//
// Scores of a thread lie side by side. That `take` of them do not lie below some score is known from the two best of
// those that each thread brings, mostly; a histogram of what does not finds the bin of the last one taken, and of the
// few in that bin each warp finds it for itself. Each pass looks only where the one before has found some.
#pragma once
#include <limits.h>

#include "ptx.cuh"
#include "score_order.cuh"

namespace hfl {

struct alignas(16) ChooseRoom {
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
static_assert(ChooseRoom::BINS == 4 * CHOOSERS && MOST_EACH / 4 <= 32, "four bins a thread, bits of a word");

template <typename T>
__device__ __forceinline__ T sum_up_to(T x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, x, step);
    x += lane >= step ? other : T(0);
  }
  return x;
}

// Of ranks, the two largest and the least, less 1, where 0 is none.
struct Extent {
  uint32_t best = 0, second = 0, least = UINT32_MAX;

  __device__ __forceinline__ void add(uint32_t x) {
    second = max(second, min(best, x)), best = max(best, x), least = min(least, x - 1);
  }
};

struct Chooser {
  using R = ChooseRoom;
  R& room;
  uint4* own;          // a thread's blocks in order; 0: no candidate
  int each, at;        // how many, a multiple of 4; the first
  uint32_t fours = 0;  // a bit for each four of them that may still be taken
  int warp, lane;

  // ranks: room for CHOOSERS * each.
  __device__ Chooser(R& room_, uint32_t* ranks, int each_)
      : room(room_), each(each_), at(static_cast<int>(threadIdx.x) * each_), warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
    own = reinterpret_cast<uint4*>(ranks + at);
  }

  // Those of the `take` best candidates, 0 < take < candidates, that stand at places `start` to `end` - 1, if the first
  // of them stands at `before`: to `list`, in order. By all threads.
  __device__ __forceinline__ void choose(const Extent& extent, int take, int before, int start, int end, int* list) {
    uint32_t rank;
    int block;
    find(extent, static_cast<uint32_t>(take), rank, block);
    const auto taken = [&](const uint4& four, int from) {  // of those of the last rank some blocks come too late
      const int equal = min(max(block + 1 - from, 0), 4);
      return among(four, rank + 1, UINT32_MAX - rank - 1) | (among(four, rank, 0) & ((1u << equal) - 1));
    };
    int count = 0;
    each_four(taken, [&](const uint4& four) { return max(max(four.x, four.y), max(four.z, four.w)) >= rank; },
              [&](const uint4&, uint32_t bits, int) { count += __popc(bits); });
    int place = before + sum_before(count, room.counts[0]);
    if (place >= end || place + count <= start) return;
    each_four(taken, [](const uint4&) { return true; },
              [&](const uint4&, uint32_t bits, int i) {
#pragma unroll 1
                for (; bits; bits &= bits - 1, ++place) {
                  const int block = at + 4 * i + __ffs(static_cast<int>(bits)) - 1;
                  if (place >= start && place < end) list[place - start] = block;
                }
              });
  }

 private:
  // Over the threads before this one.
  __device__ __forceinline__ int sum_before(int count, int (&counts)[R::WARPS]) {
    const int running = sum_up_to(count, lane);
    if (lane == 31) counts[warp] = running;
    __syncthreads();
    const int others = lane < warp ? counts[lane] : 0;
    return static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<uint32_t>(others))) + running - count;
  }

  // Some rank that at least `take` candidates do not fall below, and the largest.
  __device__ __forceinline__ void range(Extent mine, uint32_t take, uint32_t& base, uint32_t& most) {
    uint32_t best = mine.best, second = mine.second, least = mine.least;
    const int full = 2 * __popc(__ballot_sync(0xffffffffu, second != 0));
    best = __reduce_max_sync(0xffffffffu, best), least = __reduce_min_sync(0xffffffffu, least);
    second = __reduce_min_sync(0xffffffffu, second - 1);
    if (lane == 0) room.most[warp] = best, room.least[warp] = least, room.second[warp] = second, room.full[warp] = full;
    __syncthreads();
    most = __reduce_max_sync(0xffffffffu, room.most[lane % R::WARPS]);
    least = __reduce_min_sync(0xffffffffu, room.least[lane % R::WARPS]);
    second = __reduce_min_sync(0xffffffffu, room.second[lane % R::WARPS]);
    const uint32_t many = __reduce_add_sync(0xffffffffu, lane < R::WARPS ? room.full[lane] : 0);
    base = (many >= take ? second : least) + 1;
  }

  // The bin, counted from the largest, in which the `left`-th is; then it is the `left`-th of `count` there.
  __device__ __forceinline__ uint32_t find_bin(uint32_t& left, uint32_t& count) const {
    const int low = R::BINS - 32 * (lane + 1);
    uint32_t sum = 0;
#pragma unroll 4
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

  // A bit for each of four ranks from `base` to base + above.
  __device__ __forceinline__ static uint32_t among(const uint4& four, uint32_t base, uint32_t above) {
    return (four.x - base <= above ? 1u : 0u) | (four.y - base <= above ? 2u : 0u) |
           (four.z - base <= above ? 4u : 0u) | (four.w - base <= above ? 8u : 0u);
  }

  // Count ranks from `base` to base + above in bins of 2^shift, without branches: some are in most fours.
  __device__ __forceinline__ void count_bins(uint32_t base, uint32_t above, int shift) {
    uint4 next = own[0];
    const uint32_t bins = shared_address(room.bins);
#pragma unroll 1
    for (int i = 0; i < each / 4; ++i) {
      const uint4 four = next;
      next = own[min(i + 1, each / 4 - 1)];
      const uint32_t x[4] = {four.x - base, four.y - base, four.z - base, four.w - base};
      fours |= max(max(four.x, four.y), max(four.z, four.w)) >= base ? 1u << i : 0u;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        asm volatile("{\n.reg .pred p;\nsetp.le.u32 p, %0, %1;\n@p red.shared.add.u32 [%2], 1;\n}" ::"r"(x[j]),
                     "r"(above), "r"(bins + (x[j] >> shift) * 4)
                     : "memory");
      }
    }
  }

  // What to do with each four of which `which` says that some bits are not 0: with these, and the first one's block.
  // Calls follow with fewer of them: fours without a bit that `later` has are not looked at again.
  template <typename Which, typename Later, typename Do>
  __device__ __forceinline__ void each_four(const Which& which, const Later& later, const Do& what) {
#pragma unroll 1
    for (uint32_t left = fours; left; left &= left - 1) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      const uint4 four = own[i];
      const uint32_t bits = which(four, at + 4 * i);
      if (!later(four)) fours &= ~(1u << i);
      if (bits) what(four, bits, i);
    }
  }

  // The last one taken: its rank, and its block, after which none of that rank is taken.
  __device__ __forceinline__ void find(const Extent& extent, uint32_t left, uint32_t& rank, int& block) {
    uint32_t base, most, count;
    range(extent, left, base, most);
    int shift = max(22 - __clz(static_cast<int>(most - base)), 0);
    uint32_t above = most - base;
#pragma unroll 1
    for (;;) {
      count_bins(base, above, shift);
      __syncthreads();
      const uint32_t bin = find_bin(left, count);
      base += bin << shift, above = (1u << shift) - 1;
      if (count <= R::FEW || shift == 0) break;
      shift = max(shift - 10, 0);
      __syncthreads();
      reinterpret_cast<uint4*>(room.bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
      __syncthreads();
    }
    if (count > R::FEW) {
      rank = base, block = last_of_equal(base, static_cast<int>(left));
    } else {
      last_of_few(base, above, left, count, rank, block);
    }
  }

  __device__ __forceinline__ void last_of_few(uint32_t base, uint32_t above, uint32_t left, uint32_t count,
                                              uint32_t& rank, int& block) {
    each_four([&](const uint4& four, int) { return among(four, base, above); },
              [&](const uint4& four) { return max(max(four.x, four.y), max(four.z, four.w)) >= base; },
              [&](const uint4&, uint32_t bits, int i) {
#pragma unroll 1
                for (; bits; bits &= bits - 1) {
                  const int block = at + 4 * i + __ffs(static_cast<int>(bits)) - 1, place = atomicAdd(&room.few, 1);
                  room.ranks[place] = reinterpret_cast<const uint32_t*>(own)[block - at], room.blocks[place] = block;
                }
              });
    __syncthreads();
    const bool there = lane < static_cast<int>(count);
    const uint32_t mine = there ? room.ranks[lane] : 0;
    const int where = there ? room.blocks[lane] : INT_MAX;
    uint32_t before = 0;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(count); ++i) {
      const uint32_t other = room.ranks[i];
      before += other > mine || (other == mine && room.blocks[i] < where) ? 1u : 0u;
    }
    const int last = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, there && before == left - 1))) - 1;
    rank = __shfl_sync(0xffffffffu, mine, last), block = __shfl_sync(0xffffffffu, where, last);
  }

  // The `left`-th block of this rank.
  __device__ __forceinline__ int last_of_equal(uint32_t rank, int left) {
    const auto equal = [&](const uint4& four, int) { return among(four, rank, 0); };
    const auto all = [](const uint4&) { return true; };
    int count = 0;
    each_four(equal, all, [&](const uint4&, uint32_t bits, int) { count += __popc(bits); });
    int before = sum_before(count, room.counts[1]);
    if (before < left && left <= before + count) {
      each_four(equal, all, [&](const uint4&, uint32_t bits, int i) {
        for (; bits; bits &= bits - 1) {
          if (++before == left) room.tie = at + 4 * i + __ffs(static_cast<int>(bits)) - 1;
        }
      });
    }
    __syncthreads();
    return room.tie;
  }
};

}  // namespace hfl
