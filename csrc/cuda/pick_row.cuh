// Top-k: the forced blocks of a row of scores and the best candidates, ascending, by a block. pick.cu says how.
#pragma once
#include "../hf_longctx.h"
#include "pick_ranks.cuh"

namespace hfl {

template <int THREADS>
struct Pick {
  static constexpr int WARPS = THREADS / 32, CHUNK = THREADS * EACH, OWN = BINS / THREADS;  // OWN: bins of a thread
  static constexpr int MANY = 256;  // runs of EACH candidates from which on it pays to count the largest of each first
  static_assert(OWN % 4 == 0 && WARPS <= 32 && THREADS >= FEW && CHUNK < 1 << 16, "two counts in one word");

  struct Threshold {
    uint32_t least;  // rank of the last one taken
    uint32_t ties;   // how many of just that rank are taken
  };

  struct Room {
    uint32_t bins[BINS];  // zeros
    uint32_t sums[2][WARPS], least[WARPS], most[WARPS];
    uint32_t found[3];  // a bin, how many are taken of it, how many it holds
    uint32_t few;  // 0
  };

  // Largest and least rank of all candidates, at least one; `ahead`: scores of a thread's first blocks.
  static __device__ __forceinline__ void range(const Ranks& ranks, float (&ahead)[EACH], Room& room, uint32_t& least,
                                               uint32_t& most) {
    const int thread = static_cast<int>(threadIdx.x);
    least = UINT32_MAX, most = 0;
#pragma unroll 1
    for (int own = thread * EACH; own < ranks.last; own += CHUNK) {
      if (own >= CHUNK) ranks.load(ahead, own);
      uint32_t x[EACH];
      ranks.rank(x, ahead, own);
#pragma unroll
      for (int i = 0; i < EACH; ++i) least = min(least, x[i] - 1), most = max(most, x[i]);  // none: 0 - 1 is largest
    }
    room.least[thread / 32] = __reduce_min_sync(0xffffffffu, least);
    room.most[thread / 32] = __reduce_max_sync(0xffffffffu, most);
    __syncthreads();
    least = __reduce_min_sync(0xffffffffu, room.least[thread % WARPS]) + 1;
    most = __reduce_max_sync(0xffffffffu, room.most[thread % WARPS]);
  }

  // The `left`-th largest of the room.found[2] <= FEW candidates with ranks of base to base + width - 1; bins are 0.
  static __device__ __forceinline__ Threshold find_among_few(const Ranks& ranks, uint32_t base, uint32_t width,
                                                             uint32_t left, Room& room) {
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

  // In which bin, counted from the largest down, the `left`-th is: to room.found. Bins are zeros again.
  static __device__ __forceinline__ void locate(uint32_t left, Room& room, uint32_t* sums) {
    __syncthreads();
    const uint32_t low = BINS - OWN - OWN * threadIdx.x;  // a thread's bins, from the largest down
    uint32_t counts[OWN], sum = 0;
#pragma unroll
    for (int i = 0; i < OWN; i += 4) {
      const uint4 own = *reinterpret_cast<const uint4*>(room.bins + low + i);
      *reinterpret_cast<uint4*>(room.bins + low + i) = make_uint4(0, 0, 0, 0);
      counts[i] = own.x, counts[i + 1] = own.y, counts[i + 2] = own.z, counts[i + 3] = own.w;
      sum += own.x + own.y + own.z + own.w;
    }
    uint32_t before = sum_before<WARPS>(sum, sums);
#pragma unroll
    for (int i = OWN - 1; i >= 0; --i) {
      if (before < left && left <= before + counts[i]) {
        room.found[0] = low + i, room.found[1] = left - before, room.found[2] = counts[i];
      }
      before += counts[i];
    }
    __syncthreads();
  }
  static __device__ __forceinline__ int shift_for(uint32_t range) {
    return max(21 - __clz(static_cast<int>(range)), 0);
  }

  // A rank that at least `left` candidates reach, of many: so many largest ones of EACH do. Then few are left to count.
  static __device__ __forceinline__ uint32_t reached(const Ranks& ranks, uint32_t base, uint32_t most, uint32_t left,
                                                     Room& room) {
    const int shift = shift_for(most - base);
#pragma unroll 1
    for (int own = static_cast<int>(threadIdx.x) * EACH; own < ranks.last; own += CHUNK) {
      uint32_t x[EACH], largest = 0;
      ranks.get(x, own);
#pragma unroll
      for (int i = 0; i < EACH; ++i) largest = max(largest, x[i]);
      if (largest) atomicAdd(room.bins + ((largest - base) >> shift), 1u);
    }
    locate(left, room, room.sums[1]);
    return base + (room.found[0] << shift);
  }

  // The `left`-th largest rank, 0 < left < candidates; bins are zeros.
  static __device__ __forceinline__ Threshold find(const Ranks& ranks, float (&ahead)[EACH], uint32_t left,
                                                   Room& room) {
    uint32_t base, most;
    range(ranks, ahead, room, base, most);
    const int runs = ranks.last / EACH - (ranks.first + EACH - 1) / EACH;  // of EACH candidates
    if (runs >= MANY && static_cast<uint32_t>(runs) >= 2 * left) base = reached(ranks, base, most, left, room);
    int shift = shift_for(most - base);
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
          if (x[i] >= base && bin < width) atomicAdd(room.bins + bin, 1u);
        }
      }
      locate(left, room, room.sums[pass % 2]);
      base += room.found[0] << shift, left = room.found[1];
      if (shift == 0) return Threshold{base, left};
      if (room.found[2] <= FEW) return find_among_few(ranks, base, 1u << shift, left, room);
      width = 1u << min(shift, DIGIT), shift = max(shift - DIGIT, 0);
    }
  }

  // Candidates at or above the threshold, in order, to `to`, of which there are `places`.
  static __device__ __forceinline__ void emit(const Ranks& ranks, const Threshold& from, int32_t* to, int64_t places,
                                              Room& room) {
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
      const uint32_t before = sum_before<WARPS>(counts, room.sums[pass % 2], &total);
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

  // What a row takes, once its scores are there.
  // `line`: of the row, `b` and `n` its row of the batch and query; `held`: room for ranks, or nullptr.
  static __device__ __forceinline__ void row(const hfl_pick& a, int64_t line, int b, int n, uint32_t* held,
                                             Room& room) {
    const int thread = static_cast<int>(threadIdx.x);
    const float* scores = a.scores + line * a.blocks;
    const bool aligned = reinterpret_cast<uintptr_t>(scores) % 16 == 0;
    Ranks ranks = {scores, held, a.blocks, aligned, 0, 0};
    if (held && aligned && a.blocks > CHUNK) ranks.bring(thread * EACH, CHUNK);
    float ahead[EACH];
    ranks.load(ahead, thread * EACH);  // before it is known which of them are candidates
    const int64_t low = a.low[b * a.low_b + n], high = a.high[b * a.high_b + n];
    int32_t* to = a.ids + line * a.chosen;
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

  // Make the room what `row` needs, which leaves it otherwise.
  static __device__ __forceinline__ void clear(Room& room) {
    for (int i = static_cast<int>(threadIdx.x); i < BINS / 4; i += THREADS) {
      reinterpret_cast<uint4*>(room.bins)[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) room.few = 0;
    __syncthreads();
  }
};

}  // namespace hfl
