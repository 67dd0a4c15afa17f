// Prefill attention where keys and values are not simply there: keys stand at lap positions, columns are not positions,
// or both are packed. Made good in shared memory, before the products of prefill_mma.cuh. prefill.cu says the rest.
#pragma once
#include "prefill_notes.cuh"

namespace hfl {

template <int D, bool BF16>
struct AnyWarp : PrefillWarp<D, BF16, D == 256 ? 2 : 1> {
  using R = AnyRoom<D>;
  using Warp = PrefillWarp<D, BF16, D == 256 ? 2 : 1>;
  using Logits = float[Warp::MT][Warp::NT][4];
  using Warp::MT, Warp::NT, Warp::p, Warp::keys, Warp::shared, Warp::lane, Warp::from, Warp::special;

  Notes<D>& notes;
  int place = -1;  // of this thread's key of the tile that is on its way
  __half2 side;    // and scale and zero of its key or value

  __device__ AnyWarp(const PrefillTask& p_, const typename Warp::Keys& keys_, Notes<D>& notes_, unsigned char* shared_)
      : Warp(p_, keys_, shared_), notes(notes_) {}

  // The index of this thread, and where its rows of products begin; computed where they are asked for.
  __device__ __forceinline__ static int thread() { return static_cast<int>(unknown(threadIdx.x)); }
  __device__ __forceinline__ static int own_row() { const int t = thread(); return t / 32 * R::OWN + t % 32 / 4; }

  // The step after another one.
  __device__ Step next(Step step) const {
    step.more = true;
    if (step.first) {
      while (++step.index < keys.count) {
        step.tile = keys.tile(step.index);
        if (!notes.turning.reads(step.tile, true)) break;
        if (step.index == step.resume && !notes.turning.reads(step.tile, false)) ++step.resume;
        return step;
      }
      step.first = false, step.index = step.resume - 1;
    }
    while (++step.index < keys.count) {
      step.tile = keys.tile(step.index);
      if (notes.turning.reads(step.tile, false)) return step;
    }
    step.more = false;
    return step;
  }

  // Begin to copy the keys of a tile, or keys and values if they are packed.
  __device__ __forceinline__ void fetch(const KeyTile& tile) {
    const hfl_prefill& a = p.a;
    const QueryTile queries(p, R::ROWS);
    const int thread = AnyWarp::thread(), key = thread % R::KEYS;
    const uint32_t base = shared_address(shared);
    place = -1;
    if (thread < tile.limit) {
      place = a.k_pos ? static_cast<int>(a.k_pos[queries.batch * a.k_pos_b + tile.column + key]) : tile.position + key;
    }
    if (a.k.bits == 0) {
      R::template copy<R::KEYS>(base + R::KEYS_AT, keys.k + tile.column * a.k.t, a.k.t, tile.limit);
      return;
    }
    copy_payload(base + R::PAYLOADS, a.k, queries, tile);
    copy_payload(base + R::PAYLOADS + R::PAYLOAD, a.v, queries, tile);
    const hfl_rows& rows = thread < R::KEYS ? a.k : a.v;
    side = __half2half2(__ushort_as_half(0));
    if (thread < 2 * R::KEYS && key < tile.limit) {
      const int64_t at = queries.batch * rows.scale_b + queries.kv_head * rows.scale_h + tile.column + key;
      side = __halves2half2(static_cast<const __half*>(rows.scale)[at], static_cast<const __half*>(rows.zero)[at]);
    }
  }

  // Write down what is known of a tile; returns whether a key is to be turned, and whether a query does not see one.
  __device__ __forceinline__ int2 note(const Step& step, int stage) {
    const Turning<R::ROWS, R::KEYS>& turning = notes.turning;
    const int thread = AnyWarp::thread();
    int turn = 0;
    bool hidden = false;
    if (thread < R::KEYS) {
      if (notes.frequencies.pairs && place >= 0) turn = turning.of_key(step.first, place);
      notes.place[stage][thread] = place, notes.key_turn[thread] = turn;
      hidden = !(place >= turning.least(step.first, keys.high) && place <= turning.most(step.first, keys.low) &&
                 (place < keys.sink || keys.high - place < keys.window));
    }
    if (thread < 2 * R::KEYS) notes.sides[thread] = side;
    return make_int2(turn, hidden);
  }

  // As `note`, for queries.
  __device__ void note_queries(bool first) {
    const hfl_prefill& a = p.a;
    const QueryTile queries(p, R::ROWS);
    const int row = threadIdx.x, own = row < R::ROWS ? keys.position[row] : -1;
    if (row >= R::ROWS) return;
    int seat = own;
    if (own >= 0 && first && !notes.turning.clamp) {
      seat = static_cast<int>(a.sink_pos[queries.batch * a.sink_pos_b + queries.first + row]);
    }
    notes.seat[row] = seat;
    notes.query_turn[row] = own >= 0 && notes.frequencies.pairs ? notes.turning.of_query(first, own, seat) : 0;
  }

  __device__ void bring_queries() {
    const hfl_prefill& a = p.a;
    const QueryTile queries(p, R::ROWS);
    const uint16_t* rows = static_cast<const uint16_t*>(a.q) + queries.batch * a.q_b + queries.place(a) * a.q_h;
    settle<R::ROWS>(R::QUERIES, notes.query_turn, [&](int row, int chunk) {
      const int t = queries.first + row;
      if (t >= a.tokens) return Eight{};
      return unpack(*reinterpret_cast<const uint4*>(rows + t * a.q_t + chunk * 8));
    });
  }

  __device__ void turn_keys() {
    settle<R::KEYS, true>(R::KEYS_AT, notes.key_turn, [&](int row, int chunk) {
      return unpack(*reinterpret_cast<const uint4*>(shared + R::KEYS_AT + R::at(row, chunk)));
    });
  }

  __device__ void unpack_tile() {
    const auto payload = [&](int which) {
      return [this, which](int row, int chunk) {
        const unsigned char* at = shared + R::PAYLOADS + which * R::PAYLOAD;
        const float2 side = __half22float2(notes.sides[which * R::KEYS + row]);
        return p.a.k.bits == 8 ? of_eight_bits(*reinterpret_cast<const uint2*>(at + row * D + chunk * 8), side)
                               : of_four_bits(*reinterpret_cast<const uint32_t*>(at + row * (D / 2) + chunk * 4), side);
      };
    };
    settle<R::KEYS>(R::KEYS_AT, notes.key_turn, payload(0));
    settle<R::KEYS>(R::VALUES_AT, nullptr, payload(1));
  }

  __device__ __forceinline__ void adjust(Logits& x, bool first, int stage) const {
    if (!special()) return;
    const int2* places = reinterpret_cast<const int2*>(notes.place[stage]) + thread() % 4;
    const int clamp = first ? notes.turning.clamp : 0, row = own_row();
    const float slope = p.a.slopes ? p.a.slopes[QueryTile(p, R::ROWS).head] : 0.0f, cap = p.a.softcap;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int seat = notes.seat[row + 16 * m + 8 * h];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int2 at = places[n * 4];
          adjust(x[m][n][2 * h], clamp ? -clamp : at.x - seat, slope, cap);
          adjust(x[m][n][2 * h + 1], clamp ? -clamp : at.y - seat, slope, cap);
        }
      }
    }
  }

  __device__ __forceinline__ void mask(Logits& x, bool first, int stage) const {
    const int2* places = reinterpret_cast<const int2*>(notes.place[stage]) + thread() % 4;
    const int row = own_row();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int own = keys.position[row + 16 * m + 8 * h], start = own - keys.window, sink = keys.sink;
        const int least = notes.turning.least(first, own);
        const unsigned width = max(notes.turning.most(first, own) - least + 1, 0);
        const auto seen = [=](int at) {
          return (static_cast<unsigned>(at - least) < width) & ((at < sink) | (at > start));
        };
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int2 at = places[n * 4];
          if (!seen(at.x)) x[m][n][2 * h] = NOTHING;
          if (!seen(at.y)) x[m][n][2 * h + 1] = NOTHING;
        }
      }
    }
  }

 private:
  struct Eight {
    float x[8];
  };

  __device__ __forceinline__ void adjust(float& z, int away, float slope, float cap) const {
    float y = z * p.a.scale;
    if (cap != 0.0f) y = cap * (1.0f - __fdividef(2.0f, power_of_two(2.0f * LOG2E / cap * y) + 1.0f));
    z = (y + slope * static_cast<float>(away)) * LOG2E;
  }

  __device__ static void copy_payload(uint32_t to, const hfl_rows& rows, const QueryTile& queries,
                                      const KeyTile& tile) {
    const unsigned char* from = static_cast<const unsigned char*>(rows.data) + queries.batch * rows.b +
                                queries.kv_head * rows.h + tile.column * rows.t;
    const int shift = rows.bits == 4;  // a row has half the chunks
    for (int i = thread(); i < R::KEYS * (D / 16) >> shift; i += R::THREADS) {
      const int row = (i << shift) / (D / 16), chunk = i - (row * (D / 16) >> shift);
      copy_async(to + i * 16, from + row * rows.t + chunk * 16, row < tile.limit);
    }
  }

  // Rows into shared memory at `to`, turned; ONLY: those that are turned alone. load: a chunk of a row. By all threads.
  template <int COUNT, bool ONLY = false, typename Load>
  __device__ __forceinline__ void settle(int to, const int* turns, Load load) {
    constexpr int UNITS = Frequencies<D>::UNITS;
    static_assert(COUNT * UNITS % R::THREADS == 0, "as many units for every thread");
#pragma unroll 1
    for (int i = thread(); i < COUNT * UNITS; i += R::THREADS) {
      const int row = i / UNITS, unit = i % UNITS;
      const int delta = turns && notes.frequencies.turns(unit) ? turns[row] : 0;
      if (ONLY && delta == 0) continue;
      const int2 chunks = notes.frequencies.chunks(unit);
      Eight a = load(row, chunks.x), b = load(row, chunks.y);
      if (delta) notes.frequencies.turn(a.x, b.x, unit, delta);
      *reinterpret_cast<uint4*>(shared + to + R::at(row, chunks.x)) = packed(a);
      *reinterpret_cast<uint4*>(shared + to + R::at(row, chunks.y)) = packed(b);
    }
  }

  __device__ __forceinline__ static Eight unpack(const uint4& words) {
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = BF16 ? unpack_bf16(all[i]) : unpack_f16(all[i]);
      out.x[2 * i] = pair.x, out.x[2 * i + 1] = pair.y;
    }
    return out;
  }
  __device__ __forceinline__ static uint4 packed(const Eight& e) {
    return make_uint4(Warp::pack(e.x[0], e.x[1]), Warp::pack(e.x[2], e.x[3]), Warp::pack(e.x[4], e.x[5]),
                      Warp::pack(e.x[6], e.x[7]));
  }

  // Byte i of a word: below 2^23 it is the last of the float 2^23 + itself.
  __device__ __forceinline__ static float byte_of(uint32_t word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | i)) - 8388608.0f;
  }
  __device__ __forceinline__ static Eight of_eight_bits(const uint2& words, const float2& side) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = (byte_of(i < 4 ? words.x : words.y, i % 4) - side.y) * side.x;
    return out;
  }
  __device__ __forceinline__ static Eight of_four_bits(uint32_t word, const float2& side) {
    const uint32_t halves[2] = {word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu};
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = (byte_of(halves[i % 2], i / 2) - side.y) * side.x;
    return out;
  }
};

template <int D, bool BF16>
__global__ __launch_bounds__(AnyRoom<D>::THREADS, 2) void prefill_any_kernel(const __grid_constant__ PrefillTask p) {
  using R = AnyRoom<D>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Walk<R::ROWS, R::KEYS> keys;
  __shared__ Notes<D> notes;
  const hfl_prefill& a = p.a;
  keys.template prepare<R::THREADS>(p, QueryTile(p, R::ROWS), static_cast<int>(threadIdx.x), [] { __syncthreads(); });
  if (threadIdx.x == 0) notes.turning.prepare(a, keys);
  notes.frequencies.prepare(a);
  __syncthreads();
  AnyWarp<D, BF16> warp(p, keys, notes, shared);
  if (threadIdx.x == 0) notes.steps[0] = warp.next({-1, 0, true, true, {}});
  __syncthreads();
  if (notes.steps[0].more) warp.fetch(notes.steps[0].tile);
  copy_commit();
  bool fresh = true;
#pragma unroll 1
  for (int stage = 0; notes.steps[stage].more; stage ^= 1) {
    const Step& step = notes.steps[stage];
    Step& next = notes.steps[stage ^ 1];
    copy_wait<0>();
    const int2 found = warp.note(step, stage);
    if (fresh) warp.note_queries(step.first);
    const bool turned = __syncthreads_or(found.x);  // keys are here, and values of the tile before have been read
    if (a.k.bits == 0) {
      R::template copy<R::KEYS>(shared_address(shared) + R::VALUES_AT, keys.v + step.tile.column * a.v.t, a.v.t,
                                step.tile.limit);
    }
    copy_commit();
    if (fresh) warp.bring_queries();
    if (a.k.bits) {
      warp.unpack_tile();
    } else if (turned) {
      warp.turn_keys();
    }
    const bool hidden = __syncthreads_or(found.y);  // queries and keys are as they are multiplied
    typename AnyWarp<D, BF16>::Logits x;
    if (threadIdx.x == 0) next = warp.next(step);
    warp.products(x);
    copy_wait<0>();
    __syncthreads();  // values are here, and the keys have been read
    warp.adjust(x, step.first, stage);
    if (hidden) warp.mask(x, step.first, stage);
    warp.weigh(x);
    fresh = next.first != step.first;
    if (next.more) warp.fetch(next.tile);
    copy_commit();
    warp.gather(x);
  }
  warp.leave();
}

}  // namespace hfl
