// Prefill attention for sm_90a: wgmma, and tiles that tensor maps copy. prefill.cu says what it computes.
//
// As many blocks of 384 threads as multiprocessors, which take one tile of 128 queries after the other. A group of four
// warps prepares the next and copies tiles of 128 keys and values ahead. Two groups have 64 queries each: they multiply
// the next keys while they weigh the ones before, and take turns, so that one weighs while the other multiplies.
#pragma once
#include "prefill_feed.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A group that multiplies.
template <int D, bool BF16>
struct PrefillGroup {
  using S = PrefillStages<D>;
  using Work = typename PrefillBoard<D>::Work;
  using Keys = Walk<S::ROWS, S::KEYS / 2>;
  const PrefillTask& p;
  PrefillBoard<D>& board;
  uint32_t base;
  // Of a query: the largest logit so far, in units of log 2, and the sum of this thread's weights.
  struct Row {
    float top, total;
  };

  int group, thread, row;  // row: of this thread's first sums; 8 further on are those of the second
  Row rows[2];
  float out[D / 2];
  uint32_t weights[S::KEYS / 4];

  __device__ PrefillGroup(const PrefillTask& p_, PrefillBoard<D>& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), thread(static_cast<int>(threadIdx.x) % 128) {
    group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    row = group * 64 + thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ void run(int all) {
    float x[64];
    if (group == 1) end_turn();  // the first turn is of group 0
    start(x);
    Work* work = &board.works[0];
    bool more = true;
    const uint32_t nought = static_cast<uint32_t>(p.group) >> 31;
    int n = 0, tile = 0, left = work->tiles;  // left: of this work, from `tile` on, whose weights are ready
    for (;; ++tile) {
      const bool last = left == 1;
      Work* next = last ? &board.works[(n + 1) % 2] : work;
      if (last) {
        barrier_wait(next->slot.full, (n + 1) / 2 % 2);
        more = next->index < all;
        if (more) barrier_wait(board.queries[(n + 1) % 2].full, (n + 1) / 2 % 2), await(board.keys, tile + 1);
      }
      if (!EARLY && !last) await(board.keys, tile + 1);
      await(board.values, tile);
      clear(tile);
      if (!more) break;
      begin_turn();
      in_flight(x), in_flight(out);
      wgmma_fence();
      multiply(x, n + last, (tile + 1) % S::KEY_STAGES);
      wgmma_commit();
      add(tile % S::STAGES);
      wgmma_commit();
      end_turn();
      wgmma_wait<1>();
      in_flight(x);
      release(board.keys[(tile + 1) % S::KEY_STAGES]);
      left = last ? next->tiles : left - 1;
      if (left == 1) release(board.queries[(n + last) % 2]);
      float share[2];
      if (last) find_shares(*work, share), begin_rows(next->keys);
      mask(x, next->keys, tile + 1);
      float down[2];
      uint32_t fresh[S::KEYS / 4];
      const bool changed = weigh(x, fresh, down);
      in_flight(fresh);
      if (EARLY && left > 1) await(board.keys, tile + 2);  // here, or the compiler weighs after the next wait
      wgmma_wait<0>();
      in_flight(out);
      release(board.values[tile % S::STAGES]);
      if (last) {
        leave(*work, share);
        work = next, ++n;
      } else if (changed) {
        scale(down);
      }
#pragma unroll
      for (int i = 0; i < S::KEYS / 4; ++i) weights[i] = fresh[i] | nought;
    }
    in_flight(out);
    wgmma_fence();
    add(tile % S::STAGES);
    wgmma_commit();
    wgmma_wait<0>();
    in_flight(out);
    float share[2];
    find_shares(*work, share);
    leave(*work, share);
    if (group == 0) begin_turn();  // nobody leaves a barrier half full
  }

 private:
  __device__ __forceinline__ void begin_turn() { if (TURNS) meet(2 + group, 256); }
  __device__ __forceinline__ void end_turn() { if (TURNS) come_by(3 - group, 256); }
  __device__ __forceinline__ void release(Slot& slot) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(slot.empty);
  }

  // Nothing has to stand for one where there is no query.
  __device__ __forceinline__ void begin_rows(const Keys& keys) {
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = {keys.position[row + 8 * h] < 0 ? 0.0f : NOTHING, 0.0f};
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

  // Weights, relative to the logit that stands for one in each row. Returns how much they are in each, of this thread.
  __device__ __forceinline__ float2 weights_of(const float (&x)[64], uint32_t (&fresh)[S::KEYS / 4]) const {
    const float factor = p.a.scale * LOG2E;  // what makes them logits in units of log 2
    const float one[2] = {rows[0].top == NOTHING ? 0.0f : rows[0].top, rows[1].top == NOTHING ? 0.0f : rows[1].top};
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < S::KEYS / 4; ++i) {
      const float low = power_of_two(x[2 * i] * factor - one[i % 2]);
      const float high = power_of_two(x[2 * i + 1] * factor - one[i % 2]);
      sums[i % 2] += low, sums[2 + i % 2] += high;
      fresh[i] = pack(low, high);
    }
    return make_float2(sums[0] + sums[2], sums[1] + sums[3]);
  }

  // Logits to weights. What stands for one is the largest logit of the first tile that a row sees something of, and
  // changes only where weights get so large that it must. Returns whether it did for some row of the warp, and in
  // `down` what earlier sums are then worth.
  __device__ __forceinline__ bool weigh(const float (&x)[64], uint32_t (&fresh)[S::KEYS / 4], float (&down)[2]) {
    constexpr float MOST = 16384.0f;
    float2 sums = weights_of(x, fresh);
    const bool fit = sums.x < MOST && sums.y < MOST && rows[0].top != NOTHING && rows[1].top != NOTHING;
    const bool change = __any_sync(0xffffffffu, !fit);
    down[0] = down[1] = 1.0f;
    if (change) {
      raise(x, down);
      sums = weights_of(x, fresh);
    }
    rows[0].total = rows[0].total * down[0] + sums.x, rows[1].total = rows[1].total * down[1] + sums.y;
    return change;
  }

  // The largest logit of each row becomes what stands for one.
  __device__ __forceinline__ void raise(const float (&x)[64], float (&down)[2]) {
    const float factor = p.a.scale * LOG2E;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = NOTHING;
#pragma unroll
      for (int n = 0; n < 16; ++n) most = fmaxf(most, fmaxf(x[4 * n + 2 * h], x[4 * n + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      most = fmaxf(rows[h].top, most * factor);
      down[h] = power_of_two(rows[h].top - (most == NOTHING ? 0.0f : most));
      rows[h].top = most;
    }
  }

  __device__ __forceinline__ void scale(const float (&down)[2]) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= down[i / 2 % 2];
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
  }

  template <int STAGES>
  __device__ __forceinline__ void await(Slot (&slots)[STAGES], int tile) {
    barrier_wait(slots[tile % STAGES].full, tile / STAGES % 2);
  }

  // The weights of the first tile.
  __device__ __forceinline__ void start(float (&x)[64]) {
    Work& work = board.works[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    barrier_wait(work.slot.full, 0);
    begin_rows(work.keys);
    barrier_wait(board.queries[0].full, 0);
    await(board.keys, 0);
    begin_turn();
    wgmma_fence();
    multiply(x, 0, 0);
    wgmma_commit();
    end_turn();
    wgmma_wait<0>();
    in_flight(x);
    release(board.keys[0]);
    if (work.tiles == 1) {
      release(board.queries[0]);
    } else {
      await(board.keys, 1);
    }
    mask(x, work.keys, 0);
    float down[2];
    weigh(x, weights, down);
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

  __device__ __forceinline__ void find_shares(const Work& work, float (&share)[2]) const {
    const int head = QueryTile(p, S::ROWS, work.index).head;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = rows[h].total;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      share[h] = share_of(p.a, head, rows[h].top, sum, work.keys.position[row + 8 * h]);
    }
  }

  // Write the results of a work, and begin anew.
  __device__ __forceinline__ void leave(Work& work, const float (&share)[2]) {
    const QueryTile queries(p, S::ROWS, work.index);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = queries.first + row + 8 * h;
      uint16_t* to = static_cast<uint16_t*>(p.a.out) + queries.batch * p.a.out_b + queries.head * p.a.out_h +
                     t * p.a.out_t + thread % 4 * 8;
#pragma unroll
      for (int n = 0; n < D / 8; n += 4) {
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *x = out + 4 * (n + i) + 2 * h;
          two[i] = share[h] == 0.0f ? 0u : pack(x[0] * share[h], x[1] * share[h]);
        }
        const uint4 eight = together(two);
        if (t < p.a.tokens) *reinterpret_cast<uint4*>(to + n * 8) = eight;
      }
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    release(work.slot);
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
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 32) {
      PrefillFeeder<D>{p, maps, board, base, thread}.run(all);
    } else {
      PrefillScouts<D>{p, board, thread - 32}.run(all);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    PrefillGroup<D, BF16>(p, board, base).run(all);
  }
#endif
}

}  // namespace hfl
