// ops.score_pages: scores of blocks of keys from their bounds, or from one vector each.
//
// Paper: Quest (arXiv:2406.10774) section 3.2: sum_i max(q_i least_i, q_i largest_i), which is one product: of the
//   negative part of the query with the least values, and of its positive part with the largest.
// Shapes: q [B, Hq, N, D], summary [B, Hkv, M', R, D], scores [B, Hs, N, M] float32; D a multiple of 8 up to 256.
// Work: a block takes up to 64 entries of a row and KV head (of all KV heads in turn where they share), each of its
//   warps 16 of them, which it multiplies with all G * N queries of the head, up to 32 at a time: entries are the 16
//   rows of mma.m16n8k16 and go from global memory into its operands; the inner axis is permuted, alike for queries and
//   entries, so that a lane loads 16 bytes at a time, up to 16 such loads before the first is used. float32 is
//   multiplied without mma.
// Grid: (M over blocks of a task, Hkv or 1, B). Block: 128 threads.
// Shared memory: up to 48 KiB, parts of queries and products. Bound by: bytes of the summary, each read once.
#include <math.h>

#include "../hf_longctx.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32, TILE = 16, ENTRIES = WARPS * TILE, WIDE = ENTRIES + 1;
constexpr int SEGMENT = 8;  // pieces of 32 channels that a warp has on their way

template <typename T, int GROUPS>
struct Room {
  static constexpr int ROWS = 8 * GROUPS;  // queries at a time
  // Channels from one row of factors to the next: rows of 16-bit numbers meet other banks than the row before.
  __host__ __device__ static int stride(int length) {
    return sizeof(T) == 4 ? length : (length + 63) / 64 * 64 + 32;
  }
  static size_t bytes(const hfl_score& a) {
    return ROWS * (stride(a.vectors * a.dim) * sizeof(T) + WIDE * sizeof(float)) +
           static_cast<size_t>(a.tokens) * ENTRIES * sizeof(float);
  }
};

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ float most_of(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, __half) {
  mma_f16(c, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, __nv_bfloat16) {
  mma_bf16(c, a, b0, b1);
}

// The numbers below zero of a word of one or two, sign bit and NaN with it.
__device__ __forceinline__ uint32_t below_zero(uint32_t x, float) { return x & (0u - (x >> 31)); }
__device__ __forceinline__ uint32_t below_zero(uint32_t x, __half) { return x & ((x >> 15 & 0x00010001u) * 0xffffu); }
__device__ __forceinline__ uint32_t below_zero(uint32_t x, __nv_bfloat16) { return below_zero(x, __half()); }

// Factors of queries `first` to `first + ROWS - 1` of a KV head; beyond the last, and beyond the channels, zero.
template <typename T, int GROUPS>
__device__ __forceinline__ void factor(const hfl_score& a, int64_t b, int kv_head, int first, T* to, int warp,
                                       int lane) {
  constexpr int PIECE = 16 / sizeof(T);
  const int group = a.q_heads / a.kv_heads, rows = group * a.tokens, length = a.vectors * a.dim;
  const int stride = Room<T, GROUPS>::stride(length), padded = sizeof(T) == 4 ? length : (length + 31) / 32 * 32;
#pragma unroll 1
  for (int i = warp; i < Room<T, GROUPS>::ROWS; i += WARPS) {
    const int row = first + i, head = kv_head * group + row / a.tokens, t = row % a.tokens;
    const T* from = static_cast<const T*>(a.q) + b * a.q_b + head * a.q_h + t * a.q_t;
    T* own = to + i * stride;
#pragma unroll 1
    for (int c = lane * PIECE; c < a.dim; c += 32 * PIECE) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < rows) x = *reinterpret_cast<const uint4*>(from + c);
      if (a.vectors == 2) {
        const uint4 low = make_uint4(below_zero(x.x, T()), below_zero(x.y, T()), below_zero(x.z, T()),
                                     below_zero(x.w, T()));
        *reinterpret_cast<uint4*>(own + a.dim + c) = make_uint4(x.x ^ low.x, x.y ^ low.y, x.z ^ low.z, x.w ^ low.w);
        x = low;
      }
      *reinterpret_cast<uint4*>(own + c) = x;
    }
    const int c = length + lane * PIECE;
    if (c < padded) *reinterpret_cast<uint4*>(own + c) = make_uint4(0, 0, 0, 0);
  }
}

// Products of a warp's 16 entries with the queries in `factors`: `products` [ROWS, WIDE]. `prepare` writes the factors
// while the first entries are on their way; all threads come here, so that it may wait for all.
template <typename T, int GROUPS, typename Prepare>
__device__ __forceinline__ void tile(const T* entries, int64_t there, int length, const T* factors, float* products,
                                     int lane, const Prepare& prepare) {
  const int g = lane >> 2, c = lane & 3;
  float sums[GROUPS][4] = {};
  const T* rows[2] = {entries + g * length, entries + (g + 8) * length};
  for (int start = 0; start < length; start += SEGMENT * 32) {
    uint4 x[SEGMENT][2];
#pragma unroll
    for (int s = 0; s < SEGMENT; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = start + 32 * s + 8 * c;
        x[s][half] = make_uint4(0, 0, 0, 0);
        if (channel < length && g + 8 * half < there) {
          x[s][half] = __ldcs(reinterpret_cast<const uint4*>(rows[half] + channel));
        }
      }
    }
    if (start == 0) prepare();
#pragma unroll
    for (int s = 0; s < SEGMENT; ++s) {
      if (start + 32 * s >= length) break;
      const uint4 &low = x[s][0], &high = x[s][1];
#pragma unroll
      for (int n = 0; n < GROUPS; ++n) {
        const T* at = factors + (8 * n + g) * Room<T, GROUPS>::stride(length) + start + 32 * s + 8 * c;
        const uint4 q = *reinterpret_cast<const uint4*>(at);
        multiply(sums[n], make_uint4(low.x, high.x, low.y, high.y), q.x, q.y, T());
        multiply(sums[n], make_uint4(low.z, high.z, low.w, high.w), q.z, q.w, T());
      }
    }
  }
#pragma unroll
  for (int n = 0; n < GROUPS; ++n) {
    float* to = products + (8 * n + 2 * c) * WIDE + g;
    to[0] = sums[n][0], to[WIDE] = sums[n][1], to[8] = sums[n][2], to[WIDE + 8] = sums[n][3];
  }
}

// The same in float32.
template <typename Prepare>
__device__ __forceinline__ void multiply_floats(const float* entries, int64_t there, int length, const float* factors,
                                                float* products, int lane, const Prepare& prepare) {
  constexpr int ROWS = Room<float, 1>::ROWS;
  prepare();
#pragma unroll 1
  for (int e = 0; e < TILE && e < there; ++e) {
    float sums[ROWS] = {};
#pragma unroll 1
    for (int c = lane; c < length; c += 32) {
      const float x = entries[e * length + c];
#pragma unroll
      for (int row = 0; row < ROWS; ++row) sums[row] += factors[row * length + c] * x;
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int step = 16; step; step /= 2) sums[row] += __shfl_xor_sync(0xffffffffu, sums[row], step);
      if (lane == 0) products[row * WIDE + e] = sums[row];
    }
  }
}

// The largest product of the sub-blocks of a block; of none with a key -inf.
__device__ __forceinline__ float best_of(const float* products, const bool* blank, int first, int subs) {
  float best = -INFINITY;
  for (int i = first; i < first + subs; ++i) best = blank[i] ? best : most_of(products[i], best);
  return best;
}

template <typename T, int GROUPS>
__global__ void __launch_bounds__(THREADS, GROUPS == 1 ? 4 : 3) score_kernel(const hfl_score a) {
  using R = Room<T, GROUPS>;
  extern __shared__ __align__(16) char room[];
  __shared__ bool blank[ENTRIES];
  wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int length = a.vectors * a.dim, group = a.q_heads / a.kv_heads, rows = group * a.tokens;
  const int blocks = (a.entries - 1) / a.subs + 1, each = ENTRIES / a.subs;  // of the row; of this thread block
  const int first = static_cast<int>(blockIdx.x) * each, count = min(each, blocks - first);
  const int64_t b = blockIdx.z, entry = static_cast<int64_t>(first) * a.subs;
  const bool all = a.share == HFL_ALL;
  const int heads = all ? 1 : a.share == HFL_Q_HEAD ? a.q_heads : a.kv_heads, shared = all ? a.q_heads : group;
  T* factors = reinterpret_cast<T*>(room);
  float* products = reinterpret_cast<float*>(factors + R::ROWS * R::stride(length));
  float* reduced = products + R::ROWS * WIDE;
  for (int kv_head = all ? 0 : blockIdx.y; kv_head < (all ? a.kv_heads : static_cast<int>(blockIdx.y) + 1); ++kv_head) {
    const T* summary = static_cast<const T*>(a.summary) + b * a.s_b + kv_head * a.s_h + entry * length;
    const int64_t there = a.entries - entry;
    for (int start = 0; start < rows; start += R::ROWS) {
      const auto prepare = [&] {
        factor<T, GROUPS>(a, b, kv_head, start, factors, warp, lane);
        if (start == 0 && thread < ENTRIES) {
          const T* mine = summary + static_cast<int64_t>(thread) * length;
          blank[thread] = thread >= there || (a.vectors == 2 && as_float(mine[0]) > as_float(mine[a.dim]));
        }
        __syncthreads();
      };
      const T* entries = summary + static_cast<int64_t>(warp) * TILE * length;
      if constexpr (sizeof(T) == 4) {
        multiply_floats(entries, there - warp * TILE, length, factors, products + warp * TILE, lane, prepare);
      } else {
        tile<T, GROUPS>(entries, there - warp * TILE, length, factors, products + warp * TILE, lane, prepare);
      }
      __syncthreads();
      if (a.share == HFL_Q_HEAD) {
        for (int i = thread; i < min(R::ROWS, rows - start) * count; i += THREADS) {
          const int row = start + i / count, j = i % count;
          const int64_t head = kv_head * group + row / a.tokens, line = (b * heads + head) * a.tokens + row % a.tokens;
          a.scores[line * blocks + first + j] = best_of(products + i / count * WIDE, blank, j * a.subs, a.subs);
        }
      } else {
        for (int i = thread; i < a.tokens * count; i += THREADS) {
          const int t = i / count, j = i % count;
          float sum = a.vectors == 2 ? -INFINITY : 0.0f;
          if (start > 0 || (all && kv_head > 0)) sum = reduced[t * ENTRIES + j];
          for (int row = (t + a.tokens - start % a.tokens) % a.tokens; row < min(R::ROWS, rows - start);
               row += a.tokens) {
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
  for (int i = thread; i < a.tokens * count; i += THREADS) {
    const int t = i / count, j = i % count;
    const float sum = reduced[t * ENTRIES + j];
    a.scores[(line + t) * blocks + first + j] = a.vectors == 2 ? sum : sum / static_cast<float>(shared);
  }
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

template <typename T, int GROUPS>
cudaError_t launch_score(const hfl_score& a) {
  const int blocks = (a.entries - 1) / a.subs + 1, each = ENTRIES / a.subs;
  const dim3 grid(static_cast<unsigned>((blocks - 1) / each + 1),
                  a.share == HFL_ALL ? 1u : static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch));
  hfl_score block = a;
  void* arguments[] = {&block};
  return launch(reinterpret_cast<const void*>(&score_kernel<T, GROUPS>), grid, THREADS, Room<T, GROUPS>::bytes(a),
                a.stream, arguments);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_score_cuda(const hfl_score* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const bool few = a->q_heads / a->kv_heads * a->tokens <= 8;
  cudaError_t error;
  if (a->dtype == HFL_F32) {
    error = hfl::launch_score<float, 1>(*a);
  } else if (a->dtype == HFL_BF16) {
    error = few ? hfl::launch_score<__nv_bfloat16, 1>(*a) : hfl::launch_score<__nv_bfloat16, 4>(*a);
  } else {
    error = few ? hfl::launch_score<__half, 1>(*a) : hfl::launch_score<__half, 4>(*a);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
