// The products of ops.linear_with_delta for few rows: weights and bits straight into registers, for sm_90a.
// delta_streamed.cu says who does what. In code for other architectures the kernel is empty, which shows as one without
// static shared memory.
#pragma once
#include "delta_streamed_parts.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// EACH: rows whose bits come with a quarter of a step, 1 or 4: all of up to 4 or 16 with four.
template <int EACH, bool BF16>
struct Streamer {
  static constexpr int NT = EACH == 4 ? 2 : 1;
  static constexpr bool PLACED = EACH == 4;  // each row's sums have a place of their own, else four share it
  static constexpr bool EARLY = EACH == 1;   // parts are loaded anew as soon as they are used
  struct Batch {
    uint4 weights[4][2], bits[EACH][2];
  };
  const StreamTask& p;
  const StreamBoard& board;
  int origin;                      // the cluster's first tile
  int lane, side;                  // side: of the board, and of what is known of x
  uint32_t x_at, planes_at, some;  // of this phase; some: bit r: row r has bits
  float* deltas;                   // this lane's, 32 apart, as `base`
  StreamShare share;
  float base[NT][4];

  __device__ __forceinline__ int part_of(int tile) const { return (tile >= p.ends[0]) + (tile >= p.ends[1]); }
  __device__ __forceinline__ int output_of(int tile, int part) const {
    return (tile - (part == 0 ? 0 : part == 1 ? p.ends[0] : p.ends[1])) * TILE;
  }

  __device__ __forceinline__ StreamPlace place_of(int tile) const {
    StreamPlace at;
    at.part = part_of(tile);
    const int first = output_of(tile, at.part), outputs = one_of(p.a.outputs, at.part), words = p.a.inputs / WORD;
    const uint16_t* weight = static_cast<const uint16_t*>(one_of(p.a.weight, at.part));
    const int output = min(first + lane / 4, outputs - 1), on = min(8, outputs - 1 - output);
    const int64_t stride = one_of(p.a.weight_r, at.part);
    at.weights = weight + output * stride + share.begin * QUARTER + lane % 4 * 8;
    at.weights_on = on * static_cast<int>(stride);
    at.bits = one_of(p.a.bits, at.part) + static_cast<int64_t>(output) * words + (share.begin + lane % 4) * 4;
    at.bits_on = on * words, at.apart = outputs * words;
    return at;
  }

  __device__ __forceinline__ void load_weight(Batch& to, int i, const StreamPlace& at, int quarter) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      to.weights[i][h] = load_once(at.weights + h * at.weights_on + quarter * QUARTER + i * 32, quarter < share.mine);
    }
  }
  __device__ __forceinline__ void load_row(Batch& to, int e, const StreamPlace& at, int quarter) const {
    const int row = quarter * EACH + e;
    const bool there = (some >> row & 1) && lane % 4 < share.mine;
    const int32_t* from = at.bits + static_cast<int64_t>(board.slots[row]) * at.apart;
#pragma unroll
    for (int h = 0; h < 2; ++h) to.bits[e][h] = bits_if(from + h * at.bits_on, there);
  }
  __device__ __forceinline__ void load_weights(Batch& to, const StreamPlace& at, int quarter) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_weight(to, i, at, quarter);
  }
  __device__ __forceinline__ void load_bits(Batch& to, const StreamPlace& at, int quarter) const {
#pragma unroll
    for (int e = 0; e < EACH; ++e) load_row(to, e, at, quarter);
  }

  // Products of 32 of 128 inputs with the weights. Lane 4 g + t has inputs 8 t to + 7 of output g, and of row g.
  __device__ __forceinline__ void multiply(float (&sums)[NT][4], const Batch& own, int i, int quarter) const {
    const uint4 w = own.weights[i][0], v = own.weights[i][1];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 x = load_shared(x_at + static_cast<uint32_t>(n * 8 * X_BYTES + quarter * QUARTER * 2 + i * 64));
      if (BF16) {
        mma_bf16(sums[n], make_uint4(w.x, v.x, w.y, v.y), x.x, x.y);
        mma_bf16(sums[n], make_uint4(w.z, v.z, w.w, v.w), x.z, x.w);
      } else {
        mma_f16(sums[n], make_uint4(w.x, v.x, w.y, v.y), x.x, x.y);
        mma_f16(sums[n], make_uint4(w.z, v.z, w.w, v.w), x.z, x.w);
      }
    }
  }

  // Sums of a row's whole numbers where its bits are set, over 512 inputs: a lane's share, of outputs g and g + 8.
  __device__ __forceinline__ void count(float (&sum)[2], const uint4 (&bits)[2], int row, float factor) const {
    int both[PLACES / 8][4] = {};
    const uint32_t from = planes_at + static_cast<uint32_t>(row * STEP_BYTES);
#pragma unroll
    for (int n = 0; n < PLACES / 8; ++n) {
      const uint4 x = load_shared(from + static_cast<uint32_t>(n * 512));
      count_both(both[n], bits[0].x, bits[1].x, bits[0].y, bits[1].y, x.x, x.y);
      count_both(both[n], bits[0].z, bits[1].z, bits[0].w, bits[1].w, x.z, x.w);
    }
    const int last = lane % 4 == 3 ? -2 : 2;  // the highest place is worth less than nothing
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int low = both[0][2 * h] + 2 * both[0][2 * h + 1], middle = both[1][2 * h] + 2 * both[1][2 * h + 1],
                high = both[2][2 * h] + last * both[2][2 * h + 1];
      sum[h] = static_cast<float>(low + (middle << 8) + (high << 16)) * factor;
    }
  }

  // A row's share, or nothing where it has no bits.
  __device__ __forceinline__ void count_row(float (&sum)[2], const uint4 (&bits)[2], int row, int part) const {
    sum[0] = sum[1] = 0.0f;
    if (!(some >> row & 1)) return;
    count(sum, bits, row, board.factors[side][part][row] * static_cast<float>(1 << lane % 4 * 2));
  }
  // Two rows' shares, added up over four lanes in two steps: the first lanes get those of the first row.
  __device__ __forceinline__ static float add_far(float low, float high, bool upper) {
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
  }
  __device__ __forceinline__ static float add_near(float even, float odd, bool is_odd) {
    return (is_odd ? odd : even) + __shfl_xor_sync(0xffffffffu, is_odd ? even : odd, 1);
  }

  // Products of a quarter's bits, of the rows from `first` on. Lane t of four gets the sum of row t of four. What was
  // used is loaded anew with `load(e)`.
  template <typename Load>
  __device__ __forceinline__ void add_deltas(const Batch& own, int first, int part, float* of_tile, Load load) {
    const bool upper = lane & 2, odd = lane & 1;
    float low[2], high[2], even[2], sums[2];
    count_row(low, own.bits[0], first, part), load(0);
    if constexpr (EACH == 4) {
      count_row(high, own.bits[2], first + 2, part), load(2);
#pragma unroll
      for (int h = 0; h < 2; ++h) even[h] = add_far(low[h], high[h], upper);
      count_row(low, own.bits[1], first + 1, part), load(1);
      count_row(high, own.bits[3], first + 3, part), load(3);
#pragma unroll
      for (int h = 0; h < 2; ++h) sums[h] = add_near(even[h], add_far(low[h], high[h], upper), odd);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        even[h] = first & 2 ? add_far(0.0f, low[h], upper) : add_far(low[h], 0.0f, upper);
        sums[h] = first & 1 ? add_near(0.0f, even[h], odd) : add_near(even[h], 0.0f, odd);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& to = of_tile[(first / 8 * 4 + first / 4 % 2 + 2 * h) * 32];
      to = PLACED ? sums[h] : to + sums[h];
    }
  }

  // Quarters of a tile in a phase, the first of which is in `own`; then there is that of `next`, and `at` is its place.
  // kept: this lane's sums of the phases before, or NULL.
  __device__ __forceinline__ void run(Batch& own, StreamPlace& at, const StreamWork& now, const StreamWork& next,
                                      const float4* kept) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float4 before = kept ? kept[n * 32] : float4{};
      base[n][0] = before.x, base[n][1] = before.y, base[n][2] = before.z, base[n][3] = before.w;
#pragma unroll
      for (int j = 0; !PLACED && j < 4; ++j) deltas[(n * 4 + j) * 32] = 0.0f;
    }
    const int part = at.part;
#pragma unroll 1
    for (int quarter = now.begin; quarter < now.end; ++quarter) {
      const bool last = quarter + 1 == now.end, more = !last || next.there();
      const int then = last ? next.begin : quarter + 1;
      if (last && more) at = place_of(origin + next.tile);
      float sums[NT][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (quarter < share.mine) multiply(sums, own, i, quarter);
        if constexpr (EARLY) {
          if (more) load_weight(own, i, at, then);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) base[n][j] += sums[n][j];
      add_deltas(own, quarter * EACH, part, deltas - (PLACED ? now.begin * WARP_FLOATS : 0), [&](int e) {
        if constexpr (EARLY) {
          if (more) load_row(own, e, at, then);
        }
      });
      if constexpr (!EARLY) {
        if (more) load_weights(own, at, then), load_bits(own, at, then);
      }
    }
  }

  // Of four warps that do a tile together, the first adds up what all have, products in the order of the quarters.
  // Of a warp's floats the last are for products where the first are for deltas. quarter: this warp's.
  __device__ __forceinline__ void gather(int quarter, int group) {
    constexpr int FIRST = PLACED ? 0 : WARP_FLOATS / 2;
    float4* products = reinterpret_cast<float4*>(deltas - lane + FIRST) + lane;
    if (quarter) {
#pragma unroll
      for (int n = 0; n < NT; ++n) products[n * 32] = make_float4(base[n][0], base[n][1], base[n][2], base[n][3]);
    }
    meet(group);
    if (quarter) return;
#pragma unroll
    for (int other = 1; other < 4; ++other) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float4 more = products[other * (WARP_FLOATS / 4) + n * 32];
        base[n][0] += more.x, base[n][1] += more.y, base[n][2] += more.z, base[n][3] += more.w;
      }
#pragma unroll
      for (int j = 0; !PLACED && j < 4; ++j) deltas[j * 32] += deltas[other * WARP_FLOATS + j * 32];
    }
  }

  // Sums of this rank and phase.
  __device__ __forceinline__ float4 sums_of(int n, int part) const {
    float out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = base[n][j] + (deltas[(n * 4 + j) * 32] - board.minus[side][part][n * 8 + j % 2 * 4 + lane % 4]);
    }
    return make_float4(out[0], out[1], out[2], out[3]);
  }

  // A tile's results, from what the ranks have sent to `from`.
  __device__ __forceinline__ void finish(int tile, uint32_t from) const {
    const int part = part_of(tile), first = output_of(tile, part), outputs = one_of(p.a.outputs, part);
    const uint16_t* bias = static_cast<const uint16_t*>(one_of(p.a.bias, part));
    uint16_t* out = static_cast<uint16_t*>(one_of(p.a.out, part));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float sum[4] = {};
#pragma unroll
      for (int rank = 0; rank < RANKS; ++rank) {
        const uint4 x = load_shared(from + static_cast<uint32_t>((rank * NT + n) * 512 + lane * 16));
        sum[0] += __uint_as_float(x.x), sum[1] += __uint_as_float(x.y);
        sum[2] += __uint_as_float(x.z), sum[3] += __uint_as_float(x.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = n * 8 + j % 2 * 4 + lane % 4, output = first + j / 2 * 8 + lane / 4;
        if (row >= p.a.rows || output >= outputs) continue;
        const float all = bias ? sum[j] + to_float(bias[output], p.a.dtype) : sum[j];
        out[static_cast<int64_t>(row) * outputs + output] = from_float(all, p.a.dtype);
      }
    }
  }
};

#endif

template <int EACH, bool BF16>
__global__ void __launch_bounds__(STREAM_THREADS, 1) streamed_kernel(const __grid_constant__ StreamTask p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char stream_shared[];
  __shared__ StreamBoard board;
  const int rank = static_cast<int>(blockIdx.x) % RANKS, group = static_cast<int>(blockIdx.x) / RANKS,
            groups = static_cast<int>(gridDim.x) / RANKS, lane = lane_of_thread();
  const int warp = __shfl_sync(0xffffffffu, warp_of_thread(), 0);
  const auto border = [&](int i) { return p.first + static_cast<int>(static_cast<int64_t>(p.tiles) * i / groups); };
  const int first = border(group), tiles = border(group + 1) - first, owned = (tiles - rank + RANKS - 1) / RANKS;
  const uint32_t slots = shared_address(stream_shared), kept = static_cast<uint32_t>(p.owned * p.owned_bytes()),
                 deltas = kept + static_cast<uint32_t>(p.owned * p.kept_bytes()),
                 x_at = deltas + static_cast<uint32_t>(p.deltas_bytes());
  if (threadIdx.x == 0) {
    for (int i = 0; i < owned; ++i) barrier_init(board.sent[i], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < owned; ++i) barrier_expect(board.sent[i], p.owned_bytes());
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  using S = Streamer<EACH, BF16>;
  const int g = lane / 4, t = lane % 4;
  const auto x_of = [&](int side) { return stream_shared + x_at + side * p.phase_bytes(); };
  const auto planes_of = [&](int side) { return x_of(side) + p.columns() * X_BYTES; };
  float* const sums_at = reinterpret_cast<float*>(stream_shared + deltas) + warp * WARP_FLOATS + lane;
  S own = {p, board, first, lane, 0, 0, 0, 0, sums_at, StreamShare(p, 0, rank), {}};
  const StreamDeal deal(tiles);
  typename S::Batch batch = {};
  StreamWork now = deal.first(warp);
  StreamPlace place = own.place_of(first + max(now.tile, 0));
  if (now.there()) own.load_weights(batch, place, now.begin);
  wait_for_previous(warp);
  const StreamRow row(p, board);
  row.fetch(p, own.share, x_of(0));
  __syncthreads();
  for (int i = 0; i < STREAM_ROWS; ++i) own.some |= (board.slots[i] >= 0 ? 1u : 0u) << i;
  if (now.there()) own.load_bits(batch, place, now.begin);
  row.know(p, board, 0, own.share, x_of(0), planes_of(0));
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#pragma unroll 1
  for (int phase = 0; phase < p.phases; ++phase) {
    own.side = phase % 2;
    own.x_at = shared_address(x_of(own.side)) + static_cast<uint32_t>((g / 2 + g % 2 * 4) * X_BYTES + t * 16);
    own.planes_at = shared_address(planes_of(own.side)) + static_cast<uint32_t>(lane * 16);
    const bool last = phase + 1 == p.phases;
    const StreamShare ahead(p, min(phase + 1, p.phases - 1), rank);
    if (!last) row.fetch(p, ahead, x_of(1 - own.side));
    if constexpr (!S::EARLY) stagger(warp);
#pragma unroll 1
    for (StreamWork next; now.there(); now = next) {
      next = deal.after(now, warp);
      const int part = place.part;
      const bool together = now.tile >= deal.whole, leads = now.begin == 0;
      float4* before = reinterpret_cast<float4*>(stream_shared + kept) + now.tile * S::NT * 32 + lane;
      if (together) meet(warp / 4);  // nobody reads what they had together before
      own.run(batch, place, now, next, phase && leads ? before : nullptr);
      if (together) own.gather(now.begin, warp / 4);
      if (!leads) continue;
      const int owner = now.tile % RANKS, slot = now.tile / RANKS;
      const uint32_t to = slots + static_cast<uint32_t>(slot * p.owned_bytes() + (rank * S::NT * 32 + lane) * 16);
#pragma unroll
      for (int n = 0; n < S::NT; ++n) {
        const float4 sums = own.sums_of(n, part);
        if (!last) {
          before[n * 32] = sums;
        } else {
          send(over_there(to + static_cast<uint32_t>(n * 512), owner),
               over_there(shared_address(&board.sent[slot]), owner), sums);
        }
      }
    }
    if (last) break;
    now = deal.first(warp), own.share = ahead, place = own.place_of(first + max(now.tile, 0));
    if (now.there()) own.load_weights(batch, place, now.begin), own.load_bits(batch, place, now.begin);
    row.know(p, board, 1 - own.side, ahead, x_of(1 - own.side), planes_of(1 - own.side));
    __syncthreads();
  }
#pragma unroll 1
  for (int slot = warp; slot < owned; slot += STREAM_WARPS) {
    wait_for_cluster(board.sent[slot], 0);
    own.finish(first + slot * RANKS + rank, slots + static_cast<uint32_t>(slot * p.owned_bytes()));
  }
#endif
}

}  // namespace hfl
