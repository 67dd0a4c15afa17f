// Prefill attention for sm_90a: wgmma, and tiles that tensor maps copy. prefill.cu says what it computes.
//
// Grid: as many blocks as multiprocessors, which take one tile of 128 queries after the other, the last of all heads
//   and then the others in the order of QueryTile; of 384 threads. A group of four warps prepares the next tile and copies 128 keys and values at a time
//   ahead. Two groups have 64 queries each: they multiply the next keys while they weigh the ones before, and take
//   turns, so that one weighs while the other multiplies.
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
      if (work.tiles) {
        attend(work.keys, tile, work.tiles, filled);
        tile += work.tiles, ++filled;
      }
      leave(work.keys, QueryTile(p, S::ROWS, index));
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

  __device__ __forceinline__ void multiply(float (&x)[64], int filled, int stage) {
    const uint64_t q = matrix(base + filled % 2 * S::TILE + group * S::HALF);
    const uint64_t k = matrix(base + S::KEYS_AT + stage * S::TILE);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      const int along = (s / 4 * 2 * S::HALF + s % 4 * 32) / 16;
      product<BF16>(x, q + along, k + along, s);
    }
  }
  __device__ __forceinline__ void add(int stage) {
    const uint64_t v = matrix(base + S::VALUES_AT + stage * S::TILE, 2 * S::HALF);
#pragma unroll
    for (int s = 0; s < S::KEYS / 16; ++s) gather<BF16>(out, weights + 4 * s, v + s * 16 * 128 / 16);
  }

  // Values that are not there may be anything, and no weight takes a NaN away.
  __device__ __forceinline__ void clear(int tile) {
    const KeyHalf(&halves)[2] = board.halves[tile % (2 * S::STAGES)];
    if (!halves[0].stale && !halves[1].stale) return;
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

  __device__ __forceinline__ void mask(float (&x)[64], const Keys& keys, int tile) const {
    const KeyHalf(&halves)[2] = board.halves[tile % (2 * S::STAGES)];
    if (halves[0].seen && halves[1].seen) return;
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

  __device__ __forceinline__ void await(Slot (&slots)[S::STAGES], int tile) {
    barrier_wait(slots[tile % S::STAGES].full, tile / S::STAGES % 2);
  }

  // The weights of the first tile of a work.
  __device__ __forceinline__ void begin(float (&x)[64], const Keys& keys, int tile, int filled) {
    barrier_wait(board.queries[filled % 2].full, filled / 2 % 2);
    await(board.keys, tile);
    begin_turn();
    wgmma_fence();
    multiply(x, filled, tile % S::STAGES);
    wgmma_commit();
    end_turn();
    wgmma_wait<0>();
    in_flight(x);
    release(board.keys[tile % S::STAGES]);
    mask(x, keys, tile);
    weigh(x);
    pack_weights(x);
  }

  // Add the values of a tile, and meanwhile make the weights of the next; there are some after that if `more`.
  __device__ __forceinline__ void go_on(float (&x)[64], const Keys& keys, int tile, int filled, bool more) {
    const int stage = (tile + 1) % S::STAGES, before = tile % S::STAGES;
    await(board.values, tile);
    clear(tile);
    begin_turn();
    in_flight(x), in_flight(out);
    wgmma_fence();
    multiply(x, filled, stage);
    wgmma_commit();
    add(before);
    wgmma_commit();
    end_turn();
    wgmma_wait<1>();
    in_flight(x);
    release(board.keys[stage]);
    mask(x, keys, tile + 1);
    const float2 down = weigh(x);
    in_flight(x);
    if (more) await(board.keys, tile + 2);  // here, or the machine code weighs after the next wait
    wgmma_wait<0>();
    in_flight(out);
    release(board.values[before]);
    if (__any_sync(0xffffffffu, down.x != 1.0f || down.y != 1.0f)) scale(down);
    pack_weights(x);
  }

  // All tiles of a work, counted from `tile` on.
  __device__ __forceinline__ void attend(const Keys& keys, int tile, int count, int filled) {
    float x[64];
    begin(x, keys, tile, filled);
    const int last = tile + count - 1;
    if (tile < last) await(board.keys, tile + 1);
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
  if (threadIdx.x < PrefillStages<D>::FEEDERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    PrefillFeeder<D>{p, maps, board, base, static_cast<int>(threadIdx.x)}.run(all);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    PrefillGroup<D, BF16>(p, board, base).run(all);
  }
#endif
}

}  // namespace hfl
