// The choice of a step where it is needed: each block that reads chosen keys finds what it reads itself.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3, as pick.cu defines it. Scores of a row lie in shared
// memory, those of a thread side by side. That `take` of them do not lie below some score is known from the two best of
// each thread, mostly; a histogram of what does not finds the bin of the last one taken, and of the few in that bin
// each warp finds it for itself.
#pragma once
#include <limits.h>

#include "ptx.cuh"
#include "score_order.cuh"
#include "step.cuh"

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

struct Chooser {
  using R = ChooseRoom;
  R& room;
  uint4* own;          // a thread's blocks in order; once `range` has been there, 0: no candidate
  int each, at;        // how many, a multiple of 4; the first
  uint32_t fours;      // a bit for each four of them that may still be taken
  int warp, lane;

  // ranks: room for CHOOSERS * each.
  __device__ Chooser(R& room_, uint32_t* ranks, int each_)
      : room(room_), each(each_), at(static_cast<int>(threadIdx.x) * each_), warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {
    own = reinterpret_cast<uint4*>(ranks + at), fours = (1u << each / 4) - 1;
  }

  // Those of the `take` best candidates, 0 < take < candidates, which are blocks `first` to `last` - 1, that stand at
  // places `start` to `end` - 1, if the first of them stands at `before`: to `list`, in order. By all threads.
  __device__ __forceinline__ void choose(int first, int last, int take, int before, int start, int end, int* list) {
    uint32_t rank;
    int block;
    find(first, last, static_cast<uint32_t>(take), rank, block);
    const auto taken = [&](uint32_t x, int which) { return x > 0 || which <= block; };
    int count = 0;
    each_of(rank, UINT32_MAX - rank, [&](uint32_t x, int which) { count += taken(x, which) ? 1 : 0; });
    int place = before + sum_before(count, room.counts[0]);
    if (place >= end || place + count <= start) return;
    each_of(rank, UINT32_MAX - rank, [&](uint32_t x, int which) {
      if (!taken(x, which)) return;
      if (place >= start && place < end) list[place - start] = which;
      ++place;
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
  __device__ __forceinline__ void range(int first, int last, uint32_t take, uint32_t& base, uint32_t& most) {
    uint32_t least = UINT32_MAX, best = 0, second = 0;
    uint4 next = own[0];
#pragma unroll 1
    for (int i = 0; i < each / 4; ++i) {
      uint4 four = next;
      next = own[min(i + 1, each / 4 - 1)];
      const int from = at + 4 * i;
      if (from < first || from + 4 > last) {
        const auto there = [&](int block) { return block >= first && block < last; };
        four.x = there(from) ? four.x : 0u, four.y = there(from + 1) ? four.y : 0u;
        four.z = there(from + 2) ? four.z : 0u, four.w = there(from + 3) ? four.w : 0u;
        own[i] = four;
      }
      const uint32_t x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        second = max(second, min(best, x[j])), best = max(best, x[j]);
        least = min(least, x[j] - 1);  // none: 0 - 1 is the largest
      }
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
    base = (many >= take ? second : least) + 1;
  }

  // The bin, counted from the largest, in which the `left`-th is; then it is the `left`-th of `count` there.
  __device__ __forceinline__ uint32_t find_bin(uint32_t& left, uint32_t& count) const {
    const int low = R::BINS - 32 * (lane + 1);
    uint32_t sum = 0;
#pragma unroll 2
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

  // What to do with each of a thread's candidates of ranks base to base + above. No score has one of the 2^22 largest
  // ranks, so that bins of up to that width do not begin anew with 0.
  // Calls follow with the same or a higher `base`: fours that lie below are not looked at again.
  template <typename Do>
  __device__ __forceinline__ void each_of(uint32_t base, uint32_t above, const Do& what) {
    if (!fours) return;
    int i = __ffs(static_cast<int>(fours)) - 1;
    uint4 four = own[i];
#pragma unroll 1
    for (uint32_t left = fours & (fours - 1);; left &= left - 1) {
      const int after = left ? __ffs(static_cast<int>(left)) - 1 : i;
      const uint4 next = own[after];
      const uint32_t x[4] = {four.x - base, four.y - base, four.z - base, four.w - base};
      if (max(max(four.x, four.y), max(four.z, four.w)) < base) {
        fours &= ~(1u << i);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (x[j] <= above) what(x[j], at + 4 * i + j);
        }
      }
      if (!left) break;
      i = after, four = next;
    }
  }

  // The last one taken: its rank, and its block, after which none of that rank is taken.
  __device__ __forceinline__ void find(int first, int last, uint32_t left, uint32_t& rank, int& block) {
    uint32_t base, most, count;
    range(first, last, left, base, most);
    int shift = max(22 - __clz(static_cast<int>(most - base)), 0);
    uint32_t above = most - base;
#pragma unroll 1
    for (;;) {
      each_of(base, above, [&](uint32_t x, int) { atomicAdd(room.bins + (x >> shift), 1u); });
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
    each_of(base, above, [&](uint32_t x, int which) {
      const int place = atomicAdd(&room.few, 1);
      room.ranks[place] = x + base, room.blocks[place] = which;
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
    int count = 0;
    each_of(rank, 0, [&](uint32_t, int) { ++count; });
    int before = sum_before(count, room.counts[1]);
    if (before < left && left <= before + count) {
      each_of(rank, 0, [&](uint32_t, int which) {
        if (++before == left) room.tie = which;
      });
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

// Entries `start` to `end` - 1 of the list of a row and KV head, once its scores are there. By all threads.
__device__ __forceinline__ void choose_part(const hfl_pick& a, int each, const int* scored, int tiles,
                                            unsigned char* memory, int b, int problem, int start, int end, int* list) {
  ChooseRoom& room = *reinterpret_cast<ChooseRoom*>(memory);
  uint32_t* ranks = reinterpret_cast<uint32_t*>(memory + sizeof(ChooseRoom));
  const int thread = static_cast<int>(threadIdx.x);
  const ListShape shape(a, b);
  if (thread == 0) wait_until(scored + problem, tiles);
  __syncthreads();
  const float4* from = reinterpret_cast<const float4*>(a.scores + static_cast<int64_t>(problem) * CHOOSERS * each);
#pragma unroll 1
  for (int i = thread; i * 4 < shape.last; i += CHOOSERS) copy_async(ranks + 4 * i, from + i, true);
  copy_commit();
#pragma unroll 1
  for (int i = start + thread; i < end; i += CHOOSERS) {
    const int block = shape.at(i);
    if (block != -2) list[i - start] = block;
  }
  copy_wait<0>();
  if (!shape.chosen()) return;
  __syncthreads();
  Chooser chooser(room, ranks, each);
  chooser.choose(shape.first, shape.last, shape.taken, shape.first, start, end, list);
}

}  // namespace hfl
