// Prefill attention for sm_90a: which tiles are read, and their copies. prefill_wgmma.cuh says who does what.
#pragma once
#include "launch.cuh"
#include "prefill.cuh"
#include "wgmma.cuh"

namespace hfl {

struct PrefillMaps {
  CUtensorMap q, k, v;  // of 64 channels of 64 rows
};

// Shared memory: two tiles of queries, STAGES of keys and of values; 64 channels of 128 rows after the other.
template <int D>
struct PrefillStages {
  static constexpr int ROWS = 128, KEYS = 128, THREADS = 384, FEEDERS = 128, PLANNERS = 96;
  static constexpr uint32_t STAGES = 2;
  static constexpr int HALF = 64 * 128, TILE = D / 64 * 2 * HALF;  // bytes; of 64 rows
  static constexpr int KEYS_AT = 2 * TILE, VALUES_AT = KEYS_AT + STAGES * TILE;
  static constexpr int BYTES = VALUES_AT + STAGES * TILE + 1024;  // so that it can begin at a multiple of 1024
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A place that some fill and others empty, in turns.
struct Slot {
  uint64_t full, empty;
  __device__ void init(int filling, int emptying) { barrier_init(full, filling), barrier_init(empty, emptying); }
};

// Half a tile of keys; `column` where it is not there: behind the last, which reads as zeros.
struct KeyHalf : KeyTile {
  bool seen;   // by every query, as a whole
  bool stale;  // rows from `limit` on hold what is no key
};
constexpr uint32_t UNSEEN = 0x10001, STALE = 0x20002;  // in a word that has half a word for each half of a tile

// What the groups tell each other.
template <int D>
struct PrefillBoard {
  using S = PrefillStages<D>;
  static constexpr int WARPS = (S::THREADS - S::FEEDERS) / 32, FEEDING = 2;

  // A tile of queries; two, so that the next is prepared meanwhile.
  struct Work {
    Slot slot;
    int index, tiles;
    QueryTile queries;
    Walk<S::ROWS, S::KEYS / 2> keys;
  };
  Work works[2];
  Slot queries[2], keys[S::STAGES], values[S::STAGES];
  KeyHalf halves[2 * S::STAGES][2];  // twice as many: they are read until after their keys are gone
  alignas(4) uint16_t notes[2 * S::STAGES][2];  // what is out of the ordinary with each of them

  __device__ void init() {
    for (Work& work : works) work.slot.init(1, WARPS + FEEDING);
    for (Slot& slot : queries) slot.init(FEEDING, WARPS);
    for (uint32_t s = 0; s < S::STAGES; ++s) keys[s].init(FEEDING, WARPS), values[s].init(FEEDING, WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ uint32_t note(uint32_t tile) const {
    return *reinterpret_cast<const uint32_t*>(notes[tile % (2 * S::STAGES)]);
  }
};

// Three warps that look ahead: which tile of queries is next, and what it reads.
template <int D>
struct PrefillPlanner {
  using S = PrefillStages<D>;
  const PrefillTask& p;
  PrefillBoard<D>& board;
  int thread;

  __device__ void run(int all) {
    const auto meet_all = [] { meet(1, S::PLANNERS); };
    for (uint32_t n = 0;; ++n) {
      auto& work = board.works[n % 2];
      barrier_wait(work.slot.empty, n / 2 % 2 ^ 1);
      if (thread == 0) {
        const int next = n ? take(all) : static_cast<int>(blockIdx.x);
        work.index = next < all ? in_turn(next) : all;
      }
      meet_all();
      const bool more = work.index < all;
      const QueryTile queries(p, S::ROWS, work.index);
      if (more) work.keys.template prepare<S::PLANNERS>(p, queries, thread, meet_all);
      if (thread == 0) {
        work.queries = queries, work.tiles = more ? (work.keys.count + 1) / 2 : 0;
        barrier_arrive(work.slot.full);
      }
      if (!more) break;
    }
  }

 private:
  // Which tile of queries, in the order of QueryTile, is the one of that number: the last ones of all heads come before
  // the others, since they may have to read everything, and then somebody would be done long after all.
  __device__ int in_turn(int number) const {
    const int heads = p.a.batch * p.a.q_heads, of_pair = p.tiles * p.group;  // tiles of a KV head
    if (number < heads) return number / p.group * of_pair + number % p.group;
    const int left = of_pair - p.group, other = number - heads;
    return other / left * of_pair + p.group + other % left;
  }
  // The next work that nobody has; who asks last sets the counter back.
  __device__ int take(int all) {
    const int taken = atomicAdd(p.a.counter, 1);
    if (taken == all - 1) *p.a.counter = 0;
    return static_cast<int>(gridDim.x) + taken;
  }
};

// Two threads that copy: each has half of every tile.
template <int D>
struct PrefillFeeder {
  using S = PrefillStages<D>;
  using Keys = Walk<S::ROWS, S::KEYS / 2>;
  const PrefillTask& p;
  const PrefillMaps& maps;
  PrefillBoard<D>& board;
  uint32_t base;
  int thread;

  __device__ void run(int all) {
    uint32_t tile = 0, filled = 0;
    for (uint32_t n = 0;; ++n) {
      auto& work = board.works[n % 2];
      barrier_wait(work.slot.full, n / 2 % 2);
      if (work.index >= all) break;
      if (work.tiles) feed(work.queries, work.keys, filled++, tile);
      barrier_arrive(work.slot.empty);
    }
  }

 private:
  // This thread's half of a tile that begins there.
  __device__ void copy(uint32_t to, const CUtensorMap& map, uint64_t& bar, int row, int head, int batch) {
    barrier_expect(bar, S::TILE / 2);
#pragma unroll
    for (int part = 0; part < D / 64; ++part) {
      copy_box(to + (2 * part + thread) * S::HALF, &map, bar, 64 * part, row, head, batch);
    }
  }

  __device__ KeyHalf look(const Keys& keys, int i) const {
    KeyHalf half = {};
    const int index = 2 * i + thread;
    if (index < keys.count) static_cast<KeyTile&>(half) = keys.tile(index);
    if (half.limit <= 0) half.limit = 0, half.column = keys.stored;
    half.seen = keys.all_see(half);
    half.stale = half.limit < S::KEYS / 2 && half.column + half.limit < keys.stored;
    return half;
  }

  __device__ void put_keys(const QueryTile& queries, const KeyHalf& half, uint32_t tile) {
    const uint32_t stage = tile % S::STAGES;
    barrier_wait(board.keys[stage].empty, tile / S::STAGES % 2 ^ 1);
    board.halves[tile % (2 * S::STAGES)][thread] = half;
    board.notes[tile % (2 * S::STAGES)][thread] = ((half.seen ? 0 : UNSEEN) | (half.stale ? STALE : 0)) & 0xffff;
    copy(base + S::KEYS_AT + stage * S::TILE, maps.k, board.keys[stage].full, half.column, queries.kv_head,
         queries.batch);
  }

  __device__ void put_values(const QueryTile& queries, int row, uint32_t tile) {
    const uint32_t stage = tile % S::STAGES;
    barrier_wait(board.values[stage].empty, tile / S::STAGES % 2 ^ 1);
    copy(base + S::VALUES_AT + stage * S::TILE, maps.v, board.values[stage].full, row, queries.kv_head,
         queries.batch);
  }

  // All tiles of a work, counted from `tile` on. Keys are one ahead of values.
  __device__ void feed(const QueryTile& queries, const Keys& keys, uint32_t filled, uint32_t& tile) {
    KeyHalf half = look(keys, 0);
    Slot& slot = board.queries[filled % 2];
    barrier_wait(slot.empty, filled / 2 % 2 ^ 1);
    copy(base + filled % 2 * S::TILE, maps.q, slot.full, queries.first + 64 * thread, queries.place(p.a),
         queries.batch);
    put_keys(queries, half, tile);
    const uint32_t end = tile + (static_cast<uint32_t>(keys.count) + 1) / 2;
    for (int i = 1; tile < end; ++i) {
      const int row = half.column;
      if (tile + 1 < end) half = look(keys, i), put_keys(queries, half, tile + 1);
      put_values(queries, row, tile++);
    }
  }
};

#endif

}  // namespace hfl
