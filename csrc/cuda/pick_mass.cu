// ops.pick_blocks with `tau`: the forced blocks of each row of scores, and the fewest best candidates before which the
// sum of scores reaches a share of the row's, ascending.
//
// Paper: XAttention (arXiv:2503.16428) section 2.2, without its sorts. The least score that is taken is found by
// halving the range of its 32 bits; of candidates with just that score the first are taken, as many as the share wants.
// Sums are float64 and in one order: the picks are those of the definition in float64. In float32 it adds up the best
// first, and where the share lies within the rounding of such a sum, a row ends one block sooner or later. NaN counts
// as -inf.
// Shapes: scores [B, Hs, N, M] float32, ids [B, Hs, N, M] int32.
// Grid and block: up to 2048 blocks a row, (B * Hs * N / 8) x 256: a warp has a row, in registers; else (B * Hs * N) x
//   256: all have.
// Shared memory, then: 4 bytes a candidate, up to 48 KiB; what does not fit is read again from the L2.
// Bound by: latency of 32 sums over the candidates; rows hide each other's.
#include "../hf_longctx.h"
#include "launch.cuh"
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

__device__ __forceinline__ float score_of(uint32_t rank) {
  return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// The end of a list of `count` candidates. above: what is held by all that come before those of a rank, in its turn;
// wanted: by all that are read.
template <typename Above>
__device__ __forceinline__ Threshold find(Above above, double wanted, int count) {
  uint32_t least = 0;
  int turn = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit, ++turn) {  // the least rank before which less is held than wanted
    const uint32_t below = least | ((1u << bit) - 1u);
    if (!(above(below, turn) < wanted)) least = below + 1u;
  }
  const double before = above(least, turn);
  const double each = static_cast<double>(score_of(least));
  if (!(each > 0.0)) return Threshold{least, before < wanted ? INT32_MAX : 0};
  const double most = (wanted - before) / each;
  int ties = most < static_cast<double>(count) ? static_cast<int>(most) + 1 : count;
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

// A row of scores.
struct Row {
  const float* scores;
  int32_t* to;
  float share;
  int blocks, first, last, end;  // candidates are from `first` on, before `last`; no block from `end` on

  __device__ Row(const hfl_pick_mass& a, int64_t row)
      : scores(a.scores + row * a.blocks), to(a.ids + row * a.blocks), share(a.tau[row / a.queries % a.heads]) {
    const int64_t n = row % a.queries, b = row / a.queries / a.heads;
    const int64_t low = a.low[b * a.low_b + n], high = a.high[b * a.high_b + n];
    blocks = a.blocks, end = high < 0 ? 0 : static_cast<int>(high < blocks ? high + 1 : blocks);
    first = min(a.sink, end), last = low < first ? first : static_cast<int>(low < end ? low : end);
  }
  // All candidates, if the share wants them; if it does, nothing else is to be done but `frame`.
  __device__ bool takes_all(int thread, int threads) const {
    if (share < 1.0f && first < last) return false;
    for (int i = first + thread; i < last; i += threads) to[i] = i;
    return true;
  }
  // The forced blocks around so many candidates, and -1 after all.
  __device__ void frame(int taken, int thread, int threads) const {
    for (int i = thread; i < first; i += threads) to[i] = i;
    const int before = first + taken, filled = before + end - last;
    for (int i = before + thread; i < blocks; i += threads) to[i] = i < filled ? last + i - before : -1;
  }
};

__global__ void __launch_bounds__(THREADS) pick_kernel(const hfl_pick_mass a) {
  extern __shared__ float room[];
  __shared__ double sums[2][WARPS];
  wait_for_previous(0);
  const Row row(a, blockIdx.x);
  const int count = row.last - row.first, thread = static_cast<int>(threadIdx.x);
  int taken = count;
  if (!row.takes_all(thread, THREADS)) {
    const int fits = min(count, HELD / 4);
    double held = 0.0, own = 0.0;  // by the forced blocks, by the candidates
    for (int i = thread; i < row.end; i += THREADS) {
      const float score = number(row.scores[i]);
      const bool forced = i < row.first || i >= row.last;
      if (!forced && i - row.first < fits) room[i - row.first] = score;
      (forced ? held : own) += static_cast<double>(score);
    }
    held = sum_of_all(held, sums, 0);
    own = sum_of_all(own, sums, 1);
    const Candidates candidates = {row.scores + row.first, room, count, fits};
    const auto above = [&](uint32_t rank, int turn) {
      double sum = 0.0;
      for (int i = thread; i < count; i += THREADS) {
        const float score = candidates(i);
        sum += rank_of(score) > rank ? static_cast<double>(score) : 0.0;
      }
      return held + sum_of_all(sum, sums, turn);
    };
    const Threshold from = find(above, static_cast<double>(row.share) * (held + own), count);
    taken = emit(candidates, from, row.first, row.to + row.first);
  }
  row.frame(taken, thread, THREADS);
}

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// The same of rows of up to 32 * EACH blocks: a warp has a row.
template <int EACH>
__global__ void __launch_bounds__(THREADS, EACH > 32 ? 1 : 2) pick_few_kernel(const hfl_pick_mass a, int rows) {
  const int index = static_cast<int>(blockIdx.x * WARPS + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x) % 32;
  wait_for_previous(lane);
  if (index >= rows) return;
  const Row row(a, index);
  const int count = row.last - row.first;
  int taken = count;
  if (!row.takes_all(lane, 32)) {
    uint32_t ranks[EACH];  // of candidates; 0: none
    double held = 0.0, own = 0.0;
    for (int i = lane; i < row.first; i += 32) held += static_cast<double>(number(row.scores[i]));
    for (int i = row.last + lane; i < row.end; i += 32) held += static_cast<double>(number(row.scores[i]));
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int i = n * 32 + lane;
      const float score = i < count ? number(row.scores[row.first + i]) : 0.0f;
      ranks[n] = i < count ? rank_of(score) : 0u;
      own += static_cast<double>(score);
    }
    held = sum_of_warp(held), own = sum_of_warp(own);
    const auto above = [&](uint32_t rank, int) {
      double sum = 0.0;
#pragma unroll
      for (int n = 0; n < EACH; ++n) {
        uint32_t mine = ranks[n];
        if (EACH > 8) asm volatile("" : "+r"(mine));  // else all are held as float64, too
        sum += mine > rank ? static_cast<double>(score_of(mine)) : 0.0;
      }
      return held + sum_of_warp(sum);
    };
    const Threshold from = find(above, static_cast<double>(row.share) * (held + own), count);
    const uint32_t before = (1u << lane) - 1u;
    int32_t* to = row.to + row.first;
    int larger_before = 0, tied_before = 0;  // in the steps before
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const uint32_t larger = __ballot_sync(ALL, ranks[n] > from.least);
      const uint32_t tied = __ballot_sync(ALL, ranks[n] == from.least && ranks[n]);
      const int ties = tied_before + __popc(tied & before);
      const bool picked = larger >> lane & 1u || ((tied >> lane & 1u) && ties < from.ties);
      if (picked) to[larger_before + __popc(larger & before) + min(ties, from.ties)] = row.first + n * 32 + lane;
      larger_before += __popc(larger), tied_before += __popc(tied);
    }
    taken = larger_before + min(tied_before, from.ties);
  }
  row.frame(taken, lane, 32);
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
  int rows = a->batch * a->heads * a->queries;
  const dim3 by_warps(static_cast<unsigned>((rows - 1) / WARPS + 1));
  void* arguments[] = {const_cast<hfl_pick_mass*>(a), &rows};  // the kernel for many blocks has one parameter
  const auto of_few = [&](void (*kernel)(hfl_pick_mass, int)) {
    return hfl::launch(reinterpret_cast<const void*>(kernel), by_warps, THREADS, 0, a->stream, arguments);
  };
  const size_t wanted = static_cast<size_t>(a->blocks) * 4;
  const cudaError_t error =
      a->blocks <= 256    ? of_few(pick_few_kernel<8>)
      : a->blocks <= 1024 ? of_few(pick_few_kernel<32>)
      : a->blocks <= 2048 ? of_few(pick_few_kernel<64>)
                          : hfl::launch(reinterpret_cast<const void*>(&pick_kernel), dim3(static_cast<unsigned>(rows)),
                                        THREADS, wanted < HELD ? wanted : HELD, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
