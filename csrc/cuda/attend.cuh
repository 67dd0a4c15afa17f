// Decode attention: what a block has to do, and its shared memory. attend.cu says how the work is cut.
#pragma once
#include <limits.h>
#include <math.h>

#include "attend_tile.cuh"
#include "divide.cuh"
#include "step.cuh"

namespace hfl {

constexpr int MOST_SPLITS = 128;
constexpr int ROWS = 8;          // queries of a unit, at most
constexpr int FEW_SPLITS = 32;  // whose results the last block reads all at once

// Slabs of each warp, if a unit's, of which each warp should get `wanted`, are shared out. Results of many blocks take
// longer to merge than a second slab for each warp does.
__host__ __device__ constexpr int slabs_of_warp(int slabs, int wanted, int warps) {
  const int least = slabs > FEW_SPLITS * warps ? 2 : 1;
  return wanted < least ? least : wanted;
}

struct AttendTask {
  hfl_attend a;
  int group, units;   // query heads of a KV head; units of a KV head
  int splits;         // parts of a unit's columns
  int variants;       // ways in which a query is given: as it is, turned one lap on, turned to the sinks
  bool apart;         // each query head has a list of its own
  // KV heads; queries of a head that share a unit; units of a query's list; tokens of a block; warps of a unit
  Divisor kv_heads, tokens, tiles, block, share;
  AttendTurn turn;
  int before;  // queries see keys at so many tokens before their positions, and further back
};

// Of two groups of heads, whose KV heads are a unit each: blocks of the first one, and of a KV head of either.
struct AttendTasks {
  AttendTask of[2];
  int first;
  Divisor blocks[2];
};

// What one block does, beside its share of the columns: up to 8 queries of a KV head, each a column of operands.
struct Unit {
  int batch, kv_head, first, last, token;

  __device__ Unit(const AttendTask& p, int index, int problem) {
    batch = p.kv_heads.divide(problem), kv_head = problem - batch * p.kv_heads.by;
    token = p.tiles.divide(index);
    first = (index - token * p.tiles.by) * (p.apart ? 1 : ROWS);
    last = min(p.apart ? first + 1 : p.group * p.tokens.by, first + ROWS);
  }
  __device__ int rows() const { return last - first; }
  __device__ int query(const AttendTask& p, int row) const {
    return token + first + row - p.tokens.divide(first + row) * p.tokens.by;
  }
  __device__ int head(const AttendTask& p, int row) const {
    return p.turn.heads.of(kv_head) * p.group + p.tokens.divide(first + row);
  }
  __device__ int position(const AttendTask& p, int row) const {
    if (row >= rows()) return -1;
    const int t = query(p, row);
    const int at = p.a.q_pos ? static_cast<int>(p.a.q_pos[batch * p.a.q_pos_b + t]) : p.a.stored - p.a.tokens + t;
    return at - p.before;
  }
};

// The keys that a unit reads, as slabs of N: where they lie, and who sees them.
template <int N>
struct Keys {
  int low = 0, high = -1;   // least and largest position of a query
  int sink, window;         // INT_MAX: none
  int count, before, jump;  // slabs; of those the first `before` lie at their number, the others `jump` further on
  int end = 0;              // unless listed: no key from here on
  const int32_t* ids;
  int row;                // of the selection
  const int64_t* places;  // positions of columns

  struct Found {
    int at, page;
  };

  __device__ Keys(const AttendTask& p, const Unit& unit) {
    const hfl_attend& a = p.a;
    window = a.ids || a.window < 0 || a.window > INT_MAX ? INT_MAX : static_cast<int>(a.window);
    sink = a.ids ? 0 : static_cast<int>(a.sink < INT_MAX ? a.sink : INT_MAX);
    const int list = a.select_heads == 1 ? 0 : a.select_heads == a.kv_heads ? unit.kv_head : unit.head(p, 0);
    row = unit.batch * a.select_heads + list;
    ids = a.ids ? a.ids + unit.batch * a.ids_b + list * a.ids_h + unit.token * a.ids_n : nullptr;
    places = a.k_pos ? a.k_pos + unit.batch * a.k_pos_b : nullptr;
    jump = 0, before = INT_MAX;
    count = ((ids ? a.chosen * a.block : a.stored) + N - 1) / N;
  }
  // Whether the slabs are known before the queries' positions are. Else columns are positions.
  __device__ bool listed() const { return ids || places; }
  __device__ void bound(const hfl_attend& a, int low_, int high_) {
    low = low_, high = high_;
    if (listed()) return;
    end = min(high + 1, a.stored);  // nothing after the last query, and nothing between sinks and window
    count = (end + N - 1) / N;
    const int sinks = (min(sink, end) + N - 1) / N, from = min(max(low - window + 1, 0) / N, count);
    if (from > sinks) before = sinks, jump = from - sinks, count -= jump;
  }

  // Unless listed: true if every query sees all keys from `first` to `last`.
  __device__ bool seen_by_all(int first, int last) const {
    return last <= low && last < end && (last < sink || first > high - window);
  }

  // What must be loaded to know the key of lane l % N of a slab; later, its column and position, -1 for none.
  __device__ Found find(const AttendTask& p, int slab, int lane) const {
    const hfl_attend& a = p.a;
    const int index = (slab < before ? slab : slab + jump) * N + (lane & (N - 1));
    if (ids) {
      const int block = p.block.divide(index);
      if (block >= a.chosen) return Found{-1, -1};
      const int32_t* id = ids + block;
      return Found{*id, a.pages ? a.pages[id - a.ids] : *id};
    }
    const int place = index >= a.stored ? -1 : places ? static_cast<int>(places[index]) : index;
    return Found{place, index};
  }
  __device__ int2 place(const AttendTask& p, int slab, const Found& found, int lane) const {
    const hfl_attend& a = p.a;
    int at = found.at, column = found.page;
    if (ids) {
      const int index = slab * N + (lane & (N - 1)), within = index - p.block.divide(index) * a.block;
      at = at < 0 || column < 0 ? -1 : at * a.block + within;
      column = column * a.block + within;
    }
    const bool there = at >= 0 && at <= high && column < a.stored && (at < sink || at > low - window);
    return there ? make_int2(column, at) : make_int2(-1, -1);
  }
  // True if every query sees a key at this position; seen: if the query at `from` does.
  __device__ bool seen_by_all(int at) const { return at >= 0 && at <= low && (at < sink || at > high - window); }
  __device__ bool seen(int at, int from) const {
    return at >= 0 && at <= from && (at < sink || from - at < window);
  }
};

// Shared memory of a block: for each warp a ring of slabs, later the warps' results, and the queries as operands.
template <int D, Format F>
struct Room {
  using S = Slab<D, F>;
  static constexpr int WARPS = D == 256 ? 2 : 4;
  static constexpr int WANTED = 65536 / (WARPS * 2 * S::BYTES), MOST = F == Format::int4 ? 3 : 4;
  static constexpr int STAGES = WANTED < 2 ? 2 : WANTED > MOST ? MOST : WANTED;
  static constexpr int SIDE = S::PACKED ? 8 * S::KEYS : 0;  // scales and zeros of keys and of their values
  static constexpr int NOTES = S::KEYS * 4 + 16;            // positions of keys; whether all queries see all of them
  static constexpr int KEYS = 0, VALUES = STAGES * S::BYTES, SIDES = 2 * VALUES, NOTED = SIDES + STAGES * SIDE;
  static constexpr int BOUNDARY = S::PACKED && S::POWER ? 1024 : 128;
  static constexpr int WARP = (NOTED + STAGES * NOTES + BOUNDARY - 1) / BOUNDARY * BOUNDARY;
  static constexpr int RING = WARPS * WARP;
  static constexpr int QUERY = (D + 63) / 64 * 64 * ROWS * 2;  // of one variant, as operands of every lane
  static constexpr int FACTORS = RING, STATES = FACTORS + 3 * ROWS * 8, PLACES = STATES + WARPS * ROWS * 8;
  static constexpr int SLOPES = PLACES + ROWS * 4, QUERIES = SLOPES + ROWS * 4;
  static constexpr int OUT = D + 4;                        // floats of a warp's result: rows begin at other banks
  static constexpr int PARTS = ROWS * MOST_SPLITS * 4;     // after the weights of other blocks' results, these
  static_assert(S::BYTES % BOUNDARY == 0, "so that slabs begin at multiples of it");
  static_assert(RING >= WARPS * ROWS * OUT * 4 && RING >= PARTS + ROWS * D * 4 && QUERIES % 128 == 0, "room to merge");

  static constexpr int bytes(int variants) { return QUERIES + variants * QUERY; }
};

}  // namespace hfl
