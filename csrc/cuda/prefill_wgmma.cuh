// Prefill attention for sm_90a: wgmma, and tiles that tensor maps copy. prefill.cu says what it computes.
//
// As many blocks of 384 threads as multiprocessors, which take one tile of 128 queries after the other. A group of four
// warps prepares the next and copies tiles of 128 keys and values ahead. Two groups have 64 queries each: they multiply
// the next keys while they weigh the ones before, and take turns, so that one weighs while the other multiplies.
#pragma once
#include "prefill.cuh"
#include "wgmma.cuh"

#ifndef HFL_STAGES
#define HFL_STAGES 2
#endif
#ifndef EARLY
#define EARLY 1
#endif
#ifndef SKIP
#define SKIP 0
#endif
#ifndef TURNS
#define TURNS 1
#endif
namespace hfl {

struct PrefillMaps {
  CUtensorMap q, k, v;  // of 64 channels of 128 rows
};

// Shared memory: a tile of queries, STAGES of keys and of values; 64 channels of the 128 rows after the other.
template <int D>
struct PrefillStages {
  static constexpr int ROWS = 128, KEYS = 128, THREADS = 384, FEEDERS = 128, STAGES = HFL_STAGES;
  static constexpr int PART = 128 * 128, TILE = D / 64 * PART;  // bytes
  static constexpr int KEYS_AT = TILE, VALUES_AT = KEYS_AT + STAGES * TILE;
  static constexpr int BYTES = VALUES_AT + STAGES * TILE + 1024;  // so that it can begin at a multiple of 1024
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A place that is filled and emptied in turns: by whom is up to it.
struct Slot {
  uint64_t full, empty;
  __device__ void init(int emptying) { barrier_init(full, 1), barrier_init(empty, emptying); }
};

// What the groups tell each other.
template <int D>
struct PrefillBoard {
  using S = PrefillStages<D>;
  static constexpr int WARPS = (S::THREADS - S::FEEDERS) / 32;

  // A tile of queries; two, so that the next is prepared meanwhile.
  struct Work {
    Slot slot;
    int index;
    Walk<S::ROWS, S::KEYS> keys;
  };
  Work works[2];
  Slot queries, keys[S::STAGES], values[S::STAGES];
  KeyTile tiles[S::STAGES];  // of the keys; `column` says whether every query sees all of them

  __device__ void init() {
    for (Work& work : works) work.slot.init(WARPS);
    queries.init(WARPS);
    for (int s = 0; s < S::STAGES; ++s) keys[s].init(WARPS), values[s].init(WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// The group that copies.
template <int D>
struct PrefillFeeder {
  using S = PrefillStages<D>;
  const PrefillTask& p;
  const PrefillMaps& maps;
  PrefillBoard<D>& board;
  uint32_t base;

  __device__ void run(int all) {
    int next = static_cast<int>(blockIdx.x), tile = 0, filled = 0;  // of thread 0
    for (int n = 0;; ++n) {
      auto& work = board.works[n % 2];
      barrier_wait(work.slot.empty, n / 2 % 2 ^ 1);
      if (threadIdx.x == 0) work.index = next;
      meet(1, S::FEEDERS);
      if (work.index >= all) {
        if (threadIdx.x == 0) barrier_arrive(work.slot.full);
        break;
      }
      const QueryTile queries(p, S::ROWS, work.index);
      work.keys.template prepare<S::FEEDERS>(p, queries, [] { meet(1, S::FEEDERS); });
      if (threadIdx.x == 0) {
        barrier_arrive(work.slot.full);
        next = take(all);
        if (work.keys.count) feed(queries, work.keys, filled++, tile);
      }
      __syncwarp();
    }
  }

 private:
  // The next work that nobody has; who asks last sets the counter back.
  __device__ int take(int all) {
    const int taken = atomicAdd(p.a.counter, 1);
    if (taken == all - 1) *p.a.counter = 0;
    return static_cast<int>(gridDim.x) + taken;
  }

  __device__ void copy(uint32_t to, const CUtensorMap& map, uint64_t& bar, int row, int head, int batch) {
    barrier_expect(bar, S::TILE);
#pragma unroll
    for (int part = 0; part < D / 64; ++part) copy_box(to + part * S::PART, &map, bar, 64 * part, row, head, batch);
  }

  __device__ void feed(const QueryTile& queries, const Walk<S::ROWS, S::KEYS>& keys, int filled, int& tile) {
    barrier_wait(board.queries.empty, filled % 2 ^ 1);
    copy(base, maps.q, board.queries.full, queries.first, queries.head, queries.batch);
    for (int i = 0; i < keys.count; ++i, ++tile) {
      KeyTile one = keys.tile(i);
      const int stage = tile % S::STAGES, before = tile / S::STAGES % 2 ^ 1, row = one.column;
      one.column = keys.all_see(one);
      barrier_wait(board.keys[stage].empty, before);
      board.tiles[stage] = one;
      copy(base + S::KEYS_AT + stage * S::TILE, maps.k, board.keys[stage].full, row, queries.kv_head, queries.batch);
      barrier_wait(board.values[stage].empty, before);
      copy(base + S::VALUES_AT + stage * S::TILE, maps.v, board.values[stage].full, row, queries.kv_head,
           queries.batch);
    }
  }
};

// A group that multiplies.
template <int D, bool BF16>
struct PrefillGroup {
  using S = PrefillStages<D>;
  using Keys = Walk<S::ROWS, S::KEYS>;
  const PrefillTask& p;
  PrefillBoard<D>& board;
  uint32_t base;
  int group, thread, row;  // row: of this thread's first sums; 8 further on are those of the second
  float top[2], total[2], out[D / 2];
  uint32_t weights[S::KEYS / 4];

  __device__ PrefillGroup(const PrefillTask& p_, PrefillBoard<D>& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), thread(static_cast<int>(threadIdx.x) % 128) {
    group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    row = group * 64 + thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ void run(int all) {
    int tile = 0, filled = 0;
    if (group == 1) end_turn();  // the first turn is of group 0
    for (int n = 0;; ++n) {
      auto& work = board.works[n % 2];
      barrier_wait(work.slot.full, n / 2 % 2);
      const int index = work.index;
      if (index >= all) break;
      top[0] = top[1] = NOTHING, total[0] = total[1] = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
      if (work.keys.count) {
        barrier_wait(board.queries.full, filled++ % 2);
        attend(work.keys, tile);
        tile += work.keys.count;
      }
      leave(work.keys, QueryTile(p, S::ROWS, index));
      release(work.slot);
    }
    if (group == 0) begin_turn();  // nobody leaves a barrier half full
  }

 private:
  __device__ __forceinline__ void begin_turn() { if (TURNS) meet(2 + group, 256); }
  __device__ __forceinline__ void end_turn() { if (TURNS) come_by(3 - group, 256); }
  __device__ __forceinline__ void release(Slot& slot) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(slot.empty);
  }

  __device__ __forceinline__ void multiply(float (&x)[64], int stage) {
    const uint64_t q = matrix(base + group * 64 * 128), k = matrix(base + S::KEYS_AT + stage * S::TILE);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      const int along = (s / 4 * S::PART + s % 4 * 32) / 16;
      product<BF16>(x, q + along, k + along, s);
    }
  }
  __device__ __forceinline__ void add(int stage) {
    const uint64_t v = matrix(base + S::VALUES_AT + stage * S::TILE, S::PART);
#pragma unroll
    for (int s = 0; s < S::KEYS / 16; ++s) gather<BF16>(out, weights + 4 * s, v + s * 16 * 128 / 16);
  }

  // Values that are not there may be anything, and no weight takes a NaN away.
  __device__ __forceinline__ void clear(int stage, int limit) {
    if (limit >= S::KEYS) return;
    const uint32_t v = base + S::VALUES_AT + stage * S::TILE + thread % 8 * 16;
    for (int r = max(limit, 0) + thread / 8; r < S::KEYS; r += 16) {
#pragma unroll
      for (int part = 0; part < D / 64; ++part) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + part * S::PART + r * 128), "r"(0) : "memory");
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(4 + group, 128);
  }

  __device__ __forceinline__ void mask(float (&x)[64], const Keys& keys, const KeyTile& tile) const {
    if (tile.column) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const typename Keys::Seen seen = keys.seen(tile, keys.position[row + 8 * h], thread % 4 * 2);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if (!seen(i / 2 * 8 + i % 2)) x[i / 2 * 4 + 2 * h + i % 2] = NOTHING;
      }
    }
  }

  // Logits to weights; returns what the sums so far are to be multiplied with.
  __device__ __forceinline__ float2 weigh(float (&x)[64]) {
    const float factor = p.a.scale * LOG2E;  // what makes them logits in units of log 2
    float down[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = NOTHING;
#pragma unroll
      for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(x[4 * n + 2 * h], x[4 * n + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float higher = fmaxf(top[h], most * factor), lowest = higher == NOTHING ? 0.0f : higher;
      down[h] = power_of_two(top[h] - lowest);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        sum += x[4 * n + 2 * h] = power_of_two(x[4 * n + 2 * h] * factor - lowest);
        sum += x[4 * n + 2 * h + 1] = power_of_two(x[4 * n + 2 * h + 1] * factor - lowest);
      }
      top[h] = higher, total[h] = total[h] * down[h] + sum;
    }
    return make_float2(down[0], down[1]);
  }

  __device__ __forceinline__ void scale(float2 down) {
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      out[i] *= down.x, out[i + 1] *= down.x, out[i + 2] *= down.y, out[i + 3] *= down.y;
    }
  }
  __device__ __forceinline__ void pack_weights(const float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < S::KEYS / 4; ++i) weights[i] = pack(x[2 * i], x[2 * i + 1]);
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
  }

  // All tiles of a work, which are counted from `first` on.
  __device__ __forceinline__ void attend(const Keys& keys, int first) {
    float x[64];
    int stage = first % S::STAGES, phase = first / S::STAGES % 2;
    barrier_wait(board.keys[stage].full, phase);
    KeyTile tile = board.tiles[stage];
    begin_turn();
    wgmma_fence();
    multiply(x, stage);
    wgmma_commit();
    end_turn();
    wgmma_wait<0>();
    in_flight(x);
    release(board.keys[stage]);
    mask(x, keys, tile);
    weigh(x);
    pack_weights(x);
#pragma unroll 1
    for (int i = 1; i < keys.count; ++i) {
      const int before = stage, limit = tile.limit;
      const int phase_before = phase;
      stage = (first + i) % S::STAGES, phase = (first + i) / S::STAGES % 2;
#if EARLY
      if (i == 1)
#endif
      barrier_wait(board.keys[stage].full, phase);
      tile = board.tiles[stage];
      barrier_wait(board.values[before].full, phase_before);
      clear(before, limit);
      begin_turn();
      in_flight(x), in_flight(out);
      wgmma_fence();
      multiply(x, stage);
      wgmma_commit();
      add(before);
      wgmma_commit();
      end_turn();
      wgmma_wait<1>();
      in_flight(x);
      release(board.keys[stage]);
      mask(x, keys, tile);
      const float2 down = weigh(x);
      in_flight(x);
#if EARLY
      // Comes here so that the weights are made before the wait for products.
      if (i + 1 < keys.count) barrier_wait(board.keys[(first + i + 1) % S::STAGES].full, (first + i + 1) / S::STAGES % 2);
#endif
      wgmma_wait<0>();
      in_flight(out);
      release(board.values[before]);
      if (!SKIP || __any_sync(0xffffffffu, down.x != 1.0f || down.y != 1.0f)) scale(down);
      pack_weights(x);
    }
    release(board.queries);
    barrier_wait(board.values[stage].full, phase);
    clear(stage, tile.limit);
    in_flight(out);
    wgmma_fence();
    add(stage);
    wgmma_commit();
    wgmma_wait<0>();
    in_flight(out);
    release(board.values[stage]);
  }

  // Of four threads each has two channels in four times eight; it gets all eight of its own.
  __device__ __forceinline__ uint4 together(const uint32_t (&two)[4]) const {
    const bool odd = thread & 1, far = thread & 2;
    const uint32_t low = __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 1);
    const uint32_t high = __shfl_xor_sync(0xffffffffu, odd ? two[2] : two[3], 1);
    const uint2 near_by = odd ? make_uint2(low, two[1]) : make_uint2(two[0], low);
    const uint2 farther = odd ? make_uint2(high, two[3]) : make_uint2(two[2], high);
    const uint2 mine = far ? farther : near_by, other = far ? near_by : farther;
    const uint32_t x = __shfl_xor_sync(0xffffffffu, other.x, 2), y = __shfl_xor_sync(0xffffffffu, other.y, 2);
    return far ? make_uint4(x, y, mine.x, mine.y) : make_uint4(mine.x, mine.y, x, y);
  }

  __device__ __forceinline__ void leave(const Keys& keys, const QueryTile& queries) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = total[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int t = queries.first + row + 8 * h;
      const float share = share_of(p.a, queries.head, top[h], sum, keys.position[row + 8 * h]);
      uint16_t* to = static_cast<uint16_t*>(p.a.out) + queries.batch * p.a.out_b + queries.head * p.a.out_h +
                     t * p.a.out_t + thread % 4 * 8;
#pragma unroll
      for (int n = 0; n < D / 8; n += 4) {
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *x = out + 4 * (n + i) + 2 * h;
          two[i] = share == 0.0f ? 0u : pack(x[0] * share, x[1] * share);
        }
        const uint4 eight = together(two);
        if (t < p.a.tokens) *reinterpret_cast<uint4*>(to + n * 8) = eight;
      }
    }
  }
};

#endif

// In code for other architectures the kernel is empty, which shows as one without static shared memory.
template <int D, bool BF16>
__global__ __launch_bounds__(PrefillStages<D>::THREADS, 1) void prefill_wgmma_kernel(
    const __grid_constant__ PrefillTask p, const __grid_constant__ PrefillMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ PrefillBoard<D> board;
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  const int all = p.a.batch * p.a.q_heads * p.tiles;
  if (threadIdx.x == 0) board.init();
  __syncthreads();
  if (threadIdx.x < PrefillStages<D>::FEEDERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    PrefillFeeder<D>{p, maps, board, base}.run(all);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    PrefillGroup<D, BF16>(p, board, base).run(all);
  }
#endif
}

}  // namespace hfl
