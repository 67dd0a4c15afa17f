// Scores of a step from bounds of 128 channels of 16 bits, where a choice of each KV head follows: every warp for
// itself, through a ring of bulk copies. For sm_90 and later.
//
// A warp takes tiles of 16 entries, 8 KiB that lie together; a block's tiles follow on each other. The first ones of
// every warp are asked for before the kernels before this one are done, for bounds of old keys stand; those of the last
// keys, which the kernel just before may write, are asked for once more.
#pragma once
#include <limits.h>

#include "barrier.cuh"
#include "score_order.cuh"
#include "score_tile.cuh"

namespace hfl {

struct StreamTask {
  hfl_score a;  // scores become whole numbers, as score_order.cuh says
  Heads heads;
  const int64_t* pos;  // of the step's tokens
  int64_t pos_b;
  int sub, shift, row;         // tokens of an entry; entries of a block are 2^shift; scores of a row and KV head
  int group, tiles, all;       // query heads of a KV head; tiles of a row and KV head, and of all of them
  Divisor by_tiles, by_heads;  // tiles; KV heads
  int* scored;  // [B * Hkv], tiles that are done
  Turn turn;
};

constexpr int STREAM_WARPS = 8, STREAM_STAGES = 2, STREAM_TILE = TILE * 2 * 128 * 2;
constexpr int STREAM_BYTES = STREAM_WARPS * STREAM_STAGES * STREAM_TILE;
constexpr int JUST_STORED = 8;  // last tokens of which the kernel before may write bounds

__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t& bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&bar))
               : "memory");
}

// One warp's tiles: which they are, and its ring.
struct Stream {
  const StreamTask& p;
  unsigned char* ring;
  uint64_t* bars;
  uint32_t parities = 0;  // a bit a stage
  int lane;

  __device__ void place(int tile, int& b, int& head, int& first) const {
    const int problem = p.by_tiles.divide(tile);
    b = p.by_heads.divide(problem), head = problem - b * p.by_heads.by;
    first = (tile - problem * p.tiles) * TILE;
  }
  // Begin to copy a tile, by lane 0.
  __device__ void begin(int stage, int tile) const {
    if (lane != 0) return;
    int b, head, first;
    place(tile, b, head, first);
    const int bytes = min(TILE, p.a.entries - first) * 512;
    const int64_t at = (b * p.a.s_b + head * p.a.s_h) * 2 + first * int64_t{512};
    const char* from = static_cast<const char*>(p.a.summary) + at;
    barrier_expect(bars[stage], bytes);
    copy_bulk(ring + stage * STREAM_TILE, from, bytes, bars[stage]);
  }
  __device__ void wait(int stage) {
    barrier_wait(bars[stage], static_cast<int>(parities >> stage & 1));
    parities ^= 1u << stage;
  }
};

// A KV head's queries as operands: least values meet their negative parts, largest values the others.
template <typename T>
struct StreamQueries {
  uint4 x[8];

  __device__ __forceinline__ void load(const StreamTask& p, int b, int head, int lane) {
    const int g = lane >> 2, c = lane & 3;
    const T* from = static_cast<const T*>(p.a.q) + b * p.a.q_b + (p.heads.of(head) * p.group + g) * p.a.q_h + c * 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 y = make_uint4(0, 0, 0, 0);
      if (g < p.group) y = *reinterpret_cast<const uint4*>(from + j * 32);
      x[j] = make_uint4(below_zero(y.x, T()), below_zero(y.y, T()), below_zero(y.z, T()), below_zero(y.w, T()));
      x[4 + j] = make_uint4(y.x ^ x[j].x, y.y ^ x[j].y, y.z ^ x[j].z, y.w ^ x[j].w);
    }
  }
};

__device__ __forceinline__ float first_of(uint32_t x, __half) { return unpack_f16(x).x; }
__device__ __forceinline__ float first_of(uint32_t x, __nv_bfloat16) { return unpack_bf16(x).x; }

// Products of a tile's entries lane / 4 and 8 more with two queries, in parts; and which entries are bounds of no key.
struct StreamSums {
  float sums[2][4] = {};
  bool none[2] = {};
};

template <typename T>
__device__ __forceinline__ StreamSums stream_sums(const uint4* entries, const StreamQueries<T>& queries, int lane) {
  const int g = lane >> 2, c = lane & 3;
  const bool odd = g & 1;
  StreamSums all;
  uint32_t least[2];
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // rows that would meet the same banks read the other one of two steps first
    const int one = 8 * j + (odd ? 4 : 0) + c, other = 8 * j + (odd ? 0 : 4) + c;
    const uint4 a = entries[g * 32 + one], b = entries[g * 32 + other];
    const uint4 a8 = entries[(g + 8) * 32 + one], b8 = entries[(g + 8) * 32 + other];
    const uint4 x = odd ? b : a, y = odd ? a : b, x8 = odd ? b8 : a8, y8 = odd ? a8 : b8;
    if (j == 0) least[0] = x.x, least[1] = x8.x;
    if (j == 2) all.none[0] = first_of(least[0], T()) > first_of(x.x, T());
    if (j == 2) all.none[1] = first_of(least[1], T()) > first_of(x8.x, T());
    const uint4 q = queries.x[2 * j], r = queries.x[2 * j + 1];
    multiply(all.sums[0], make_uint4(x.x, x8.x, x.y, x8.y), q.x, q.y, T());
    multiply(all.sums[1], make_uint4(x.z, x8.z, x.w, x8.w), q.z, q.w, T());
    multiply(all.sums[0], make_uint4(y.x, y8.x, y.y, y8.y), r.x, r.y, T());
    multiply(all.sums[1], make_uint4(y.z, y8.z, y.w, y8.w), r.z, r.w, T());
  }
  return all;
}

// Scores of the two entries, in lanes of which the last two bits are zero.
__device__ __forceinline__ float2 stream_scores(const StreamSums& all, int group, int lane) {
  const int c = lane & 3;
  const auto sum = [&](int i) { return all.sums[0][i] + all.sums[1][i]; };
  float best[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float first = 2 * c < group ? sum(2 * i) : -INFINITY;
    const float second = 2 * c + 1 < group ? sum(2 * i + 1) : -INFINITY;
    best[i] = most_of(first, second);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) best[i] = most_of(__shfl_xor_sync(0xffffffffu, best[i], step), best[i]);
    if (all.none[i]) best[i] = -INFINITY;
  }
  return make_float2(best[0], best[1]);
}

template <typename T>
__global__ void __launch_bounds__(STREAM_WARPS * 32, 2) score_stream_kernel(const __grid_constant__ StreamTask p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t bars[STREAM_WARPS][STREAM_STAGES];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  touch(p);
  const auto share = [&](unsigned block) { return static_cast<int>(static_cast<int64_t>(p.all) * block / gridDim.x); };
  const int first = share(blockIdx.x), end = share(blockIdx.x + 1);
  Stream stream = {p, shared + warp * STREAM_STAGES * STREAM_TILE, bars[warp], 0, lane};
  if (lane < STREAM_STAGES) barrier_init(bars[warp][lane], 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
#pragma unroll
  for (int i = 0; i < STREAM_STAGES; ++i) {
    if (first + warp + i * STREAM_WARPS < end) stream.begin(i, first + warp + i * STREAM_WARPS);
  }
  begin_turn(p.turn, first);
  StreamQueries<T> queries;
  int held = -1, done = 0, stage = 0, round = 0;
  int64_t pos = -1;
#pragma unroll 1
  for (int tile = first + warp; tile < end; tile += STREAM_WARPS) {
    int b, head, entry;
    stream.place(tile, b, head, entry);
    const int problem = b * p.by_heads.by + head;
    if (problem != held) {
      if (lane == 0 && done) hint(p.scored + held, done);
      queries.load(p, b, head, lane), held = problem, done = 0, pos = p.pos[b * p.pos_b];
    }
    ++done;
    stream.wait(stage);
    const int64_t from = static_cast<int64_t>(entry) * p.sub;
    if (round < STREAM_STAGES && from <= pos && from + TILE * p.sub + JUST_STORED > pos) {
      stream.begin(stage, tile);
      stream.wait(stage);
    }
    const uint4* entries = reinterpret_cast<const uint4*>(stream.ring + stage * STREAM_TILE);
    const StreamSums sums = stream_sums<T>(entries, queries, lane);
    __syncwarp();  // all lanes have read the tile
    const int next = tile + STREAM_STAGES * STREAM_WARPS;
    if (next < end) stream.begin(stage, next);
    float2 best = stream_scores(sums, p.group, lane);
    const int own = entry + lane / 4;
    if (own >= p.a.entries) best.x = -INFINITY;
    if (own + 8 >= p.a.entries) best.y = -INFINITY;
#pragma unroll 1
    for (int step = 1; step < p.a.subs; step *= 2) {
      best.x = most_of(__shfl_xor_sync(0xffffffffu, best.x, 4 * step), best.x);
      best.y = most_of(__shfl_xor_sync(0xffffffffu, best.y, 4 * step), best.y);
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(p.a.scores) + static_cast<int64_t>(problem) * p.row;
    if (lane % 4 == 0 && (own & (p.a.subs - 1)) == 0) {
      if (own < p.a.entries) store_as_it_comes(to + (own >> p.shift), order_of(best.x));
      if (own + 8 < p.a.entries) store_as_it_comes(to + ((own + 8) >> p.shift), order_of(best.y));
    }
    ++round, stage = stage + 1 == STREAM_STAGES ? 0 : stage + 1;
  }
  if (lane == 0 && done) hint(p.scored + held, done);
  end_turn(p.turn);
#endif
}

}  // namespace hfl
