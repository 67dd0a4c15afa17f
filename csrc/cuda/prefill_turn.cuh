// Prefill attention over keys at lap positions: which tiles a pass over them reads, and how much rows are turned in it.
#pragma once
#include "prefill.cuh"

namespace hfl {

// Queries meet keys in up to two passes over their tiles, each with queries turned in one way. `first`: where keys stand
// at lap positions, over the sinks, which are seen from elsewhere, or over keys beyond the clamped distance, brought to
// position 0. Then over the others, all at lap `base`: that of the last query. (reference/weigh.py turns likewise.)
template <int ROWS, int KEYS>
struct Turning {
  using Keys = Walk<ROWS, KEYS>;
  int lap, offset, clamp, base;  // lap 0: nothing is turned, in one pass; clamp 0: distances are as they are
  int below, from;               // first: tiles that begin below; else: that end after

  // By one thread, once keys are prepared.
  __device__ void prepare(const hfl_prefill& a, const Keys& keys) {
    lap = static_cast<int>(a.lap), offset = static_cast<int>(a.offset), clamp = static_cast<int>(a.clamp);
    base = lap ? laps(keys.high) : 0;
    below = from = lap ? keys.sink : 0;
    if (lap && clamp) {
      below = a.k_pos ? INT_MAX : keys.high - clamp, from = a.k_pos ? 0 : keys.low - clamp;
    }
  }

  __device__ bool reads(const KeyTile& tile, bool first) const {
    return first ? tile.position < below : tile.position > from - KEYS;
  }

  // A query sees keys from `least` to `most`, as far as the window lets it.
  __device__ int least(bool first, int query) const {
    return first || !lap ? 0 : clamp ? max(query - clamp, 0) : from;
  }
  __device__ int most(bool first, int query) const {
    return !first ? query : clamp ? query - clamp - 1 : min(query, below - 1);
  }

  // By how many positions rows are turned. sink_pos: from where the query sees the sinks.
  __device__ int of_key(bool first, int place) const {
    if (!first) return (laps(place) - base) * lap;
    return clamp ? laps(place) * lap - place : 0;
  }
  __device__ int of_query(bool first, int place, int sink_pos) const {
    if (!first) return (laps(place) - base) * lap;
    return (clamp ? clamp : sink_pos) - (place - laps(place) * lap);
  }

 private:
  __device__ int laps(int place) const { return max(place - offset, 0) / lap; }
};

// Rotary frequencies in turns for each position, in two parts: what is lost of a product with the first is made good.
// Pairs of numbers are turned 8 at a time, out of two chunks of 8 numbers of a row.
template <int D>
struct Frequencies {
  static constexpr int UNITS = D / 16;  // pairs of chunks
  float2 parts[D / 2];
  int pairs, interleaved;

  // All threads of the block.
  __device__ void prepare(const hfl_prefill& a) {
    if (threadIdx.x == 0) pairs = a.lap ? a.pairs : 0, interleaved = a.interleaved;
    if (!a.lap) return;
    for (int i = threadIdx.x; i < a.pairs; i += blockDim.x) {
      const double turns = a.inv_freq[i] * 0.15915494309189534;
      const float most = static_cast<float>(turns);
      parts[i] = make_float2(most, static_cast<float>(turns - most));
    }
  }

  __device__ bool turns(int unit) const { return unit * 8 < pairs; }

  // The chunks of a unit.
  __device__ int2 chunks(int unit) const {
    const int half = pairs / 8;
    if (interleaved || unit >= half) return make_int2(2 * unit, 2 * unit + 1);
    return make_int2(unit, unit + half);
  }

  __device__ __forceinline__ void turn(float (&a)[8], float (&b)[8], int unit, int delta) const {
    const float by = static_cast<float>(delta);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pairs (a, b) of the same places; or neighbours, those of a and then those of b
      if (interleaved) {
        turn(a[2 * i], a[2 * i + 1], parts[unit * 8 + i], by);
        turn(b[2 * i], b[2 * i + 1], parts[unit * 8 + 4 + i], by);
      } else {
        turn(a[i], b[i], parts[unit * 8 + i], by);
        turn(a[i + 4], b[i + 4], parts[unit * 8 + 4 + i], by);
      }
    }
  }

 private:
  __device__ __forceinline__ static void turn(float& x, float& y, float2 frequency, float by) {
    constexpr float TURN = 6.28318530717958648f;
    const float turns = by * frequency.x, lost = fmaf(by, frequency.y, fmaf(by, frequency.x, -turns));
    float sin, cos;
    __sincosf((turns - rintf(turns) + lost) * TURN, &sin, &cos);
    const float old = x;
    x = old * cos - y * sin, y = y * cos + old * sin;
  }
};

}  // namespace hfl
