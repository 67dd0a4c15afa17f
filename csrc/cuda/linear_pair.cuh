// w4a8_linear of up to 64 tokens and many rows for sm_90a: as linear_wide.cuh, but two blocks share panels of rows
// evenly. Of an odd number of panels each block has half of the columns of one. linear.cu says what it computes.
//
// Grid: a cluster of two blocks for every two multiprocessors, which has up to 8 panels. Block: as of linear_wide.cuh.
// Of four groups of warps three or four have a panel each, or one has half of the columns of the panel that is shared,
//   with which both blocks begin; each then gets the sums of half of the tokens from the other. Exact.
// Shared memory: as of linear_wide.cuh, and 8 KiB for those sums.
#pragma once
#include "linear_wide.cuh"

namespace hfl {

template <Form F, int T>
struct PairRoom : WideRoom<F, T, 4, false> {
  using Wide = WideRoom<F, T, 4, false>;
  static constexpr int SUMS_AT = Wide::STAGES * Wide::STAGE, HALF = T / 4;  // sums of a thread, of half the tokens
  static constexpr int BYTES = Wide::BYTES + HALF * 512;
  static constexpr bool EARLY = true;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Panels of a block: `own` ones, and one more of which it has the first stages of its order.
struct PairWork {
  int panel, own, shared, stages, half, first;  // shared: the panel, or -1; first: the stage with which it begins

  template <class R>
  __device__ __forceinline__ static PairWork of(const LinearTask& p, int rank) {
    const int pair = static_cast<int>(blockIdx.x) / 2, pairs = static_cast<int>(gridDim.x) / 2;
    const int begin = p.panels * pair / pairs, count = p.panels * (pair + 1) / pairs - begin, own = count / 2;
    const int stages = (p.steps + R::S - 1) / R::S, half = stages / 2;
    return {begin + rank * own, own,      count % 2 ? begin + 2 * own : -1,
            stages,             rank ? stages - half : half, rank ? half : 0};
  }
  __device__ __forceinline__ int stage(int i) const {
    const int at = first + i;
    return at < stages ? at : at - stages;
  }
};

template <class R>
struct PairGroup : WideGroup<R> {
  using Wide = WideGroup<R>;
  using Wide::p, Wide::board, Wide::base, Wide::group, Wide::warp, Wide::lane, Wide::stage, Wide::turn, Wide::before;
  using Wide::acc;
  uint64_t& met;  // the other block's sums are here

  __device__ PairGroup(const LinearTask& p_, WideBoard<R>& board_, uint32_t base_, uint64_t& met_)
      : Wide(p_, board_, base_), met(met_) {}

  // A panel, of which this group has so many stages; then what it must let go of.
  __device__ __forceinline__ void multiply_panel(const PairWork& work, int mine) {
#pragma unroll
    for (int i = 0; i < R::T / 2; ++i) acc[i] = 0;
    in_flight(acc);
    before = -1;
    int i = 0;
    if (R::READ_AHEAD && mine) this->wait(), this->read(0);
#pragma unroll 1
    for (; i < mine; ++i) this->multiply_stage(min(R::S, p.steps - work.stage(i) * R::S), i + 1 < mine);
    this->complete();
    if (mine < work.stages && mine) send(work.first != 0);
#pragma unroll 1
    for (; i < work.stages; ++i) {
      barrier_wait(board.full[stage], turn);
      before = stage;
      this->release(), this->skip();
    }
  }

  // Sums of the other block's half of the tokens.
  __device__ __forceinline__ void send(int rank) const {
    const uint32_t at = base + R::SUMS_AT + (warp * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < R::HALF; i += 4) {
      int away[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) away[j] = rank ? acc[i + j] : acc[R::HALF + i + j];
      store_at(at + i / 4 * 2048, rank ^ 1, away);
    }
    arrive_in_cluster(met, rank ^ 1);
  }

  __device__ __forceinline__ void run(int rank) {
    const PairWork work = PairWork::of<R>(p, rank);
    const bool both = group == 3 && work.shared >= 0;
    const int panel = both ? work.shared : work.panel + group;
    wait_for_last();
    multiply_panel(work, both ? work.half : group < work.own ? work.stages : 0);
    barrier_wait(board.shown, 0);
    const WideWork place{panel - group, 4, 0, 0, 0};
    if (both) {
      int left[R::HALF];
      const uint32_t at = base + R::SUMS_AT + (warp * 32 + lane) * 16;
      wait_in_cluster(met, 0);
#pragma unroll
      for (int i = 0; i < R::HALF; ++i) left[i] = rank ? acc[R::HALF + i] : acc[i];
#pragma unroll
      for (int i = 0; i < R::HALF; i += 4) add_sums(left + i, at + i / 4 * 2048);
      this->leave(left, place, group, rank * 2 * R::HALF);
    } else if (group < work.own) {
      this->leave(acc, place, group, 0);
    }
  }
};

template <class R>
struct PairFeeder {
  const LinearTask& p;
  const CUtensorMap& map;
  WideBoard<R>& board;
  uint32_t base;
  const PairWork work;

  __device__ __forceinline__ int steps_of(int at) const { return min(R::S, p.steps - at * R::S); }

  __device__ __forceinline__ void put_tokens(uint64_t& bar, int stage, int at) const {
    const int count = steps_of(at);
#pragma unroll
    for (int s = 0; s < R::S; ++s) {
      if (s < count) {
        copy_tokens(base + stage * R::STAGE + s * R::TOKENS, &map, bar, (at * R::S + s) * 128, 0);
      }
    }
  }

  // All that there is to know of the first stages is known, and said, before there are tokens.
  __device__ __forceinline__ void tokens() {
    ManyRing<R> ring;
    const int early = min(work.stages, R::STAGES);
    const bool one = elected();
#pragma unroll 1
    for (int i = 0; i < early; ++i) {
      if (one) barrier_arrive(board.full[i]), barrier_expect(board.first[i], steps_of(work.stage(i)) * p.box * 128);
    }
    wait_for_last();
#pragma unroll 1
    for (int i = 0; i < early; ++i) {
      if (one) put_tokens(board.first[i], i, work.stage(i));
    }
    ring.turn = 1;
#pragma unroll 1
    for (int i = early; i < work.stages; ++i, ring.next()) {
      const int at = work.stage(i);
      barrier_wait(board.empty[ring.stage], ring.turn ^ 1);
      if (elected()) {
        barrier_expect(board.full[ring.stage], steps_of(at) * p.box * 128);
        put_tokens(board.full[ring.stage], ring.stage, at);
      }
    }
  }

  // Of groups `which` and `which` + 2.
  __device__ __forceinline__ void codes(int which) {
    ManyRing<R> ring;
    const int of_levels = R::LEVELS ? p.groups * 2 * PANEL : 0;
#pragma unroll 1
    for (int i = 0; i < work.stages; ++i, ring.next()) {
      const int at = work.stage(i), count = steps_of(at);
      const bool also = work.shared >= 0 && which == 1 && i < work.half;
      const int own = (max(0, work.own - which) + 1) / 2 + also;
      WideFeeder<R>::wait_for_room(board, ring);
      const uint32_t to = base + ring.stage * R::STAGE + R::S * R::TOKENS + which * R::PANEL_BYTES;
      if (elected()) {
        barrier_expect(board.full[ring.stage], own * count * (R::CODES + of_levels));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool last = j == 1 && also;  // group 3
          if (!last && which + 2 * j >= work.own) continue;
          const int64_t panel = last ? work.shared : work.panel + which + 2 * j, run = panel * p.steps + at * R::S;
          copy_once(to + 2 * j * R::PANEL_BYTES, p.a.codes + run * R::CODES, count * R::CODES, board.full[ring.stage]);
          if constexpr (R::LEVELS != 0) {
            copy_once(to + 2 * j * R::PANEL_BYTES + R::S * R::CODES, p.a.groups + run * of_levels, count * of_levels,
                       board.full[ring.stage]);
          }
        }
      }
    }
  }
};

#endif

template <class R>
__global__ void __launch_bounds__(R::BOUND, 1) linear_pair_kernel(const __grid_constant__ LinearTask p,
                                                                    const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ WideBoard<R> board;
  __shared__ uint64_t met;
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;  // the same in both blocks
  let_next_begin();
  const int rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    barrier_init(met, 128);
    board.init(), fetch_map(&map);
  }
  come_by_cluster(), wait_for_cluster();
  if (warp_of_block() < R::WORKERS / 32) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R::WORKER_REGISTERS));
    PairGroup<R>(p, board, base, met).run(rank);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R::FEEDER_REGISTERS));
    const int warp = warp_of_block() - R::WORKERS / 32;
    const PairWork work = PairWork::of<R>(p, rank);
    if (warp == 3) {
      const auto row = [&](int, int n) {
        return (n >= 3 * PANEL && work.shared >= 0 ? work.shared - 3 : work.panel) * PANEL + n;
      };
      WideFeeder<R>{p, map, board, base}.show(row, true);
    } else {
      PairFeeder<R> feeder{p, map, board, base, work};
      if (warp == 0) feeder.tokens();
      if (warp == 1 || warp == 2) feeder.codes(warp - 1);
    }
  }
#endif
}

}  // namespace hfl
