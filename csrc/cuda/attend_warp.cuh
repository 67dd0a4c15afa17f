// Decode attention: what one warp does. It walks through slabs of its own, without waiting for the other warps.
#pragma once
#include "attend_logits.cuh"

namespace hfl {

template <int D, Format F>
struct Warp {
  using S = Slab<D, F>;
  using R = Room<D, F>;
  using Found = typename Keys<S::KEYS>::Found;
  // Float16 weights are scaled up, so that those of keys that count little stay within its normal numbers.
  static constexpr float LIFT = F == Format::bf16 ? 0.0f : 10.0f;
  // Binary places by which a logit may exceed `top` before all that was summed up is scaled down.
  static constexpr float SLACK = F == Format::bf16 ? 8.0f : 4.0f;
  static constexpr int WIDTH = S::PACKED ? 1 : 2;  // bytes of what strides of rows count

  const AttendTask& p;
  const Unit& unit;
  const Keys<S::KEYS>& keys;
  unsigned char* ring;
  Logits<D, F> logits;
  const unsigned char *k, *v;        // rows of the head
  Found next;                        // of the slab after those in the ring
  const unsigned char *sides = nullptr;  // plain: of lane's eight keys, scales and zeros of keys, then of values
  int lane;
  int step = R::WARPS;               // slabs from one that the warp attends to to the next
  int eights = -1;                   // packed: columns that 8 keys, those of group lane % 4, lie at begin here
  float out[D / 16][4];              // channels g of eights 2i and 2i + 1, queries 2c and 2c + 1
  float base[2], limit[2];           // a logit near the largest, less LIFT; what a logit, less `base`, may be
  float total[2], shift[2];          // sums of weights and, packed, of weights * zeros
  int level = 0;                     // packed: out and shift are divided by 2^(level - 127), the largest scale so far

  __device__ Warp(const AttendTask& p_, const Unit& unit_, const Keys<S::KEYS>& keys_, unsigned char* shared, int warp,
                  int lane_)
      : p(p_), unit(unit_), keys(keys_), ring(shared + warp * R::WARP), logits{p_, keys_, shared, ring, lane_},
        lane(lane_) {
    k = rows_of(p.a.k), v = rows_of(p.a.v);
#pragma unroll
    for (int j = 0; j < 2; ++j) limit[j] = NOTHING, base[j] = -LIFT, total[j] = shift[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  }

  __device__ Found find(int slab, int end) const { return slab < end ? keys.find(p, slab, lane) : Found{-1, -1}; }

  // Whether all rows from the first to the last that is seen follow on each other, so that nothing needs to be noted.
  __device__ bool plain() const {
    return !keys.listed() && keys.low < keys.window && stride(p.a.k) == S::ROW && stride(p.a.v) == S::ROW;
  }

  // Fill the ring with slabs slab, slab + step, ... below `end`, which were found unless this is plain.
  __device__ void begin(int slab, int end, const Found (&found)[R::STAGES]) {
    if (plain()) {
      k += static_cast<int64_t>(slab) * S::BYTES + lane * 16, v += static_cast<int64_t>(slab) * S::BYTES + lane * 16;
      if constexpr (S::PACKED) {
        const __half* from = sides_of(lane & 8 ? p.a.v : p.a.k) + slab * S::KEYS + lane % 4 * 8;
        sides = reinterpret_cast<const unsigned char*>(from);
      }
#pragma unroll 1
      for (int i = 0; i < R::STAGES; ++i) copy_plain(i, slab + i * step, end);
      return;
    }
#pragma unroll
    for (int i = 0; i < R::STAGES; ++i) {
      copy<true, true>(i, slab + i * step, end, found[i], -1);
    }
    next = find(slab + R::STAGES * step, end);
  }

  // Attend to those slabs; the queries are in shared memory.
  __device__ void walk(int slab, int end) {
    if (plain()) {
      walk_plain(slab, end);
    } else {
      walk_noted(slab, end);
    }
    copy_wait<0>();
    const float up = __uint_as_float(static_cast<uint32_t>(level) << 23);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      total[j] = over_keys(total[j]);
      if constexpr (S::PACKED) {
        shift[j] = over_keys(shift[j]);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          out[i][j] = (out[i][j] - shift[j]) * up, out[i][2 + j] = (out[i][2 + j] - shift[j]) * up;
        }
      }
    }
  }

  // The largest logit of a query that the warp has seen.
  __device__ float top(int j) const { return limit[j] == NOTHING ? NOTHING : base[j] + LIFT; }

 private:
  __device__ const unsigned char* rows_of(const hfl_rows& rows) const {
    return static_cast<const unsigned char*>(rows.data) + (unit.batch * rows.b + unit.kv_head * rows.h) * WIDTH;
  }
  __device__ const __half* sides_of(const hfl_rows& rows) const {
    return static_cast<const __half*>(lane & 4 ? rows.zero : rows.scale) + unit.batch * rows.scale_b +
           unit.kv_head * rows.scale_h;
  }
  __device__ static float over_keys(float x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  __device__ void walk_noted(int slab, int end) {
    for (int stage = 0; slab < end; slab += step, stage = stage + 1 == R::STAGES ? 0 : stage + 1) {
      copy_wait<2 * R::STAGES - 1>();
      __syncwarp();
      float x[S::TILES][4];
      const bool all = logits.template compute<true>(x, stage, 0, base);
      bool missing = false;
      if constexpr (S::PACKED) missing = !all && logits.template missing<true>(stage, 0);
      __syncwarp();  // all lanes have read the keys: others may take their place
      const int ahead = slab + R::STAGES * step;
      const int column = copy<true, false>(stage, ahead, end, next, -1);
      next = find(ahead + step, end);
      weigh(x);
      copy_wait<2 * R::STAGES - 1>();
      __syncwarp();
      if constexpr (S::PACKED) {
        if (!all) logits.clear(stage, missing);
      }
      add_values(x, stage);
      __syncwarp();
      copy<false, true>(stage, ahead, end, next, column);
    }
  }

  __device__ void walk_plain(int slab, int end) {
    for (int stage = 0; slab < end; slab += step, stage = stage + 1 == R::STAGES ? 0 : stage + 1) {
      copy_wait<2 * R::STAGES - 2>();
      __syncwarp();
      float x[S::TILES][4];
      const bool all = logits.template compute<false>(x, stage, slab * S::KEYS, base);
      if constexpr (S::PACKED) {
        if (!all) logits.clear(stage, logits.template missing<false>(stage, slab * S::KEYS));
      }
      weigh(x);
      add_values(x, stage);
      __syncwarp();
      copy_plain(stage, slab + R::STAGES * step, end);
    }
  }

  __device__ void add_values(const float (&x)[S::TILES][4], int stage) {
    uint32_t weights[2 * S::TILES];
    if constexpr (S::PACKED) {
      scale(weights, x, stage);
      S::add_packed(out, weights, shared_address(ring) + R::VALUES + stage * S::BYTES, lane);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float first = x[0][i * 2], second = x[0][i * 2 + 1];
        weights[i] = transpose(F == Format::f16 ? pack_f16(first, second) : pack_bf16(first, second));
      }
      S::add_values(out, weights[0], weights[1], ring + R::VALUES + stage * S::BYTES, lane);
    }
  }

  // Begin to copy the warp's next slab, or nothing beyond the end, where keys follow on each other; as two groups.
  __device__ void copy_plain(int stage, int slab, int end) {
    if (slab < end) {
      const int there = keys.end - slab * S::KEYS;
      if (p.turn.appended && keys.high - slab * S::KEYS < S::KEYS) wait_for_token();
      const uint32_t to = shared_address(ring) + stage * S::BYTES;
      if (there >= S::KEYS) {
        S::template copy_rows<true, false>(to + R::KEYS, k, there, lane);
        S::template copy_rows<true, true>(to + R::VALUES, v, there, lane);
      } else {
        S::template copy_rows<false, false>(to + R::KEYS, k, there, lane);
        S::template copy_rows<false, true>(to + R::VALUES, v, there, lane);
      }
      if constexpr (S::PACKED) {
        if (lane < 16 && lane % 4 * 8 < there) {
          copy_async(shared_address(ring) + R::SIDES + stage * R::SIDE + lane * 16, sides, true);
        }
        sides += step * S::KEYS * 2;
      }
      k += step * S::BYTES, v += step * S::BYTES;
    }
    copy_commit();
    copy_commit();
  }
  __device__ void wait_for_token() const {
    if (lane == 0) wait_until(p.turn.appended + unit.batch * p.a.kv_heads + unit.kv_head, 1);
    __syncwarp();
  }

  // Begin to copy a slab's keys, its values or both, or nothing beyond the end; one group for each. Returns the column
  // of key l % KEYS, which those who copy values only give.
  template <bool OF_KEYS, bool OF_VALUES>
  __device__ int copy(int stage, int slab, int end, const Found& found, int column) {
    if (slab < end) {
      if (OF_KEYS) column = note(stage, slab, found);
      S::template copy<OF_KEYS, OF_VALUES>(ring + R::KEYS + stage * S::BYTES, k, stride(p.a.k),
                                           ring + R::VALUES + stage * S::BYTES, v, stride(p.a.v), column, lane);
      if constexpr (S::PACKED) {
        unsigned char* sides = ring + R::SIDES + stage * R::SIDE + lane * 16;
        if (OF_KEYS && lane < 8) copy_async(sides, sides_of(p.a.k) + max(eights, 0), eights >= 0);
        if (OF_VALUES && lane < 8) copy_async(sides + R::SIDE / 2, sides_of(p.a.v) + max(eights, 0), eights >= 0);
      }
    }
    if (OF_KEYS) copy_commit();
    if (OF_VALUES) copy_commit();
    return column;
  }
  __device__ static uint32_t stride(const hfl_rows& rows) { return static_cast<uint32_t>(rows.t) * WIDTH; }

  // Write down the positions of a slab's keys; returns their columns.
  __device__ int note(int stage, int slab, const Found& found) {
    const int2 place = keys.place(p, slab, found, lane);
    if (p.turn.appended && __any_sync(0xffffffffu, place.y == keys.high && place.y >= 0)) {  // the step's own token
      wait_for_token();
    }
    int* notes = reinterpret_cast<int*>(ring + R::NOTED + stage * R::NOTES);
    const int all = __all_sync(0xffffffffu, keys.seen_by_all(place.y));
    if (lane < S::KEYS) notes[lane] = place.y;
    if (lane == 0) notes[S::KEYS] = all;
    if constexpr (S::PACKED) {  // any key that is there tells where its eight begin
      const unsigned there = __ballot_sync(0xffffffffu, place.x >= 0) >> (lane & 3) * 8 & 0xffu;
      const int which = there ? __ffs(static_cast<int>(there)) - 1 : 0;
      const int one = __shfl_sync(0xffffffffu, place.x, (lane & 3) * 8 + which);
      eights = one < 0 ? -1 : one & ~7;
    }
    return place.x;
  }

  // From logits, less `base`, to weights of at most 2^(LIFT + SLACK), scaling down what is there where a much larger
  // one has come.
  __device__ void weigh(float (&x)[S::TILES][4]) {
    float most[2] = {NOTHING, NOTHING};
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) most[i & 1] = fmaxf(most[i & 1], x[i / 4][i & 3]);
    if (__any_sync(0xffffffffu, most[0] > limit[0] || most[1] > limit[1])) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) most[j] = fmaxf(most[j], __shfl_xor_sync(0xffffffffu, most[j], step));
        const float before = top(j), higher = fmaxf(most[j] + base[j], before);
        const float down = higher == NOTHING ? 1.0f : power_of_two(before - higher);
        const float less = (higher == NOTHING ? 0.0f : higher) - LIFT - base[j];
        base[j] += less, limit[j] = higher == NOTHING ? NOTHING : LIFT + SLACK;
        total[j] *= down, shift[j] *= down;
#pragma unroll
        for (int i = 0; i < 2 * S::TILES; ++i) x[i / 2][i % 2 * 2 + j] -= less;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) out[i][j] *= down, out[i][2 + j] *= down;
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * S::TILES; ++i) {
      float& weight = x[i / 4][i & 3];
      weight = power_of_two(weight);
      total[i & 1] += weight;
    }
  }

  // Weights times scales of values, as operands, two for each 16 keys.
  __device__ void scale(uint32_t (&to)[2 * S::TILES], const float (&x)[S::TILES][4], int stage) {
    typename Logits<D, F>::Sides scale, zero;
    logits.sides(scale, stage, true, false), logits.sides(zero, stage, true, true);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * S::TILES; ++i) {
      zero[i] -= S::CENTRE;
      most = fmaxf(most, scale[i]);
    }
    if (__any_sync(0xffffffffu, most * divisor() >= 2.0f)) raise(most);
    const float down = divisor();
#pragma unroll
    for (int i = 0; i < 2 * S::TILES; ++i) {
      const float first = x[i / 2][i % 2 * 2] * (scale[i] * down), second = x[i / 2][i % 2 * 2 + 1] * (scale[i] * down);
      shift[0] += first * zero[i], shift[1] += second * zero[i];
      to[i] = transpose(pack_f16(first, second));
    }
  }

  // What brings scales below 2.
  __device__ float divisor() const { return __uint_as_float(static_cast<uint32_t>(254 - level) << 23); }
  // Raise the level to the warp's largest scale.
  __device__ void raise(float scale) {
    const int higher = __reduce_max_sync(0xffffffffu, static_cast<int>(__float_as_uint(scale) >> 23));
    const float down = __uint_as_float(static_cast<uint32_t>(max(127 + level - higher, 0)) << 23);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] *= down;
    }
    shift[0] *= down, shift[1] *= down;
    level = higher;
  }
};

}  // namespace hfl
