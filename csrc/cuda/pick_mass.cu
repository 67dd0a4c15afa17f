// ops.pick_blocks with `tau`: the forced blocks of each row of scores, and the fewest best candidates before which the
// sum of scores reaches a share of the row's, ascending.
//
// Paper: XAttention (arXiv:2503.16428) section 2.2, without its sorts. The least score that is taken is found by
// halving the range of its 32 bits; of candidates with just that score the first are taken, as many as the share wants.
// Sums are float64 and in one order: the picks are those of the definition in float64. In float32 it adds up the best
// first, and where the share lies within the rounding of such a sum, a row ends one block sooner or later. NaN counts
// as -inf.
// Shapes: scores [B, Hs, N, M] float32, ids [B, Hs, N, M] int32.
// Grid: (B * Hs * N): a row each. Block: 256 threads.
// Shared memory: 4 bytes a candidate, up to 48 KiB; what does not fit is read again from the L2.
// Bound by: latency of 32 sums over the candidates; rows hide each other's.
#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {
namespace pick_mass {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, HELD = 48 * 1024 - 512;  // bytes of candidates
constexpr uint32_t ALL = 0xffffffffu;

__device__ __forceinline__ float number(float score) { return score != score ? -INFINITY : score; }

// A score as a whole number of the same order; -0 is 0.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Candidates of a row.
struct Candidates {
  const float* scores;
  const float* held;  // the first `fits` of them, in shared memory
  int count, fits;

  __device__ float operator()(int i) const { return i < fits ? held[i] : number(scores[i]); }
};

// Sum of x over the threads, in one order; `turn` counts the calls.
__device__ __forceinline__ double sum_of_all(double x, double (&sums)[2][WARPS], int turn) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  double* own = sums[turn % 2];  // the other is free before anyone comes here twice
  if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += own[i];
  return total;
}

struct Threshold {
  uint32_t least;  // rank of the last one taken
  int ties;        // how many of just that rank are taken
};

// The end of the list: `held` by the forced blocks, `wanted` by all that are read.
__device__ Threshold find(const Candidates& candidates, double held, double wanted, double (&sums)[2][WARPS]) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto above = [&](uint32_t rank, int turn) {  // what is held by all that come before those of a rank
    double sum = 0.0;
    for (int i = thread; i < candidates.count; i += THREADS) {
      const float score = candidates(i);
      sum += rank_of(score) > rank ? static_cast<double>(score) : 0.0;
    }
    return held + sum_of_all(sum, sums, turn);
  };
  uint32_t least = 0;
  int turn = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit, ++turn) {  // the least rank before which less is held than wanted
    const uint32_t below = least | ((1u << bit) - 1u);
    if (!(above(below, turn) < wanted)) least = below + 1u;
  }
  const double before = above(least, turn);
  const uint32_t bits = least & 0x80000000u ? least & 0x7fffffffu : ~least;
  const double each = static_cast<double>(__uint_as_float(bits));
  if (!(each > 0.0)) return Threshold{least, before < wanted ? INT32_MAX : 0};
  const double most = (wanted - before) / each;
  int ties = most < static_cast<double>(candidates.count) ? static_cast<int>(most) + 1 : candidates.count;
  while (ties > 1 && !(before + (ties - 1) * each < wanted)) --ties;  // the first is taken, or `least` was larger
  return Threshold{least, ties};
}

// Candidates at or above the threshold, in order, to `to`; returns how many.
__device__ int emit(const Candidates& candidates, const Threshold& from, int first, int32_t* to) {
  __shared__ int counts[2][2][WARPS];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t before = (1u << lane) - 1u;
  int above = 0, equal = 0, turn = 0;  // in the parts before
  for (int start = 0; start < candidates.count; start += THREADS, ++turn) {
    const int i = start + thread;
    const uint32_t rank = i < candidates.count ? rank_of(candidates(i)) : 0u;  // no candidate's is 0
    const bool is_tied = rank == from.least;
    const uint32_t larger = __ballot_sync(ALL, rank > from.least), tied = __ballot_sync(ALL, is_tied && rank);
    int(&own)[2][WARPS] = counts[turn % 2];  // the other is free before anyone comes here twice
    if (lane == 0) own[0][warp] = __popc(larger), own[1][warp] = __popc(tied);
    __syncthreads();
    int place = above + __popc(larger & before), ties = equal + __popc(tied & before);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) place += own[0][w], ties += own[1][w];
      above += own[0][w], equal += own[1][w];
    }
    const bool picked = larger >> lane & 1u || ((tied >> lane & 1u) && ties < from.ties);
    if (picked) to[place + min(ties, from.ties)] = first + i;
  }
  return above + min(equal, from.ties);
}

__global__ void __launch_bounds__(THREADS) pick_kernel(const hfl_pick_mass a) {
  extern __shared__ float room[];
  __shared__ double sums[2][WARPS];
  const int64_t row = blockIdx.x, n = row % a.queries, b = row / a.queries / a.heads;
  const int64_t low = a.low[b * a.low_b + n], high = a.high[b * a.high_b + n];
  const int end = high < 0 ? 0 : static_cast<int>(high < a.blocks ? high + 1 : a.blocks);  // no block from here on
  const int first = min(a.sink, end);                                            // candidates are from here on,
  const int last = low < first ? first : static_cast<int>(low < end ? low : end);  // and before this one
  const int count = last - first, thread = static_cast<int>(threadIdx.x);
  const float* scores = a.scores + row * a.blocks;
  int32_t* to = a.ids + row * a.blocks;
  const float share = a.tau[row / a.queries % a.heads];
  int taken = count;
  if (share < 1.0f && count > 0) {
    const int fits = min(count, HELD / 4);
    double held = 0.0, own = 0.0;  // by the forced blocks, by the candidates
    for (int i = thread; i < end; i += THREADS) {
      const float score = number(scores[i]);
      const bool forced = i < first || i >= last;
      if (!forced && i - first < fits) room[i - first] = score;
      (forced ? held : own) += static_cast<double>(score);
    }
    held = sum_of_all(held, sums, 0);
    own = sum_of_all(own, sums, 1);
    const Candidates candidates = {scores + first, room, count, fits};
    const Threshold from = find(candidates, held, static_cast<double>(share) * (held + own), sums);
    taken = emit(candidates, from, first, to + first);
  } else {
    for (int i = first + thread; i < last; i += THREADS) to[i] = i;
  }
  for (int i = thread; i < first; i += THREADS) to[i] = i;
  const int before = first + taken, filled = before + end - last;
  for (int i = before + thread; i < a.blocks; i += THREADS) to[i] = i < filled ? last + i - before : -1;
}

const char* check(const hfl_pick_mass& a) {
  if (a.batch < 1 || a.heads < 1 || a.queries < 1 || a.blocks < 1) return "pick_blocks: expected no empty axis";
  if (static_cast<int64_t>(a.batch) * a.heads * a.queries > INT32_MAX) return "pick_blocks: expected fewer rows";
  return a.sink < 0 ? "pick_blocks: expected sink of at least 0" : nullptr;
}

}  // namespace
}  // namespace pick_mass
}  // namespace hfl

extern "C" const char* hfl_pick_mass_cuda(const hfl_pick_mass* a) {
  using namespace hfl::pick_mass;
  const char* message = check(*a);
  if (message) return message;
  const int64_t wanted = static_cast<int64_t>(a->blocks) * 4;
  const unsigned rows = static_cast<unsigned>(a->batch) * static_cast<unsigned>(a->heads) *
                        static_cast<unsigned>(a->queries);
  pick_kernel<<<rows, THREADS, static_cast<size_t>(wanted < HELD ? wanted : HELD),
                static_cast<cudaStream_t>(a->stream)>>>(*a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
