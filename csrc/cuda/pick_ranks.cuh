// Top-k: scores as numbers that can be counted, and sums over a block.
#pragma once
#include <limits.h>
#include <math.h>
#include <stdint.h>

namespace hfl {

constexpr int THREADS = 512, WARPS = THREADS / 32, EACH = 16, BINS = 2048, CHUNK = THREADS * EACH;
constexpr int DIGIT = 11, FEW = 128;
static_assert(BINS == 1 << DIGIT && BINS == 4 * THREADS && WARPS <= 32, "four bins a thread");

// A score as a whole number of the same order, never 0; that of -0 is that of 0.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.0f);  // the larger of NaN and a number is the number
  return static_cast<uint32_t>(bits ^ (bits >> 31 | INT_MIN));
}

// Sum of x over the threads before this one; total: over all. `sums`: one place for each warp, not those of the last
// call, which some may still read.
__device__ __forceinline__ uint32_t sum_before(uint32_t x, uint32_t* sums, uint32_t* total = nullptr) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t running = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, running, step);
    running += lane >= step ? other : 0u;
  }
  if (lane == 31) sums[warp] = running;
  __syncthreads();
  const uint32_t of_warp = lane < WARPS ? sums[lane] : 0u;
  if (total) *total = __reduce_add_sync(0xffffffffu, of_warp);
  return __reduce_add_sync(0xffffffffu, lane < warp ? of_warp : 0u) + running - x;
}

// Candidates of a row as ranks; 0 stands for what is none. A thread has the same EACH blocks of every CHUNK throughout.
struct Ranks {
  const float* scores;  // of the row
  uint32_t* held;       // ranks in shared memory, or nullptr: they do not fit
  int blocks;
  bool aligned;
  int first, last;  // candidates are from here on, and before this one

  __device__ void load(float (&x)[EACH], int own) const {
    if (aligned && own + EACH <= blocks) {
#pragma unroll
      for (int i = 0; i < EACH; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(scores + own + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) x[i] = own + i < blocks ? scores[own + i] : 0.0f;
    }
  }
  __device__ void rank(uint32_t (&ranks)[EACH], const float (&x)[EACH], int own) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i) ranks[i] = rank_of(x[i]);
    if (own < first || own + EACH > last) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) ranks[i] = own + i >= first && own + i < last ? ranks[i] : 0u;
    }
    if (!held) return;
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
      *reinterpret_cast<uint4*>(held + own + i) = make_uint4(ranks[i], ranks[i + 1], ranks[i + 2], ranks[i + 3]);
    }
  }
  // Once `rank` has been there, which is where there are candidates.
  __device__ void get(uint32_t (&ranks)[EACH], int own) const {
    if (own >= last) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) ranks[i] = 0;
    } else if (held) {
#pragma unroll
      for (int i = 0; i < EACH; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(held + own + i);
        ranks[i] = four.x, ranks[i + 1] = four.y, ranks[i + 2] = four.z, ranks[i + 3] = four.w;
      }
    } else {
      float x[EACH];
      load(x, own);
      rank(ranks, x, own);
    }
  }
  __device__ uint32_t get_one(int i) const { return held ? held[i] : rank_of(scores[i]); }
};

}  // namespace hfl
