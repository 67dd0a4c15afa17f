// Prefill attention: which queries a block of threads has, and which tiles of keys they read. prefill.cu says more.
#pragma once
#include <limits.h>

#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {

struct PrefillTask {
  hfl_prefill a;
  int group, tiles;  // query heads of a KV head; tiles of queries of a head
};

// The tile of queries of a block of threads. Blocks run in this order: the heads of a KV head at the same queries next
// to each other, then its other queries, the last first, since they have most to read; so that one KV head after the
// other goes through the L2.
struct QueryTile {
  int batch, kv_head, head, first;

  QueryTile() = default;
  __device__ QueryTile(const PrefillTask& p, int rows, int index = static_cast<int>(blockIdx.x)) {
    head = index % p.group, index /= p.group;
    first = (p.tiles - 1 - index % p.tiles) * rows, index /= p.tiles;
    kv_head = index % p.a.kv_heads, batch = index / p.a.kv_heads;
    head += kv_head * p.group;
  }
  // Of the head in q and out.
  __device__ __forceinline__ int place(const hfl_prefill& a) const { return a.places ? a.places[head] : head; }
};

// KEYS keys that lie and stand side by side.
struct KeyTile {
  int position, column;
  int limit;  // so many are there, and not after the last query
};

// Which tiles of keys a tile of queries reads: in shared memory, since it is looked at once a tile. KEYS divides the
// block of a selection.
template <int ROWS, int KEYS>
struct Walk {
  static constexpr int FOREVER = INT_MAX - 1024;  // no sum or difference of it overflows

  // Which keys of a tile, counted from one of them on, a query sees: those below `end` that are below `sink` or not
  // below `start`.
  struct Seen {
    int end, sink, start;
    __device__ __forceinline__ bool operator()(int i) const { return (i < end) & ((i < sink) | (i >= start)); }
  };

  const uint16_t *k, *v;  // of the KV head, where they are not packed
  int position[ROWS];     // of the queries, -1: none
  int low, high;       // least and largest; high -1: there is no query
  int last;            // where the last key stands that is read; columns and not positions, where those differ
  int sink, window, stored;
  int count, before, jump;  // tiles; without a list, tile i lies at i, or from `before` on at i + jump
  const int32_t *ids, *pages;
  int block, each, last_id, last_page;  // each: tiles of a block
  int filled;                           // blocks of the list that are not after the last query

  // By THREADS threads, of which this is one; `meet` waits for all of them.
  template <int THREADS, typename Meet>
  __device__ void prepare(const PrefillTask& p, const QueryTile& queries, int thread, Meet meet) {
    const hfl_prefill& a = p.a;
    if (thread == 0) low = INT_MAX, high = -1, filled = 0;
    meet();
    for (int i = thread; i < ROWS; i += THREADS) {
      const int t = queries.first + i;
      int place = -1;
      if (t < a.tokens) {
        place = a.q_pos ? static_cast<int>(a.q_pos[queries.batch * a.q_pos_b + t]) : a.stored - a.tokens + t;
      }
      position[i] = place;
      const int most = __reduce_max_sync(0xffffffffu, place);
      const int least = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
      if (thread % 32 == 0) atomicMax(&high, most), atomicMin(&low, least);
    }
    meet();
    if (a.ids) count_list<THREADS>(a, queries, thread), meet();
    if (thread == 0) {
      k = static_cast<const uint16_t*>(a.k.data) + queries.batch * a.k.b + queries.kv_head * a.k.h;
      v = static_cast<const uint16_t*>(a.v.data) + queries.batch * a.v.b + queries.kv_head * a.v.h;
      low = high < 0 ? 0 : low, last = high, stored = a.stored, before = INT_MAX, jump = 0;
      a.ids ? walk_list(a, queries) : walk_all(a, queries);
    }
    meet();
  }

  __device__ KeyTile tile(int i) const {
    int at = i < before ? i : i + jump, page = at, within = 0;
    bool there = true;
    if (ids) {
      const int entry = i / each;
      within = (i - entry * each) * KEYS;
      at = ids[entry], page = pages ? pages[entry] : at;
      there = at >= 0 && at <= last_id && page >= 0 && page <= last_page;
    }
    KeyTile tile = {0, 0, 0};
    if (there) {
      tile.position = at * block + within, tile.column = page * block + within;
      tile.limit = min(min(stored - tile.column, last - tile.position + 1), KEYS);
    }
    if (tile.limit <= 0) tile.column = 0;
    return tile;
  }

  // If every query sees all keys of a tile.
  __device__ bool all_see(const KeyTile& tile) const {
    return tile.limit == KEYS && tile.position + KEYS - 1 <= low &&
           (tile.position + KEYS <= sink || high - tile.position < window);
  }

  // What a query at `from` sees of a tile, counted from its key `first` on.
  __device__ __forceinline__ Seen seen(const KeyTile& tile, int from, int first) const {
    const int away = from - tile.position;
    return {min(tile.limit - 1, away) + 1 - first, sink - tile.position - first, max(away, 0) - (window - 1) - first};
  }

 private:
  __device__ void walk_all(const hfl_prefill& a, const QueryTile& queries) {
    window = a.window < 0 || a.window > FOREVER ? FOREVER : static_cast<int>(a.window);
    sink = static_cast<int>(a.sink < INT_MAX ? a.sink : INT_MAX);
    ids = pages = nullptr, block = KEYS, each = 1;
    int own = low;  // column of the first query
    if (a.k_pos && high >= 0) own = stored - a.tokens + queries.first, last = min(own + ROWS, stored) - 1;
    const int end = min(last + 1, stored);
    count = (end + KEYS - 1) / KEYS;
    const int sinks = (min(sink, end) + KEYS - 1) / KEYS, from = min(max(own - window + 1, 0) / KEYS, count);
    if (from > sinks) before = sinks, jump = from - sinks, count -= jump;
  }

  __device__ static int64_t offset(const hfl_prefill& a, const QueryTile& queries) {
    const int list = a.select_heads == 1 ? 0 : a.select_heads == a.kv_heads ? queries.kv_head : queries.head;
    return queries.batch * a.ids_b + list * a.ids_h + queries.first / a.q_block * a.ids_n;
  }

  template <int THREADS>
  __device__ void count_list(const hfl_prefill& a, const QueryTile& queries, int thread) {
    const int32_t* list = a.ids + offset(a, queries);
    const int last = high < 0 ? -1 : high / a.block;
    int mine = 0;
    for (int i = thread; i < a.chosen; i += THREADS) mine += list[i] >= 0 && list[i] <= last;
    mine = __reduce_add_sync(0xffffffffu, mine);
    if (thread % 32 == 0 && mine) atomicAdd(&filled, mine);
  }

  __device__ void walk_list(const hfl_prefill& a, const QueryTile& queries) {
    sink = 0, window = FOREVER, block = a.block, each = block / KEYS;
    ids = a.ids + offset(a, queries), pages = a.pages ? a.pages + offset(a, queries) : nullptr;
    last_id = high < 0 ? -1 : high / block, last_page = (stored - 1) / block, count = 0;
    if (filled) {  // of the last block, tiles after the last query are left out
      const int seen = (high - max(ids[filled - 1], 0) * block) / KEYS + 1;
      count = (filled - 1) * each + min(max(seen, 0), each);
    }
  }
};

// What a row's sum is multiplied with in the end. state: largest logit and total, in units of log 2.
__device__ __forceinline__ float share_of(const hfl_prefill& a, int head, float top, float total, int position) {
  if (position < 0 || total == 0.0f) return 0.0f;
  if (!a.sink_logits) return 1.0f / total;
  const float logit = a.sink_logits[head] * LOG2E, higher = fmaxf(top, logit), down = power_of_two(top - higher);
  return down / (total * down + power_of_two(logit - higher));
}

}  // namespace hfl
