// Decode attention: the kernel. attend.cu says what it computes and how the work is cut.
#pragma once
#include <limits.h>
#include <math.h>

#include "../hf_longctx.h"
#include "attend_tile.cuh"

namespace hfl {

constexpr int MOST_SPLITS = 128;
constexpr int MERGED = 16;  // results of blocks that the last one reads at a time

// Slabs of each block, if a unit's are shared out over at most `splits`. A slab more for each warp takes about as long
// as a further batch of results to merge: so where one batch does not hold all, each warp gets at least two slabs.
__host__ __device__ constexpr int slabs_of_block(int slabs, int splits, int warps) {
  const int wanted = (slabs + splits * warps - 1) / (splits * warps), least = slabs > MERGED * warps ? 2 : 1;
  return (wanted < least ? least : wanted) * warps;
}

struct AttendTask {
  hfl_attend a;
  int group, units, splits;  // query heads of a KV head; units of a KV head; parts of its columns
  int variants;              // ways in which a query is given: as it is, turned one lap on, turned to the sinks
};

// What one block does, beside its share of the columns: up to 16 queries of a KV head, one in each row of the operands.
struct Unit {
  int batch, kv_head, first, last, tokens, token;

  __device__ Unit(const AttendTask& p, int index, int problem) {
    batch = problem / p.a.kv_heads, kv_head = problem % p.a.kv_heads;
    const bool apart = p.a.ids && p.a.select_heads != p.a.kv_heads && p.a.select_heads != 1;  // a list per query head
    const int tiles = apart ? p.group : (p.group + 15) / 16;
    tokens = p.a.ids ? 1 : p.a.tokens;  // with a selection every query has its own list
    token = p.a.ids ? index / tiles : 0;
    first = p.a.ids ? index % tiles * (apart ? 1 : 16) : index * 16;
    last = min(apart ? first + 1 : p.group * tokens, first + 16);
  }
  __device__ int rows() const { return last - first; }
  __device__ int query(int row) const { return token + (first + row) % tokens; }
  __device__ int head(const AttendTask& p, int row) const { return kv_head * p.group + (first + row) / tokens; }
  __device__ int position(const AttendTask& p, int row) const {
    if (row >= rows()) return -1;
    const int t = query(row);
    return p.a.q_pos ? static_cast<int>(p.a.q_pos[batch * p.a.q_pos_b + t]) : p.a.stored - p.a.tokens + t;
  }
};

// The keys that a unit reads, as slabs of 16: where they lie, and who sees them.
struct Keys {
  int low, high;            // least and largest position of a query
  int sink, window;         // INT_MAX: none
  int count, before, jump;  // slabs; of those the first `before` lie at their number, the others `jump` further on
  const int32_t* ids;
  const int64_t* places;  // positions of columns

  struct Found {
    int at, page;
  };

  __device__ Keys(const AttendTask& p, const Unit& unit, int low_, int high_) : low(low_), high(high_) {
    const hfl_attend& a = p.a;
    window = a.ids || a.window < 0 || a.window > INT_MAX ? INT_MAX : static_cast<int>(a.window);
    sink = a.ids ? 0 : static_cast<int>(a.sink < INT_MAX ? a.sink : INT_MAX);
    const int list = a.select_heads == 1 ? 0 : a.select_heads == a.kv_heads ? unit.kv_head : unit.head(p, 0);
    ids = a.ids ? a.ids + unit.batch * a.ids_b + list * a.ids_h + unit.token * a.ids_n : nullptr;
    places = a.k_pos ? a.k_pos + unit.batch * a.k_pos_b : nullptr;
    jump = 0, before = INT_MAX;
    if (ids) {
      count = (a.chosen * a.block + 15) / 16;
    } else if (places) {
      count = (a.stored + 15) / 16;
    } else {  // columns are positions: nothing after the last query, and nothing between sinks and window
      const int end = min(high + 1, a.stored);
      count = (end + 15) / 16;
      const int sinks = (min(sink, end) + 15) / 16, from = min(max(low - window + 1, 0) / 16, count);
      if (from > sinks) before = sinks, jump = from - sinks, count -= jump;
    }
  }

  // What must be loaded to know the key of lane l % 16 of a slab; later, its column and position, -1 for none.
  __device__ Found find(const hfl_attend& a, int slab, int lane) const {
    const int index = (slab < before ? slab : slab + jump) * 16 + (lane & 15);
    if (ids) {
      const int block = index / a.block;
      if (block >= a.chosen) return Found{-1, -1};
      const int32_t* id = ids + block;
      return Found{*id, a.pages ? a.pages[id - a.ids] : *id};
    }
    const int place = index >= a.stored ? -1 : places ? static_cast<int>(places[index]) : index;
    return Found{place, index};
  }
  __device__ int2 place(const hfl_attend& a, int slab, const Found& found, int lane) const {
    int at = found.at, column = found.page;
    if (ids) {
      const int within = (slab * 16 + (lane & 15)) % a.block;
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

// Shared memory of a block: queries as operands, then for each warp a ring of slabs, later the warps' results.
template <int D, Format F>
struct Room {
  using S = Slab<D, F>;
  static constexpr int WARPS = D == 256 ? 2 : 4;
  static constexpr int WANTED = 65536 / (WARPS * 2 * S::BYTES);
  static constexpr int STAGES = WANTED < 2 ? 2 : WANTED > 6 ? 6 : WANTED;
  static constexpr int SIDE = S::PACKED ? 128 : 0;  // scales and zeros of 16 keys and of their values
  static constexpr int NOTES = 80;                  // positions of 16 keys; whether all queries see all of them
  static constexpr int KEYS = 0, VALUES = STAGES * S::BYTES, SIDES = 2 * VALUES, NOTED = SIDES + STAGES * SIDE;
  static constexpr int SOURCES = NOTED + STAGES * NOTES;  // packed: where scales and zeros of a head begin
  static constexpr int WARP = (SOURCES + SIDE / 2 + 127) / 128 * 128;
  static constexpr int RING = WARPS * WARP;
  static constexpr int QUERY = D * 32;  // 16 rows, as operands of every lane
  static constexpr int FACTORS = RING, STATES = FACTORS + 3 * 16 * 8, PLACES = STATES + WARPS * 16 * 8;
  static constexpr int SLOPES = PLACES + 16 * 4, QUERIES = SLOPES + 16 * 4;
  static_assert(RING >= WARPS * 16 * D * 4 && QUERIES % 128 == 0, "room to merge");

  static constexpr int bytes(int variants) { return QUERIES + variants * QUERY; }
};

template <int D, Format F>
struct Queries {
  using S = Slab<D, F>;

  __device__ static const void* given(const hfl_attend& a, int variant) {
    return variant == 0 ? a.q : variant == 1 ? a.q_before : a.q_sinks;
  }

  // Write the operands of all steps of one variant. Packed: in float16, times a power of two for each row that brings
  // its largest number to 2^14, so that every number of either dtype that matters is exact. `factors`: what makes
  // products with payloads * 2^-24 those that they stand for, and what is to take off them for each unit of zero.
  __device__ static void prepare(const AttendTask& p, const Unit& unit, int variant, uint4* to, float2* factors,
                                 int lane) {
    const int g = lane >> 2, c = lane & 3;
    const uint16_t* row[2];
    float down[2] = {1.0f, 1.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = g + 8 * h, safe = r < unit.rows() ? r : 0;
      row[h] = static_cast<const uint16_t*>(given(p.a, variant)) + unit.batch * p.a.q_b + unit.head(p, safe) * p.a.q_h +
               unit.query(safe) * p.a.q_t;
      if constexpr (S::PACKED) {
        float most = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (int d = 2 * c; d < D; d += 8) {
          const float2 x = values(p, row[h] + d);
          most = fmaxf(most, fmaxf(fabsf(x.x), fabsf(x.y)));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const int exponent = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -110), 117);
        down[h] = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
#pragma unroll 4
        for (int d = 2 * c; d < D; d += 8) {
          const float2 x = values(p, row[h] + d);
          const float2 rounded = unpack_f16(pack_f16(x.x * down[h], x.y * down[h]));
          sum += rounded.x + rounded.y;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (c == 0) {
          const uint32_t up = static_cast<uint32_t>(127 + 24 - 14 + exponent) << 23;
          factors[r] = make_float2(__uint_as_float(up), sum * 0x1p-24f);
        }
      }
    }
#pragma unroll 2
    for (int s = 0; s < D / 16; ++s) {
      const uint2 x = four(p, row[0], s, c, down[0]), y = four(p, row[1], s, c, down[1]);
      to[s * 32 + lane] = make_uint4(x.x, y.x, x.y, y.y);
    }
  }

 private:
  __device__ static float2 values(const AttendTask& p, const uint16_t* at) {
    const uint32_t x = *reinterpret_cast<const uint32_t*>(at);
    return p.a.dtype == HFL_BF16 ? unpack_bf16(x) : unpack_f16(x);
  }
  // The four channels of a lane at inner step s.
  __device__ static uint2 four(const AttendTask& p, const uint16_t* row, int s, int c, float down) {
    const uint16_t* at = row + S::channel(s, c);
    if constexpr (!S::PACKED) return *reinterpret_cast<const uint2*>(at);
    if constexpr (F == Format::int4) {  // 2h, 2h + 4, 2h + 1, 2h + 5 of eight
      const float2 x = values(p, at + s % 2 * 2), y = values(p, at + s % 2 * 2 + 4);
      const float less = down / 16.0f;  // the second pair of payloads is 16 times what it says
      return make_uint2(pack_f16(x.x * down, y.x * down), pack_f16(x.y * less, y.y * less));
    }
    const float2 x = values(p, at), y = values(p, at + 2);
    return make_uint2(pack_f16(x.x * down, x.y * down), pack_f16(y.x * down, y.y * down));
  }
};

}  // namespace hfl
