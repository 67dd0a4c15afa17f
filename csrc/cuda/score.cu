// ops.score_pages: scores of blocks of keys from their bounds, or from one vector each.
//
// Paper: Quest (arXiv:2406.10774) section 3.2: sum_i max(q_i least_i, q_i largest_i), which is one product: of the
//   negative part of the query with the least values, and of its positive part with the largest.
// Shapes: q [B, Hq, N, D], summary [B, Hkv, M', R, D], scores [B, Hs, N, M] float32; D a multiple of 8 up to 256.
// Work: a block takes up to 64 entries of a row and KV head (of all KV heads in turn where they share), each of its
//   warps 16 of them, which it copies to shared memory, all at once, and multiplies with all G * N queries of the head,
//   up to 16 at a time: entries are the 16 rows of mma.m16n8k16; the inner axis is permuted, alike for queries and
//   entries, so that a lane reads 16 bytes at a time. float32 is multiplied without mma, and not copied.
// Grid: (M over blocks of a task, Hkv or 1, B). Block: 128 threads.
// Shared memory: the entries, up to 64 KiB, and up to 25 KiB, parts of queries and products. Bound by: bytes of the
//   summary, each read once; blocks of a multiprocessor keep about 160 KiB on their way.
#include <math.h>

#include <algorithm>
#include <atomic>

#include "score_stream.cuh"

namespace hfl {
namespace {

// The largest product of the sub-blocks of a block; of none with a key -inf.
__device__ __forceinline__ float best_of(const float* products, const bool* blank, int first, int subs) {
  float best = -INFINITY;
#pragma unroll 1
  for (int i = first; i < first + subs; ++i) best = blank[i] ? best : most_of(products[i], best);
  return best;
}

template <typename T, int GROUPS>
__global__ void __launch_bounds__(THREADS, GROUPS == 1 ? 5 : 4) score_kernel(const __grid_constant__ ScoreTask p) {
  using R = ScoreRoom<T, GROUPS>;
  extern __shared__ __align__(16) char room[];
  __shared__ bool blank[ENTRIES];
  const hfl_score& a = p.a;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int length = a.vectors * a.dim, group = p.group, rows = group * a.tokens, blocks = p.blocks, each = p.each.by;
  const int first = static_cast<int>(blockIdx.x) * each, count = min(each, blocks - first);
  const int64_t b = blockIdx.z, entry = static_cast<int64_t>(first) * a.subs;
  const bool all = a.share == HFL_ALL;
  const int heads = all ? 1 : a.share == HFL_Q_HEAD ? a.q_heads : a.kv_heads, shared = all ? a.q_heads : group;
  T* factors = reinterpret_cast<T*>(room + R::entry_bytes(length));
  float* products = reinterpret_cast<float*>(factors + R::ROWS * R::stride(length));
  float* reduced = products + R::ROWS * WIDE;
  begin_turn(p.turn.turn, first | count | length | rows);
  for (int kv_head = all ? 0 : blockIdx.y; kv_head < (all ? a.kv_heads : static_cast<int>(blockIdx.y) + 1); ++kv_head) {
    const T* summary = static_cast<const T*>(a.summary) + b * a.s_b + kv_head * a.s_h + entry * length;
    const int there = static_cast<int>(min(a.entries - entry, int64_t{ENTRIES}));
    const T* mine = summary + static_cast<int64_t>(warp) * TILE * length;
    for (int start = 0; start < rows; start += R::ROWS) {
      Factors<T, GROUPS> queries;
      if constexpr (R::COPIED) {
        uint4* entries = reinterpret_cast<uint4*>(room) + warp * TILE * length / 8;
        if (start == 0) copy_entries(entries, mine, there - warp * TILE, p.chunks, lane);
        queries.load(p, b, kv_head, start, warp, lane);
        queries.store(a, factors, warp, lane);
        copy_wait<0>();
        __syncthreads();
        tile<T, GROUPS>(entries, length / 8, factors, products + warp * TILE, lane);
      } else {
        queries.load(p, b, kv_head, start, warp, lane);
        queries.store(a, factors, warp, lane);
        __syncthreads();
        multiply_floats(mine, there - warp * TILE, length, factors, products + warp * TILE, lane);
      }
      if (start == 0 && thread < ENTRIES) {
        const void* lie = R::COPIED ? static_cast<const void*>(room) : summary;
        blank[thread] = thread >= there || (a.vectors == 2 && no_key<T>(lie, thread, a.dim));
      }
      __syncthreads();
      if (a.share == HFL_Q_HEAD) {
#pragma unroll 1
        for (int i = thread; i < min(R::ROWS, rows - start) * each; i += THREADS) {
          const int own = p.each.divide(i), j = i - own * each;
          if (j >= count) continue;
          const int64_t line = (b * heads + kv_head * group) * a.tokens + start + own;
          a.scores[line * blocks + first + j] = best_of(products + own * WIDE, blank, j * a.subs, a.subs);
        }
      } else {
        const int past = start - p.tokens.divide(start) * a.tokens;  // queries of a head before the first of these
#pragma unroll 1
        for (int i = thread; i < a.tokens * each; i += THREADS) {
          const int t = p.each.divide(i), j = i - t * each;
          if (j >= count) continue;
          float sum = a.vectors == 2 ? -INFINITY : 0.0f;
          if (start > 0 || (all && kv_head > 0)) sum = reduced[t * ENTRIES + j];
#pragma unroll 4
          for (int row = t - past + (t < past ? a.tokens : 0); row < min(R::ROWS, rows - start); row += a.tokens) {
            const float best = best_of(products + row * WIDE, blank, j * a.subs, a.subs);
            sum = a.vectors == 2 ? most_of(best, sum) : sum + best;
          }
          reduced[t * ENTRIES + j] = sum;
        }
      }
      __syncthreads();  // factors, products and blanks are free
    }
  }
  if (a.share == HFL_Q_HEAD) return;
  const int64_t line = (b * heads + (all ? 0 : blockIdx.y)) * a.tokens;
#pragma unroll 1
  for (int i = thread; i < a.tokens * each; i += THREADS) {
    const int t = p.each.divide(i), j = i - t * each;
    if (j >= count) continue;
    const float sum = reduced[t * ENTRIES + j];
    a.scores[(line + t) * blocks + first + j] = a.vectors == 2 ? sum : sum / static_cast<float>(shared);
  }
  if (p.turn.scored) {
    __syncthreads();
    if (thread == 0) add_in_order(p.turn.scored + line, 1);
  }
  end_turn(p.turn.turn);
}

const char* check(const hfl_score& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "score_pages: expected float32, float16 or bfloat16";
  if (a.batch < 1 || a.kv_heads < 1 || a.tokens < 1 || a.entries < 1) return "score_pages: expected no empty axis";
  if (a.batch > 65535 || a.kv_heads > 65535) return "score_pages: expected at most 65535 rows, and KV heads";
  if (a.tokens > 8) return "score_pages: expected at most 8 queries a row";
  if (a.q_heads < 1 || a.q_heads % a.kv_heads) return "score_pages: expected q_heads as a multiple of kv_heads";
  if (a.dim < 8 || a.dim % 8 || a.dim > 256) return "score_pages: expected a multiple of 8 channels, at most 256";
  if (a.vectors != 1 && a.vectors != 2) return "score_pages: expected 1 or 2 vectors an entry";
  if (a.subs < 1 || a.subs > hfl::ENTRIES) return "score_pages: expected at most 64 sub-blocks of a block";
  if (a.share < HFL_KV_HEAD || a.share > HFL_ALL) return "score_pages: expected share as one of hfl_share";
  const int64_t bytes = a.dtype == HFL_F32 ? 4 : 2;
  const auto apart = [&](int64_t stride) { return stride * bytes % 16 != 0; };
  if (reinterpret_cast<uintptr_t>(a.summary) % 16 || apart(a.s_b) || apart(a.s_h)) {
    return "score_pages: expected entries that begin at multiples of 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(a.q) % 16 || apart(a.q_b) || apart(a.q_h) || apart(a.q_t)) {
    return "score_pages: expected queries that begin at multiples of 16 bytes";
  }
  return nullptr;
}

// Allow the kernel what shared memory it may need on the current device.
template <typename T, int GROUPS>
cudaError_t allow(const void* kernel) {
  static std::atomic<bool> done[MOST_DEVICES];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < MOST_DEVICES && done[device].load(std::memory_order_acquire))) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ScoreRoom<T, GROUPS>::MOST_BYTES);
  if (error == cudaSuccess && device < MOST_DEVICES) done[device].store(true, std::memory_order_release);
  return error;
}

template <typename T, int GROUPS>
cudaError_t launch_score(const hfl_score& a, const ScoreTurn& turn) {
  const int blocks = (a.entries - 1) / a.subs + 1, each = ENTRIES / a.subs;
  ScoreTask task = {a, a.q_heads / a.kv_heads, blocks, Divisor(a.tokens), Divisor(each),
                    Divisor(std::max(a.vectors * a.dim / 8, 1)), turn};
  const dim3 grid(static_cast<unsigned>(score_blocks(a)),
                  a.share == HFL_ALL ? 1u : static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch));
  const void* kernel = reinterpret_cast<const void*>(&score_kernel<T, GROUPS>);
  const cudaError_t error = allow<T, GROUPS>(kernel);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&task};
  return launch(kernel, grid, THREADS, static_cast<size_t>(ScoreRoom<T, GROUPS>::bytes(a.vectors * a.dim, a.tokens)),
                a.stream, arguments);
}

}  // namespace

const char* wrong_score(const hfl_score& a) { return check(a); }

bool score_streams(const hfl_score& a) {
  const bool halves = a.subs == 1 || a.subs == 2 || a.subs == 4 || a.subs == 8;
  if (!halves || a.dtype == HFL_F32 || a.vectors != 2 || a.dim != 128 || a.tokens != 1 || a.share != HFL_KV_HEAD ||
      a.q_heads / a.kv_heads > 8 || each_of((a.entries - 1) / a.subs + 1) > MOST_EACH ||
      !waits(reinterpret_cast<const void*>(&score_stream_kernel<__half>))) {
    return false;
  }
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         most > STREAM_BYTES + 1024;
}

int score_tiles(const hfl_score& a) { return (a.entries - 1) / TILE + 1; }

int score_rounds(const hfl_score& a, int processors) {
  const int64_t tiles = static_cast<int64_t>(score_tiles(a)) * a.kv_heads * a.batch;
  return static_cast<int>((tiles - 1) / (static_cast<int64_t>(processors) * STREAM_WARPS) + 1);
}

const char* score_stream(const hfl_score& a, const StreamTurn& turn) {
  const char* message = check(a);
  if (message) return message;
  const int each = each_of((a.entries - 1) / a.subs + 1);
  StreamTask p = {};
  p.a = a, p.heads = turn.heads, p.pos = turn.pos, p.pos_b = turn.pos_b, p.sub = turn.sub, p.row = CHOOSERS * each;
  while (a.subs >> (p.shift + 1)) ++p.shift;
  p.group = a.q_heads / a.kv_heads, p.tiles = score_tiles(a), p.all = p.tiles * a.kv_heads * a.batch;
  p.by_tiles = Divisor(p.tiles), p.by_heads = Divisor(a.kv_heads);
  p.scored = turn.scored, p.turn = turn.turn;
  const void* kernel = a.dtype == HFL_BF16 ? reinterpret_cast<const void*>(&score_stream_kernel<__nv_bfloat16>)
                                           : reinterpret_cast<const void*>(&score_stream_kernel<__half>);
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, STREAM_BYTES);
  }
  if (error == cudaSuccess) error = keep_shared(kernel);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* arguments[] = {&p};
  error = launch(kernel, dim3(static_cast<unsigned>(std::min(processors, p.all))), STREAM_WARPS * 32, STREAM_BYTES,
                 a.stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int score_blocks(const hfl_score& a) {
  const int blocks = (a.entries - 1) / a.subs + 1, each = ENTRIES / a.subs;
  return (blocks - 1) / each + 1;
}

const char* score_in_turn(const hfl_score& a, const ScoreTurn& turn) {
  const char* message = check(a);
  if (message) return message;
  if (turn.scored && (a.tokens != 1 || a.share == HFL_Q_HEAD)) {
    return "score_pages: expected, in a step, one token and a selection for each KV head or for all";
  }
  const bool few = a.q_heads / a.kv_heads * a.tokens <= 8;
  cudaError_t error;
  if (a.dtype == HFL_F32) {
    error = launch_score<float, 1>(a, turn);
  } else if (a.dtype == HFL_BF16) {
    error = few ? launch_score<__nv_bfloat16, 1>(a, turn) : launch_score<__nv_bfloat16, 2>(a, turn);
  } else {
    error = few ? launch_score<__half, 1>(a, turn) : launch_score<__half, 2>(a, turn);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl

extern "C" const char* hfl_score_cuda(const hfl_score* a) { return hfl::score_in_turn(*a, hfl::ScoreTurn()); }
