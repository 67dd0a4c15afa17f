// Decode attention: logits of a slab's keys, by one warp.
#pragma once
#include "attend.cuh"

namespace hfl {

// Of a lane (g, c): [tile][i], i = 0, 1: of key token(2 tile, g) with queries 2c and 2c + 1; i = 2, 3: of key
// token(2 tile + 1, g).
template <int D, Format F>
struct Logits {
  using S = Slab<D, F>;
  using R = Room<D, F>;
  using Values = float[S::TILES][4];
  using Sides = float[2 * S::TILES];

  const AttendTask& p;
  const Keys<S::KEYS>& keys;
  const unsigned char* shared;
  unsigned char* ring;
  int lane;

  // Logits times log2(e), less `base` of either query; -inf where a query does not see a key. NOTED: where keys stand
  // is written in the ring; else they follow on `start`. Returns whether all queries see all keys.
  template <bool NOTED>
  __device__ bool compute(Values& x, int stage, int start, const float (&base)[2]) const {
    const int* notes = reinterpret_cast<const int*>(ring + R::NOTED + stage * R::NOTES);
    const bool all = NOTED ? notes[S::KEYS] != 0 : keys.seen_by_all(start, start + S::KEYS - 1);
    if (all && p.variants == 1 && p.a.softcap == 0.0f && !p.a.slopes) {  // nearly always
      products<true>(x, stage, 0, p.a.scale * LOG2E, base);
    } else {
      int at[2 * S::TILES];
#pragma unroll
      for (int i = 0; i < 2 * S::TILES; ++i) at[i] = place<NOTED>(S::token(i, lane >> 2), stage, start);
      special(x, stage, at, all, base);
    }
    return all;
  }

  // Whether key `lane` of a packed slab is none that anybody sees.
  template <bool NOTED>
  __device__ bool missing(int stage, int start) const {
    return place<NOTED>(lane, stage, start) < 0;
  }
  // Beside such a key may stand anything: scale and zero of its value become zeros.
  __device__ void clear(int stage, bool mine) const {
    __half* to = reinterpret_cast<__half*>(ring + R::SIDES + stage * R::SIDE) + 2 * S::KEYS + lane;
    if (mine) to[0] = to[S::KEYS] = __ushort_as_half(0);
    __syncwarp();
  }

  // Scales, or zeros, of a lane's keys or their values.
  __device__ void sides(Sides& to, int stage, bool values, bool zero) const {
    static_assert(S::PACKED && S::token(3, 0) == 3, "four keys side by side");
    const unsigned char* at = ring + R::SIDES + stage * R::SIDE + (2 * values + zero) * 2 * S::KEYS;
    const uint2 all = reinterpret_cast<const uint2*>(at)[lane >> 2];
    const float2 first = unpack_f16(all.x), second = unpack_f16(all.y);
    to[0] = first.x, to[1] = first.y, to[2] = second.x, to[3] = second.y;
  }

 private:
  // Position of a slab's key, -1 for none.
  template <bool NOTED>
  __device__ int place(int token, int stage, int start) const {
    if constexpr (NOTED) return reinterpret_cast<const int*>(ring + R::NOTED + stage * R::NOTES)[token];
    return start + token < keys.end ? start + token : -1;
  }

  __device__ void special(Values& x, int stage, const int (&at)[2 * S::TILES], bool all, const float (&base)[2]) const {
    const hfl_attend& a = p.a;
    const int c = lane & 3;
    const int2 pair = reinterpret_cast<const int2*>(shared + R::PLACES)[c];
    const float2 slopes = reinterpret_cast<const float2*>(shared + R::SLOPES)[c];
    const int from[2] = {pair.x, pair.y};
    turned_products(x, stage, at, from);
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) {
      const int pos = at[i / 2], own = from[i & 1];
      float y = x[i / 4][i & 3];
      if (a.softcap != 0.0f) y = a.softcap * (1.0f - 2.0f / (power_of_two(2.0f * LOG2E / a.softcap * y) + 1.0f));
      y = (y + (i & 1 ? slopes.y : slopes.x) * static_cast<float>(pos - own)) * LOG2E;
      x[i / 4][i & 3] = all || keys.seen(pos, own) ? y - base[i & 1] : NOTHING;
    }
  }

  // q.k times `factor`, less `base`, with the queries as they are given in one variant.
  template <bool PLAIN>
  __device__ void products(Values& x, int stage, int variant, float factor, const float (&base)[2]) const {
    const uint4* queries = reinterpret_cast<const uint4*>(shared + R::QUERIES + variant * R::QUERY) + lane;
    if constexpr (S::PACKED) {
      int sums[S::TILES][2][4] = {};
      packed_products<PLAIN>(sums, shared_address(ring) + R::KEYS + stage * S::BYTES, queries);
      const float4 both = reinterpret_cast<const float4*>(shared + R::FACTORS)[variant * (ROWS / 2) + (lane & 3)];
      Sides scale, zero;
      sides(scale, stage, false, false), sides(zero, stage, false, true);
#pragma unroll
      for (int i = 0; i < 4 * S::TILES; ++i) {
        const int sum = sums[i / 4][0][i & 3] * 256 + sums[i / 4][1][i & 3];
        const float y = (static_cast<float>(sum) - zero[i / 2] * (i & 1 ? both.w : both.y)) * scale[i / 2];
        x[i / 4][i & 3] = y * ((i & 1 ? both.z : both.x) * factor) - base[i & 1];
      }
    } else {
      const unsigned char* slab = ring + R::KEYS + stage * S::BYTES;
      float sums[2][4] = {};  // even and odd inner steps apart
#pragma unroll (PLAIN && D < 256 ? D : 1)
      for (int j = 0; j < D / 32; ++j) {
        const uint4 first = S::key_words(slab, lane >> 2, j, lane & 3);
        const uint4 second = S::key_words(slab, 8 + (lane >> 2), j, lane & 3);
        const uint4 q = queries[j * 32];
        S::multiply(sums[0], make_uint4(first.x, second.x, first.y, second.y), q.x, q.y);
        S::multiply(sums[1], make_uint4(first.z, second.z, first.w, second.w), q.z, q.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[0][i] = (sums[0][i] + sums[1][i]) * factor - base[i & 1];
    }
  }

  // Products with the higher and with the lower digits of queries.
  template <bool PLAIN>
  __device__ void packed_products(int (&sums)[S::TILES][2][4], uint32_t slab, const uint4* queries) const {
#pragma unroll (PLAIN && D < 256 ? D : 1)
    for (int j = 0; j < S::STEPS; ++j) {
      constexpr int PARTS = F == Format::int4 ? 2 : 1;
      const uint4 q = queries[PARTS * j * 32], more = queries[(PARTS * j + PARTS - 1) * 32];
#pragma unroll
      for (int tile = 0; tile < S::TILES; ++tile) {
        uint32_t x[4];
        S::packed_keys(x, slab, tile, j, lane);
        int(&sum)[2][4] = sums[tile];
        mma_u8_s8(sum[0], x, q.x, q.y), mma_u8_s8(sum[1], x, q.z, q.w);
        if constexpr (F == Format::int4) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = x[i] << 4 & 0xf0f0f0f0u;
          mma_u8_s8(sum[0], x, more.x, more.y), mma_u8_s8(sum[1], x, more.z, more.w);
        }
      }
    }
  }

  // q.k where keys stand at lap positions: 0 for keys of the query's own lap, 1 of the lap before, 2 for sinks.
  __device__ int variant(int at, int from) const {
    if (p.variants == 1) return 0;
    if (at < keys.sink) return 2;
    return lap(from) > lap(at);
  }
  __device__ int lap(int at) const {
    return max(at - static_cast<int>(p.a.offset), 0) / static_cast<int>(p.a.lap);
  }
  __device__ void turned_products(Values& x, int stage, const int (&at)[2 * S::TILES], const int (&from)[2]) const {
    unsigned present = 0, which = 0;  // a bit for each variant; two bits for each product
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) {
      const int pos = at[i / 2], own = from[i & 1], v = variant(pos, own);
      which |= static_cast<unsigned>(v) << 2 * i;
      if (pos >= 0 && pos <= own) present |= 1u << v;
      x[i / 4][i & 3] = 0.0f;
    }
    present = __reduce_or_sync(0xffffffffu, present);
#pragma unroll 1
    for (unsigned v = 0; v < 3; ++v) {
      if (!(present >> v & 1)) continue;
      Values y;
      products<false>(y, stage, static_cast<int>(v), p.a.scale, {0.0f, 0.0f});
#pragma unroll
      for (int i = 0; i < 4 * S::TILES; ++i) {
        if ((which >> 2 * i & 3) == v) x[i / 4][i & 3] = y[i / 4][i & 3];
      }
    }
  }
};

}  // namespace hfl
