// Decode attention: what one warp does. It walks through slabs of its own, without waiting for the other warps.
#pragma once
#include "attend.cuh"

namespace hfl {

template <int D, Format F>
struct Warp {
  using S = Slab<D, F>;
  using R = Room<D, F>;
  // Float16 weights are scaled up, so that those of keys that count little stay within its normal numbers.
  static constexpr float LIFT = F == Format::bf16 ? 0.0f : 14.0f;

  const AttendTask& p;
  const Unit& unit;
  const Keys& keys;
  unsigned char* ring;
  const unsigned char* shared;
  Keys::Found next;                  // of the slab after those in the ring
  int lane, from[2];                 // positions of this lane's queries, rows g and g + 8
  int eights;                        // packed: columns that keys 0 .. 7 (even lanes) or 8 .. 15 lie at begin here
  float out[D / 8][4];               // rows g and g + 8, columns 2c and 2c + 1 of each tile
  float top[2], total[2], shift[2];  // largest logit; sum of weights; packed: sum of weights * zeros, to be taken off
  int level = 0;                     // packed: out and shift are divided by 2^(level - 127), the largest scale so far

  __device__ Warp(const AttendTask& p_, const Unit& unit_, const Keys& keys_, unsigned char* shared_, int warp,
                  int lane_)
      : p(p_), unit(unit_), keys(keys_), ring(shared_ + warp * R::WARP), shared(shared_), lane(lane_) {
#pragma unroll
    for (int h = 0; h < 2; ++h) top[h] = NOTHING, total[h] = shift[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  }

  // Fill the ring with slabs slab, slab + WARPS, ... below `end`.
  __device__ void begin(int slab, int end) {
    Keys::Found found[R::STAGES];
#pragma unroll
    for (int i = 0; i < R::STAGES; ++i) found[i] = find(slab + i * R::WARPS, end);
#pragma unroll
    for (int i = 0; i < R::STAGES; ++i) {
      const int column = copy_keys(i, slab + i * R::WARPS, end, found[i]);
      copy_values(i, slab + i * R::WARPS, end, column);
    }
    next = find(slab + R::STAGES * R::WARPS, end);
  }

  // Attend to those slabs; the queries are in shared memory.
  __device__ void walk(int slab, int end) {
    const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
    from[0] = places[lane >> 2], from[1] = places[(lane >> 2) + 8];
    for (int stage = 0; slab < end; slab += R::WARPS, stage = stage + 1 == R::STAGES ? 0 : stage + 1) {
      copy_wait<2 * R::STAGES - 1>();
      __syncwarp();
      float x[2][4];
      const bool all = logits(x, stage);
      __syncwarp();  // all lanes have read the keys: others may take their place
      const int ahead = slab + R::STAGES * R::WARPS;
      const int column = copy_keys(stage, ahead, end, next);
      next = find(ahead + R::WARPS, end);
      weigh(x);
      copy_wait<2 * R::STAGES - 1>();
      __syncwarp();
      S::add_values(out, weights(x, stage, all), ring + R::VALUES + stage * S::BYTES, lane);
      __syncwarp();
      copy_values(stage, ahead, end, column);
    }
    copy_wait<0>();
    const float up = __uint_as_float(static_cast<uint32_t>(level) << 23);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] = over_quad(total[h]);
      if constexpr (S::PACKED) {
        shift[h] = over_quad(shift[h]);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          out[i][2 * h] = (out[i][2 * h] - shift[h]) * up, out[i][2 * h + 1] = (out[i][2 * h + 1] - shift[h]) * up;
        }
      }
    }
  }

  // Leave the results in shared memory: out [16, D] for this warp, and largest logit and total.
  __device__ void leave(float* outs, float2* states) const {
    const int g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = g + 8 * h;
      if (row >= unit.rows()) continue;
      if (c == 0) states[row] = make_float2(top[h], total[h]);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        outs[row * D + S::out_channel(i, 2 * c)] = out[i][2 * h];
        outs[row * D + S::out_channel(i, 2 * c + 1)] = out[i][2 * h + 1];
      }
    }
  }

 private:
  __device__ static float over_quad(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
  __device__ Keys::Found find(int slab, int end) const {
    return slab < end ? keys.find(p.a, slab, lane) : Keys::Found{-1, -1};
  }

  // Begin to copy a slab's keys, or nothing beyond the end; always one group. Returns the column of key l % 16.
  __device__ int copy_keys(int stage, int slab, int end, const Keys::Found& found) {
    int column = -1;
    if (slab < end) {
      const int2 place = keys.place(p.a, slab, found, lane);
      column = place.x;
      int* notes = reinterpret_cast<int*>(ring + R::NOTED + stage * R::NOTES);
      const int all = __all_sync(0xffffffffu, keys.seen_by_all(place.y));
      if (lane < 16) notes[lane] = place.y;
      if (lane == 16) notes[16] = all;
      copy<true>(p.a.k, stage, column);
    }
    copy_commit();
    return column;
  }
  __device__ void copy_values(int stage, int slab, int end, int column) {
    if (slab < end) copy<false>(p.a.v, stage, column);
    copy_commit();
  }
  template <bool KEYS>
  __device__ void copy(const hfl_rows& rows, int stage, int column) {
    constexpr int width = S::PACKED ? 1 : 2;  // bytes of what strides count
    const unsigned char* data =
        static_cast<const unsigned char*>(rows.data) + (unit.batch * rows.b + unit.kv_head * rows.h) * width;
    unsigned char* to = ring + (KEYS ? R::KEYS : R::VALUES) + stage * S::BYTES;
    S::template copy<KEYS>(to, data, static_cast<uint32_t>(rows.t) * width, column, lane);
    if constexpr (S::PACKED) {  // of 8 keys 16 bytes: lanes 0 and 1 scales, 2 and 3 zeros
      if (KEYS) {  // any key that is there tells where its eight begin
        const unsigned there = __ballot_sync(0xffffffffu, column >= 0) >> (lane & 1) * 8 & 0xffu;
        const int one = __shfl_sync(0xffffffffu, column, (lane & 1) * 8 + (there ? __ffs(static_cast<int>(there)) - 1 : 0));
        eights = one < 0 ? -1 : one & ~7;
      }
      if (lane < 4) {
        const __half* from = static_cast<const __half*>(lane < 2 ? rows.scale : rows.zero) +
                             unit.batch * rows.scale_b + unit.kv_head * rows.scale_h + max(eights, 0);
        copy_async(ring + R::SIDES + stage * R::SIDE + (KEYS ? 0 : 64) + lane * 16, from, eights >= 0);
      }
    }
  }

  // Scales, or zeros (centred those of values), of keys (or their values) 2c and 2c + 1 of a tile.
  __device__ float2 scales(int stage, bool keys_, int tile) const {
    const unsigned char* at = ring + R::SIDES + stage * R::SIDE + (keys_ ? 0 : 64) + tile * 16 + (lane & 3) * 4;
    return unpack_f16(*reinterpret_cast<const uint32_t*>(at));
  }
  __device__ float2 zeros(int stage, bool keys_, int tile) const {
    const unsigned char* at = ring + R::SIDES + stage * R::SIDE + (keys_ ? 32 : 96) + tile * 16 + (lane & 3) * 4;
    const float2 x = unpack_f16(*reinterpret_cast<const uint32_t*>(at));
    return keys_ ? x : make_float2(x.x - S::CENTRE, x.y - S::CENTRE);
  }

  // Logits times log2(e) of queries g and g + 8 (second index / 2) and keys 2c and 2c + 1 of each tile; -inf where a
  // query does not see a key. Returns whether all see all.
  __device__ bool logits(float (&x)[2][4], int stage) const {
    const int* notes = reinterpret_cast<const int*>(ring + R::NOTED + stage * R::NOTES);
    const bool all = notes[16] != 0;
    if (all && p.variants == 1 && p.a.softcap == 0.0f && !p.a.slopes) {  // nearly always
      products(x, stage, 0);
      const float factor = p.a.scale * LOG2E;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i / 4][i & 3] *= factor;
    } else {
      special_logits(x, stage, notes, all);
    }
    return all;
  }
  __device__ void special_logits(float (&x)[2][4], int stage, const int* notes, bool all) const {
    int at[2][2];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int2 pair = *reinterpret_cast<const int2*>(notes + tile * 8 + (lane & 3) * 2);
      at[tile][0] = pair.x, at[tile][1] = pair.y;
    }
    turned_products(x, stage, at);
    const hfl_attend& a = p.a;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pos = at[i / 4][i & 1], h = i / 2 & 1;
      float y = x[i / 4][i & 3] * a.scale;
      if (a.softcap != 0.0f) y = a.softcap * (1.0f - 2.0f / (power_of_two(2.0f * LOG2E / a.softcap * y) + 1.0f));
      const float slope = reinterpret_cast<const float*>(shared + R::SLOPES)[(lane >> 2) + h * 8];
      y = (y + slope * static_cast<float>(pos - from[h])) * LOG2E;
      x[i / 4][i & 3] = all || keys.seen(pos, from[h]) ? y : NOTHING;
    }
  }

  // q.k with the queries as they are given in one variant.
  __device__ void products(float (&x)[2][4], int stage, int variant) const {
    const uint4* queries = reinterpret_cast<const uint4*>(shared + R::QUERIES + variant * R::QUERY);
    const unsigned char* slab = ring + R::KEYS + stage * S::BYTES;
    float sums[2][2][4] = {};  // of even and odd steps: two short chains instead of a long one
#pragma unroll (D == 256 ? 2 : D)  // there registers are short
    for (int j = 0; j < D / 4 / S::UNIT_K; ++j) {
      uint32_t words[2][S::WORDS_K];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) S::key_words(words[tile], slab, tile * 8 + (lane >> 2), j, lane & 3);
#pragma unroll
      for (int e = 0; e < S::UNIT_K / 4; ++e) {
        const uint4 q = queries[(j * (S::UNIT_K / 4) + e) * 32 + lane];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          uint32_t b0, b1;
          S::key_operand(b0, b1, words[tile], e);
          S::multiply(sums[e & 1][tile], q, b0, b1);
        }
      }
    }
    const float2* factors = reinterpret_cast<const float2*>(shared + R::FACTORS) + variant * 16 + (lane >> 2);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[tile][i] = sums[0][tile][i] + sums[1][tile][i];
      if constexpr (S::PACKED) {
        const float2 scale = scales(stage, true, tile), zero = zeros(stage, true, tile);
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // a factor undoes the division of the row
          const float2 factor = factors[8 * h];
          x[tile][2 * h] = (x[tile][2 * h] - zero.x * factor.y) * scale.x * factor.x;
          x[tile][2 * h + 1] = (x[tile][2 * h + 1] - zero.y * factor.y) * scale.y * factor.x;
        }
      }
    }
  }

  // q.k where keys stand at lap positions: 0 for keys of the query's own lap, 1 of the lap before, 2 for sinks.
  __device__ int variant(int at, int from_) const {
    if (p.variants == 1) return 0;
    if (at < keys.sink) return 2;
    return lap(from_) > lap(at);
  }
  __device__ int lap(int at) const {
    return max(at - static_cast<int>(p.a.offset), 0) / static_cast<int>(p.a.lap);
  }
  __device__ void turned_products(float (&x)[2][4], int stage, const int (&at)[2][2]) const {
    unsigned present = 0, which = 0;  // a bit for each variant; two bits for each product
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pos = at[i / 4][i & 1], own = from[i / 2 & 1], v = variant(pos, own);
      which |= static_cast<unsigned>(v) << 2 * i;
      if (pos >= 0 && pos <= own) present |= 1u << v;
      x[i / 4][i & 3] = 0.0f;
    }
    present = __reduce_or_sync(0xffffffffu, present);
#pragma unroll 1
    for (unsigned v = 0; v < 3; ++v) {
      if (!(present >> v & 1)) continue;
      float y[2][4];
      products(y, stage, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if ((which >> 2 * i & 3) == v) x[i / 4][i & 3] = y[i / 4][i & 3];
      }
    }
  }

  // Whether there are queries in rows 8 to 15 of the operands; else their weights are zeros.
  __device__ bool lower() const { return unit.rows() > 8; }

  // From logits to weights below 2^LIFT, scaling down what is there where a larger logit has come.
  __device__ void weigh(float (&x)[2][4]) {
    float most[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = NOTHING;
      if (h && !lower()) continue;
      most[h] = fmaxf(fmaxf(x[0][2 * h], x[0][2 * h + 1]), fmaxf(x[1][2 * h], x[1][2 * h + 1]));
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 1));
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffffu, most[h], 2));
    }
    if (__any_sync(0xffffffffu, most[0] > top[0] || most[1] > top[1])) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float higher = fmaxf(most[h], top[h]);
        const float down = higher == NOTHING ? 1.0f : power_of_two(top[h] - higher);
        top[h] = higher, total[h] *= down, shift[h] *= down;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) out[i][2 * h] *= down, out[i][2 * h + 1] *= down;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h && !lower()) {
        x[0][2] = x[0][3] = x[1][2] = x[1][3] = 0.0f;
        continue;
      }
      const float base = (top[h] == NOTHING ? 0.0f : top[h]) - LIFT;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& weight = x[i / 2][2 * h + (i & 1)];
        weight = power_of_two(weight - base);
        total[h] += weight;
      }
    }
  }

  // Weights as an operand: keys 2c, 2c + 1 of tile 0 and 1 are inner places 2c, 2c + 1, 2c + 8, 2c + 9.
  __device__ uint4 weights(const float (&x)[2][4], int stage, bool all) {
    uint32_t pair[2][2];
    if constexpr (S::PACKED) {
      float2 scale[2] = {scales(stage, false, 0), scales(stage, false, 1)};
      float2 zero[2] = {zeros(stage, false, 0), zeros(stage, false, 1)};
      if (!all) {  // beside a key that nobody sees may stand anything
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          if (x[tile][0] == 0.0f && x[tile][2] == 0.0f) scale[tile].x = zero[tile].x = 0.0f;
          if (x[tile][1] == 0.0f && x[tile][3] == 0.0f) scale[tile].y = zero[tile].y = 0.0f;
        }
      }
      const float down = divide_by(fmaxf(fmaxf(scale[0].x, scale[0].y), fmaxf(scale[1].x, scale[1].y)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = i / 2, h = i % 2;
        pair[tile][h] = 0;
        if (h && !lower()) continue;
        pair[tile][h] = pack_f16(x[tile][2 * h] * (scale[tile].x * down), x[tile][2 * h + 1] * (scale[tile].y * down));
        const float2 rounded = unpack_f16(pair[tile][h]);
        shift[h] += rounded.x * zero[tile].x + rounded.y * zero[tile].y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float first = x[i / 2][2 * (i % 2)], second = x[i / 2][2 * (i % 2) + 1];
        pair[i / 2][i % 2] = F == Format::f16 ? pack_f16(first, second) : pack_bf16(first, second);
      }
    }
    return make_uint4(pair[0][0], pair[0][1], pair[1][0], pair[1][1]);
  }

  // Raise the level to the warp's largest scale; returns the factor that brings scales below 2.
  __device__ float divide_by(float scale) {
    const int higher = __reduce_max_sync(0xffffffffu, static_cast<int>(__float_as_uint(scale) >> 23));
    if (higher > level) {
      const float down = __uint_as_float(static_cast<uint32_t>(max(127 + level - higher, 0)) << 23);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i][j] *= down;
      }
      shift[0] *= down, shift[1] *= down;
      level = higher;
    }
    return __uint_as_float(static_cast<uint32_t>(254 - level) << 23);
  }
};

}  // namespace hfl
