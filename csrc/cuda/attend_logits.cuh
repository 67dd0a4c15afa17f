// Decode attention: logits of a slab's keys, by one warp.
#pragma once
#include "attend.cuh"

namespace hfl {

// Of a lane (g, c): [tile][i], i = 0, 1: of key g of a tile of 16 with queries 2c and 2c + 1; i = 2, 3: of key g + 8.
template <int D, Format F>
struct Logits {
  using S = Slab<D, F>;
  using R = Room<D, F>;
  using Values = float[S::TILES][4];

  const AttendTask& p;
  const Keys<S::KEYS>& keys;
  const unsigned char* shared;
  const unsigned char* ring;
  int lane;

  // Logits times log2(e); -inf where a query does not see a key. Returns whether all queries see all keys.
  __device__ bool compute(Values& x, int stage) const {
    const int* notes = reinterpret_cast<const int*>(ring + R::NOTED + stage * R::NOTES);
    const bool all = notes[S::KEYS] != 0;
    if (all && p.variants == 1 && p.a.softcap == 0.0f && !p.a.slopes) {  // nearly always
      products<true>(x, stage, 0, p.a.scale * LOG2E);
    } else {
      special(x, stage, notes, all);
    }
    return all;
  }

  // Scales, or zeros, of keys (or their values) of a lane in a group of 8.
  __device__ float side(int stage, bool values, bool zero, int eight) const {
    const unsigned char* at = ring + R::SIDES + stage * R::SIDE + (2 * values + zero) * 2 * S::KEYS;
    return __half2float(reinterpret_cast<const __half*>(at)[eight * 8 + (lane >> 2)]);
  }

 private:
  __device__ void special(Values& x, int stage, const int* notes, bool all) const {
    const hfl_attend& a = p.a;
    const int c = lane & 3;
    const int2 pair = reinterpret_cast<const int2*>(shared + R::PLACES)[c];
    const float2 slopes = reinterpret_cast<const float2*>(shared + R::SLOPES)[c];
    const int from[2] = {pair.x, pair.y};
    int at[2 * S::TILES];
#pragma unroll
    for (int i = 0; i < 2 * S::TILES; ++i) at[i] = notes[i * 8 + (lane >> 2)];
    turned_products(x, stage, at, from);
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) {
      const int pos = at[i / 2], own = from[i & 1];
      float y = x[i / 4][i & 3];
      if (a.softcap != 0.0f) y = a.softcap * (1.0f - 2.0f / (power_of_two(2.0f * LOG2E / a.softcap * y) + 1.0f));
      y = (y + (i & 1 ? slopes.y : slopes.x) * static_cast<float>(pos - own)) * LOG2E;
      x[i / 4][i & 3] = all || keys.seen(pos, own) ? y : NOTHING;
    }
  }

  // q.k times `factor`, with the queries as they are given in one variant.
  template <bool PLAIN>
  __device__ void products(Values& x, int stage, int variant, float factor) const {
    const uint4* queries = reinterpret_cast<const uint4*>(shared + R::QUERIES + variant * R::QUERY) + lane;
    const unsigned char* slab = ring + R::KEYS + stage * S::BYTES;
    constexpr int CHAINS = 2 / S::TILES;  // of a tile: even and odd steps apart where there is but one
    constexpr int AT_ONCE = PLAIN ? S::TILES : 1;  // else registers are short
    float sums[CHAINS][S::TILES][4] = {};
#pragma unroll
    for (int first = 0; first < S::TILES; first += AT_ONCE) {
#pragma unroll (PLAIN && D < 256 ? D : 1)
      for (int j = 0; j < D / 4 / S::UNIT_K; ++j) {
        uint32_t words[2 * AT_ONCE][S::WORDS_K];
#pragma unroll
        for (int i = 0; i < 2 * AT_ONCE; ++i) {
          S::key_words(words[i], slab, (2 * first + i) * 8 + (lane >> 2), j, lane & 3);
        }
#pragma unroll
        for (int e = 0; e < S::UNIT_K / 4; e += 2) {
          const uint4 q = queries[(j * (S::UNIT_K / 4) + e) / 2 * 32];
#pragma unroll
          for (int tile = 0; tile < AT_ONCE; ++tile) {
            multiply(sums[0][first + tile], words + 2 * tile, e, q.x, q.y);
            multiply(sums[CHAINS - 1][first + tile], words + 2 * tile, e + 1, q.z, q.w);
          }
        }
      }
    }
    const float4 both = reinterpret_cast<const float4*>(shared + R::FACTORS)[variant * (ROWS / 2) + (lane & 3)];
#pragma unroll
    for (int i = 0; i < 2 * S::TILES; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = i % 2 * 2 + j;
        float y = CHAINS == 2 ? sums[0][i / 2][at] + sums[CHAINS - 1][i / 2][at] : sums[0][i / 2][at];
        if constexpr (S::PACKED) {
          y = (y - side(stage, false, true, i) * (j ? both.w : both.y)) * side(stage, false, false, i);
          y *= j ? both.z : both.x;
        }
        x[i / 2][at] = y * factor;
      }
    }
  }
  // Operands of two times 8 keys.
  __device__ static void multiply(float (&sum)[4], const uint32_t (*words)[S::WORDS_K], int e, uint32_t q0,
                                  uint32_t q1) {
    uint4 k;
    S::key_operand(k.x, k.z, words[0], e);
    S::key_operand(k.y, k.w, words[1], e);
    S::multiply(sum, k, q0, q1);
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
      products<false>(y, stage, static_cast<int>(v), p.a.scale);
#pragma unroll
      for (int i = 0; i < 4 * S::TILES; ++i) {
        if ((which >> 2 * i & 3) == v) x[i / 4][i & 3] = y[i / 4][i & 3];
      }
    }
  }
};

}  // namespace hfl
