// Prefill attention for sm_90a: wgmma, and tiles that tensor maps copy. prefill.cu says what it computes.
//
// Grid: as many blocks as multiprocessors, of 384 threads, which take one tile of 128 queries after the other, the last
//   of all heads and then the others in the order of QueryTile. Of four warps three look up what the next tile of
//   queries reads, and one copies 128 keys and values at a time ahead. Two groups of four have 64 queries each: they
//   multiply the next keys while they weigh the ones before, and take turns, so that one weighs while the other
//   multiplies.
// Shared memory: 97 KiB (D = 64) or 193, and what the groups tell each other.
// In code for other architectures the kernel is empty, which shows as one without static shared memory.
#pragma once
#include "prefill_feed.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A group that multiplies.
template <int D, bool BF16>
struct PrefillGroup {
  using S = PrefillStages<D>;
  using Keys = Walk<S::ROWS, S::KEYS / 2>;
  static constexpr int FIRST = 16;  // columns that are weighed while the values before are still added up
  const PrefillTask& p;
  PrefillBoard<D>& board;
  uint32_t base;
  int group, thread, row;  // row: of this thread's first sums; 8 further on are those of the second
  float top[2], lowest[2], total[2], out[D / 2];
  uint32_t weights[S::KEYS / 4];
  uint32_t note, next_note;  // on the tile whose values come next, and on the one after it

  __device__ PrefillGroup(const PrefillTask& p_, PrefillBoard<D>& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), thread(static_cast<int>(threadIdx.x) % 128) {
    group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    row = group * 64 + thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ void run(int all) {
    uint32_t tile = 0, filled = 0;
    if (group == 1) end_turn();  // the first turn is of group 0
    for (uint32_t n = 0;; ++n) {
      auto& work = board.works[n % 2];
      barrier_wait(work.slot.full, n / 2 % 2);
      if (work.index >= all) break;
      top[0] = top[1] = NOTHING, total[0] = total[1] = 0.0f;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
      if (work.tiles) {
        const uint32_t end = tile + static_cast<uint32_t>(work.tiles);
        attend(work.keys, tile, end, filled++);
        tile = end;
      }
      leave(work.keys, work.queries);
      release(work.slot);
    }
    if (group == 0) begin_turn();  // nobody leaves a barrier half full
  }

 private:
  __device__ __forceinline__ void begin_turn() { meet(2 + group, 256); }
  __device__ __forceinline__ void end_turn() { come_by(3 - group, 256); }
  __device__ __forceinline__ void release(Slot& slot) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(slot.empty);
  }

  __device__ __forceinline__ void multiply(float (&x)[64], uint32_t filled, uint32_t stage) {
    const uint64_t q = matrix(base + group * S::HALF) + filled % 2 * (S::TILE / 16);
    const uint64_t k = matrix(base + S::KEYS_AT) + stage * (S::TILE / 16);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      const int along = (s / 4 * 2 * S::HALF + s % 4 * 32) / 16;
      product<BF16>(x, q + along, k + along, s);
    }
  }
  __device__ __forceinline__ void add(uint32_t stage) {
    const uint64_t v = matrix(base + S::VALUES_AT, 2 * S::HALF) + stage * (S::TILE / 16);
#pragma unroll
    for (int s = 0; s < S::KEYS / 16; ++s) gather<BF16>(out, weights + 4 * s, v + s * 16 * 128 / 16);
  }

  // Values that are not there may be anything, and no weight takes a NaN away.
  __device__ __forceinline__ void clear(uint32_t tile) {
    if (!(note & STALE)) return;
    const KeyHalf(&halves)[2] = board.halves[tile % (2 * S::STAGES)];
    const uint32_t v = base + S::VALUES_AT + tile % S::STAGES * S::TILE + thread % 8 * 16;
    for (int r = thread / 8; r < S::KEYS; r += 16) {
      if (!halves[r / 64].stale || r % 64 < halves[r / 64].limit) continue;
#pragma unroll
      for (int part = 0; part < D / 64; ++part) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + part * 2 * S::HALF + r * 128), "r"(0)
                     : "memory");
      }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(4 + group, 128);
  }

  __device__ __forceinline__ void mask(float (&x)[64], const Keys& keys, uint32_t tile) const {
    if (!(note & UNSEEN)) return;
    const KeyHalf(&halves)[2] = board.halves[tile % (2 * S::STAGES)];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int from = keys.position[row + 8 * h];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const typename Keys::Seen seen = keys.seen(halves[half], from, thread % 4 * 2);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (!seen(i / 2 * 8 + i % 2)) x[half * 32 + i / 2 * 4 + 2 * h + i % 2] = NOTHING;
        }
      }
    }
  }

  // The largest logits so far, in units of log 2; returns what the sums so far are to be multiplied with.
  __device__ __forceinline__ float2 raise(const float (&x)[64]) {
    const float factor = p.a.scale * LOG2E;
    float down[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = NOTHING;
#pragma unroll
      for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(x[4 * n + 2 * h], x[4 * n + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float higher = fmaxf(top[h], most * factor);
      lowest[h] = higher == NOTHING ? 0.0f : higher;
      down[h] = power_of_two(top[h] - lowest[h]), top[h] = higher;
    }
    return make_float2(down[0], down[1]);
  }

  // Logits to weights, of columns FROM to TO of this thread, which are added to `sums`.
  template <int FROM, int TO>
  __device__ __forceinline__ void weigh(float (&x)[64], float (&sums)[4]) const {
    const float factor = p.a.scale * LOG2E;
#pragma unroll
    for (int i = FROM; i < TO; ++i) sums[i % 4] += x[i] = power_of_two(x[i] * factor - lowest[i / 2 % 2]);
  }
  __device__ __forceinline__ void take(const float (&x)[64], const float (&sums)[4], float2 down) {
    total[0] = total[0] * down.x + (sums[0] + sums[1]), total[1] = total[1] * down.y + (sums[2] + sums[3]);
#pragma unroll
    for (int i = 0; i < S::KEYS / 4; ++i) weights[i] = pack(x[2 * i], x[2 * i + 1]);
  }

  __device__ __forceinline__ void scale(float2 down) {
#pragma unroll
    for (int i = 0; i < D / 2; i += 4) {
      out[i] *= down.x, out[i + 1] *= down.x, out[i + 2] *= down.y, out[i + 3] *= down.y;
    }
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
  }

  __device__ __forceinline__ void await(Slot (&slots)[S::STAGES], uint32_t tile) {
    barrier_wait(slots[tile % S::STAGES].full, tile / S::STAGES % 2);
  }
  // The keys of the next tile, and what is noted of them.
  __device__ __forceinline__ void await_next(uint32_t tile) {
    await(board.keys, tile);
    next_note = board.note(tile);
  }

  // The weights of the first tile of a work.
  __device__ __forceinline__ void begin(float (&x)[64], const Keys& keys, uint32_t tile, uint32_t filled) {
    barrier_wait(board.queries[filled % 2].full, filled / 2 % 2);
    await_next(tile);
    begin_turn();
    wgmma_fence();
    multiply(x, filled, tile % S::STAGES);
    wgmma_commit();
    end_turn();
    wgmma_wait<0>();
    in_flight(x);
    release(board.keys[tile % S::STAGES]);
    note = next_note;
    mask(x, keys, tile);
    const float2 down = raise(x);
    float sums[4] = {};
    weigh<0, 64>(x, sums);
    take(x, sums, down);
  }

  // Add the values of a tile, and meanwhile make the weights of the next; there are some after that if `more`.
  __device__ __forceinline__ void go_on(float (&x)[64], const Keys& keys, uint32_t tile, uint32_t filled, bool more) {
    const uint32_t stage = (tile + 1) % S::STAGES, before = tile % S::STAGES;
    begin_turn();
    in_flight(x), in_flight(out);
    wgmma_fence();
    multiply(x, filled, stage);
    wgmma_commit();
    await(board.values, tile);
    clear(tile);
    wgmma_fence();
    add(before);
    wgmma_commit();
    end_turn();
    wgmma_wait<1>();
    in_flight(x);
    release(board.keys[stage]);
    note = next_note;
    mask(x, keys, tile + 1);
    const float2 down = raise(x);
    float sums[4] = {};
    weigh<0, FIRST>(x, sums);
    in_flight(x);
    if (more) await_next(tile + 2);  // here, or the machine code weighs after the next wait
    wgmma_wait<0>();
    in_flight(out);
    release(board.values[before]);
    if (__any_sync(0xffffffffu, down.x != 1.0f || down.y != 1.0f)) scale(down);
    weigh<FIRST, 64>(x, sums);  // here, so that between the exponentials, which take longest, the first ones are packed
    take(x, sums, down);
  }

  // All tiles of a work, counted from `tile` on.
  __device__ __forceinline__ void attend(const Keys& keys, uint32_t tile, uint32_t end, uint32_t filled) {
    float x[64];
    begin(x, keys, tile, filled);
    const uint32_t last = end - 1;
    if (tile < last) await_next(tile + 1);
#pragma unroll 1
    for (; tile < last; ++tile) go_on(x, keys, tile, filled, tile + 1 < last);
    release(board.queries[filled % 2]);
    await(board.values, tile);
    clear(tile);
    in_flight(out);
    wgmma_fence();
    add(tile % S::STAGES);
    wgmma_commit();
    wgmma_wait<0>();
    in_flight(out);
    release(board.values[tile % S::STAGES]);
  }

  __device__ __forceinline__ void leave(const Keys& keys, const QueryTile& queries) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = total[h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int t = queries.first + row + 8 * h;
      const float share = share_of(p.a, queries.head, top[h], sum, keys.position[row + 8 * h]);
      uint16_t* to = static_cast<uint16_t*>(p.a.out) + queries.batch * p.a.out_b + queries.place(p.a) * p.a.out_h +
                     t * p.a.out_t + thread % 4 * 8;
#pragma unroll
      for (int n = 0; n < D / 8; n += 4) {
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = out + 4 * (n + i) + 2 * h;
          two[i] = share == 0.0f ? 0u : pack(x[0] * share, x[1] * share);
        }
        const uint4 eight = together(two, thread);
        if (t < p.a.tokens) *reinterpret_cast<uint4*>(to + n * 8) = eight;
      }
    }
  }
};

#endif

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
  wait_for_previous(static_cast<int>(threadIdx.x));
  using S = PrefillStages<D>;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < S::FEEDERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (thread < S::PLANNERS) {
      PrefillPlanner<D>{p, board, thread}.run(all);
    } else if (thread < S::PLANNERS + PrefillBoard<D>::FEEDING) {
      PrefillFeeder<D>{p, maps, board, base, thread - S::PLANNERS}.run(all);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    PrefillGroup<D, BF16>(p, board, base).run(all);
  }
#endif
}

}  // namespace hfl
