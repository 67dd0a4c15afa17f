// The products of ops.linear_with_delta for few rows: weights and bits by way of a ring in shared memory, for sm_90a.
// delta_streamed.cu says who does what.
#pragma once
#include "delta_streamed_parts.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// EACH: rows whose bits come with a quarter, 1 or 4: all of up to 4 or 16 with four. DEEP: chunks of a warp that are on
// their way: a quarter has four of weights, and one of the bits of each of its rows.
template <int EACH, int DEEP, bool BF16>
struct Streamer {
  static constexpr int NT = EACH == 4 ? 2 : 1, CHUNKS = 4 + EACH;
  // The first of what is asked for are weights, wherever the rows' slots are; and what is asked for beside a quarter's
  // first chunk is there after the quarter.
  static_assert(DEEP <= 4 && DEEP < CHUNKS);
  const StreamTask& p;
  const StreamBoard& board;
  int first;      // the cluster's first tile
  int warp, lane;
  uint32_t ring, at;   // this lane's part of the ring, and of the chunk that is used next
  uint32_t x, planes;  // of the phase
  uint32_t some;       // bit r: row r has bits
  int side;            // of the board
  float products[NT][4], deltas[NT][4];

  __device__ __forceinline__ int part_of(int tile) const { return (tile >= p.ends[0]) + (tile >= p.ends[1]); }
  __device__ __forceinline__ int output_of(int tile, int part) const {
    return (tile - (part == 0 ? 0 : part == 1 ? p.ends[0] : p.ends[1])) * TILE;
  }

  __device__ __forceinline__ StreamPlace place_of(const StreamStep& step) const {
    const StreamShare share(p, min(step.phase, p.phases - 1), rank_here());
    const int tile = first + step.tile;
    StreamPlace to;
    to.part = part_of(tile), to.mine = step.phase < p.phases ? share.mine : 0;
    const int begin = output_of(tile, to.part), outputs = one_of(p.a.outputs, to.part), words = p.a.inputs / WORD;
    const uint16_t* weight = static_cast<const uint16_t*>(one_of(p.a.weight, to.part));
    const int output = min(begin + lane / 4, outputs - 1), on = min(8, outputs - 1 - output);
    const int64_t stride = one_of(p.a.weight_r, to.part);
    to.weights = weight + output * stride + share.begin * QUARTER + lane % 4 * 8;
    to.weights_on = on * static_cast<int>(stride);
    to.bits = one_of(p.a.bits, to.part) + static_cast<int64_t>(output) * words + (share.begin + lane % 4) * 4;
    to.bits_on = on * words, to.apart = outputs * words;
    return to;
  }

  // A row's place among the chunks: those that are added up first come first.
  __device__ __forceinline__ static constexpr int row_of(int chunk) {
    return EACH == 1 ? 0 : (chunk - 4) / 2 + (chunk - 4) % 2 * 2;
  }
  // A chunk of a quarter on its way: of each lane 16 bytes of two outputs.
  __device__ __forceinline__ void ask(uint32_t to, const StreamPlace& from, int quarter, int chunk) const {
    if (chunk < 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        copy_once(to + static_cast<uint32_t>(h * 512),
                  from.weights + h * from.weights_on + quarter * QUARTER + chunk * 32, quarter < from.mine);
      }
    } else {
      const int slot = board.slots[quarter * EACH + row_of(chunk)];
      const bool there = slot >= 0 && lane % 4 < from.mine;
      const int32_t* bits = from.bits + static_cast<int64_t>(max(slot, 0)) * from.apart;
#pragma unroll
      for (int h = 0; h < 2; ++h) copy_once(to + static_cast<uint32_t>(h * 512), bits + h * from.bits_on, there);
    }
    copy_commit();
  }
  __device__ __forceinline__ void ask_first(const StreamPlace& from, int quarter) const {
#pragma unroll
    for (int chunk = 0; chunk < DEEP; ++chunk) {
      ask(ring + static_cast<uint32_t>(chunk * CHUNK_BYTES), from, quarter, chunk);
    }
  }
  // A tile of the first phase on its way to the L2, for all ranks: each brings the weights of two of its outputs, and
  // where bits lie together those of two rows.
  __device__ __forceinline__ void bring_tile_near(int tile, const StreamRow& row) const {
    constexpr int EACH_NEAR = TILE / RANKS;
    const int part = part_of(tile), begin = output_of(tile, part), outputs = one_of(p.a.outputs, part);
    const int own = rank_here() * EACH_NEAR + lane % EACH_NEAR, slot = row.slot_of(own), words = p.a.inputs / WORD;
    if (lane >= EACH_NEAR) return;
    if (begin + own < outputs) {
      const uint16_t* weight = static_cast<const uint16_t*>(one_of(p.a.weight, part));
      bring_near(weight + (begin + own) * one_of(p.a.weight_r, part), min(p.a.inputs, PHASE * QUARTER) * 2);
    }
    if (p.phases == 1 && begin + TILE <= outputs && slot >= 0 && slot < p.a.slots) {
      bring_near(one_of(p.a.bits, part) + (static_cast<int64_t>(slot) * outputs + begin) * words, TILE * words * 4);
    }
  }
  // The next chunk, once it is there; and when it is used, what takes its place: chunk - CHUNKS of a quarter `then`.
  __device__ __forceinline__ void take(uint4 (&own)[2]) const {
    copy_wait<DEEP - 1>();
    own[0] = load_shared(at), own[1] = load_shared(at + 512);
  }
  __device__ __forceinline__ void refill(int chunk, int quarter, const StreamPlace& here, int then,
                                         const StreamPlace& there) {
    if (chunk < CHUNKS) {
      ask(at, here, quarter, chunk);
    } else {
      ask(at, there, then, chunk - CHUNKS);
    }
    at += CHUNK_BYTES;
    if (at == ring + DEEP * CHUNK_BYTES) at = ring;
  }

  // Products of 32 of 128 inputs with the weights. Lane 4 g + t has inputs 8 t to + 7 of output g, and of row g.
  __device__ __forceinline__ void multiply(float (&sums)[NT][4], const uint4 (&own)[2], int i, int quarter) const {
    const uint4 w = own[0], v = own[1];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 b = load_shared(x + static_cast<uint32_t>(n * 8 * X_BYTES + quarter * QUARTER * 2 + i * 64));
      if (BF16) {
        mma_bf16(sums[n], make_uint4(w.x, v.x, w.y, v.y), b.x, b.y);
        mma_bf16(sums[n], make_uint4(w.z, v.z, w.w, v.w), b.z, b.w);
      } else {
        mma_f16(sums[n], make_uint4(w.x, v.x, w.y, v.y), b.x, b.y);
        mma_f16(sums[n], make_uint4(w.z, v.z, w.w, v.w), b.z, b.w);
      }
    }
  }

  // Sums of a row's whole numbers where its bits are set, over 512 inputs: a lane's share, of outputs g and g + 8.
  __device__ __forceinline__ void count(float (&sum)[2], const uint4 (&bits)[2], int row, int part) const {
    int both[PLACES / 8][4] = {};
#pragma unroll
    for (int n = 0; n < PLACES / 8; ++n) {
      const uint4 b = load_shared(planes + static_cast<uint32_t>(row * STEP_BYTES + n * 512));
      count_both(both[n], bits[0].x, bits[1].x, bits[0].y, bits[1].y, b.x, b.y);
      count_both(both[n], bits[0].z, bits[1].z, bits[0].w, bits[1].w, b.z, b.w);
    }
    const float factor = board.factors[side][part][row] * static_cast<float>(1 << lane % 4 * 2);
    const int last = lane % 4 == 3 ? -2 : 2;  // the highest place is worth less than nothing
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int low = both[0][2 * h] + 2 * both[0][2 * h + 1], middle = both[1][2 * h] + 2 * both[1][2 * h + 1],
                high = both[2][2 * h] + last * both[2][2 * h + 1];
      sum[h] = static_cast<float>(low + (middle << 8) + (high << 16)) * factor;
    }
  }

  // Two rows' shares, added up over four lanes in two steps: the first lanes get those of the first row.
  __device__ __forceinline__ static float add_far(float low, float high, bool upper) {
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
  }
  __device__ __forceinline__ static float add_near(float even, float odd, bool is_odd) {
    return (is_odd ? odd : even) + __shfl_xor_sync(0xffffffffu, is_odd ? even : odd, 1);
  }
  // Sums of a quarter's bits, of four rows or one: lane t of four gets that of row t of four.
  __device__ __forceinline__ void add_deltas(const float (&shares)[EACH][2], int quarter) {
    const bool upper = lane & 2, odd = lane & 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (EACH == 4) {
        const float even = add_far(shares[0][h], shares[2][h], upper);
        const float sum = add_near(even, add_far(shares[1][h], shares[3][h], upper), odd);
#pragma unroll
        for (int q = 0; q < 4; ++q) deltas[q / 2][q % 2 + 2 * h] = q == quarter ? sum : deltas[q / 2][q % 2 + 2 * h];
      } else {
        const float even = quarter & 2 ? add_far(0.0f, shares[0][h], upper) : add_far(shares[0][h], 0.0f, upper);
        deltas[0][2 * h] += quarter & 1 ? add_near(0.0f, even, odd) : add_near(even, 0.0f, odd);
      }
    }
  }

  // A quarter of a tile, and what it takes to be used next on its way: quarter `then` of `there`.
  __device__ __forceinline__ void run(const StreamStep& now, const StreamPlace& here, int then,
                                      const StreamPlace& there) {
    const int quarter = now.quarter;
    float sums[NT][4] = {}, shares[EACH][2];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      uint4 own[2];
      take(own);
      if (chunk < 4) {
        if (quarter < here.mine) multiply(sums, own, chunk, quarter);
      } else {
        const int row = quarter * EACH + row_of(chunk);
        float(&share)[2] = shares[row_of(chunk)];
        share[0] = share[1] = 0.0f;
        if (some >> row & 1) count(share, own, row, here.part);
      }
      refill(chunk + DEEP, quarter, here, then, there);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) products[n][j] += sums[n][j];
    add_deltas(shares, quarter);
  }

  // Sums begin with those of the phases before, or nothing.
  __device__ __forceinline__ void begin(const float4* kept) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float4 before = kept ? kept[n * 32] : float4{};
      products[n][0] = before.x, products[n][1] = before.y, products[n][2] = before.z, products[n][3] = before.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) deltas[n][j] = 0.0f;
    }
  }

  // Of four warps that do a tile together, the first adds up what all have, products in the order of the quarters.
  // quarter: this warp's; told: of these four.
  __device__ __forceinline__ void gather(int quarter, unsigned char* told) {
    float4* own = reinterpret_cast<float4*>(told + (quarter - 1) * p.told_bytes()) + lane;
    if (quarter) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        own[n * 32] = make_float4(products[n][0], products[n][1], products[n][2], products[n][3]);
      }
      float2* delta = reinterpret_cast<float2*>(own - lane + NT * 32) + lane;
      if constexpr (EACH == 4) {
        *delta = quarter == 1 ? make_float2(deltas[0][1], deltas[0][3])
                 : quarter == 2 ? make_float2(deltas[NT - 1][0], deltas[NT - 1][2])
                                : make_float2(deltas[NT - 1][1], deltas[NT - 1][3]);
      } else {
        *delta = make_float2(deltas[0][0], deltas[0][2]);
      }
    }
    meet(warp / 4);
    if (!quarter) {
#pragma unroll
      for (int other = 1; other < 4; ++other) {
        const float4* from = reinterpret_cast<const float4*>(told + (other - 1) * p.told_bytes()) + lane;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float4 more = from[n * 32];
          products[n][0] += more.x, products[n][1] += more.y, products[n][2] += more.z, products[n][3] += more.w;
        }
        const float2 delta = reinterpret_cast<const float2*>(from - lane + NT * 32)[lane];
        constexpr bool PLACED = EACH == 4;
        const int n = PLACED ? other / 2 : 0, j = PLACED ? other % 2 : 0;
        deltas[n][j] += delta.x, deltas[n][j + 2] += delta.y;
      }
    }
    meet(warp / 4);  // nobody tells more before it is read
  }

  // Sums of this rank and phase.
  __device__ __forceinline__ float4 sums_of(int n, int part) const {
    float out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = products[n][j] + (deltas[n][j] - board.minus[side][part][n * 8 + j % 2 * 4 + lane % 4]);
    }
    return make_float4(out[0], out[1], out[2], out[3]);
  }

  // A tile's results, from what the ranks have sent to `from`.
  __device__ __forceinline__ void finish(int tile, uint32_t from) const {
    const int part = part_of(tile), begin = output_of(tile, part), outputs = one_of(p.a.outputs, part);
    const uint16_t* bias = static_cast<const uint16_t*>(one_of(p.a.bias, part));
    uint16_t* out = static_cast<uint16_t*>(one_of(p.a.out, part));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float sum[4] = {};
#pragma unroll
      for (int r = 0; r < RANKS; ++r) {
        const uint4 part_sum = load_shared(from + static_cast<uint32_t>((r * NT + n) * 512 + lane * 16));
        sum[0] += __uint_as_float(part_sum.x), sum[1] += __uint_as_float(part_sum.y);
        sum[2] += __uint_as_float(part_sum.z), sum[3] += __uint_as_float(part_sum.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = n * 8 + j % 2 * 4 + lane % 4, output = begin + j / 2 * 8 + lane / 4;
        if (row >= p.a.rows || output >= outputs) continue;
        const float all = bias ? sum[j] + to_float(bias[output], p.a.dtype) : sum[j];
        out[static_cast<int64_t>(row) * outputs + output] = from_float(all, p.a.dtype);
      }
    }
  }
};

#endif

}  // namespace hfl
