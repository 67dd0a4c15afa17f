// The products of ops.linear_with_delta for few rows: weights and bits straight into registers, for sm_90a.
// delta_streamed.cu says who does what. In code for other architectures the kernel is empty, which shows as one without
// static shared memory.
#pragma once
#include "../streamed.h"
#include "delta_rows.cuh"
#include "wgmma.cuh"

namespace hfl {

constexpr int RANKS = 8, STREAM_WARPS = 8, STREAM_THREADS = STREAM_WARPS * 32, STREAM_ROWS = HFL_STREAMED_ROWS;
constexpr int TILE = 16, QUARTER = 128, STEP = 4 * QUARTER, PLACES = 24, STEP_BYTES = PLACES * STEP / 8;
constexpr int MOST_OWNED = 64, AHEAD = STEP;  // AHEAD: inputs of a warp's first weights that go to the L2 early

struct StreamTask {
  hfl_streamed a;
  int32_t quarters, each, steps;  // of all inputs, and of a rank; steps of a rank
  int32_t first, tiles, owned;    // of this launch: the first tile, how many; most of them that a block sums up
  int32_t ends[HFL_STREAMED_PARTS];  // tiles up to the end of each part
  uint32_t* planes;                  // [R, RANKS, steps, PLACES, STEP / 32], bits of whole numbers, as RowUnit makes them
  int32_t* sums;                     // [R, quarters], of these numbers
  float* units;                      // [R]
  int64_t scratch_bytes;

  explicit StreamTask(const hfl_streamed& a_)
      : a(a_), quarters(a_.inputs / QUARTER), each((quarters + RANKS - 1) / RANKS), steps((each + 3) / 4), first(0),
        tiles(0), owned(0) {
    for (int p = 0; p < HFL_STREAMED_PARTS; ++p) {
      if (p < a.parts) tiles += (a.outputs[p] + TILE - 1) / TILE;
      ends[p] = tiles;
    }
    char* at = static_cast<char*>(a.scratch);
    const int64_t rows = a.rows, of_planes = rows * RANKS * steps * STEP_BYTES, of_sums = rows * quarters * 4;
    planes = reinterpret_cast<uint32_t*>(at), sums = reinterpret_cast<int32_t*>(at + of_planes);
    units = reinterpret_cast<float*>(at + of_planes + of_sums);
    scratch_bytes = of_planes + of_sums + rows * 4;
  }
  // Columns of results, of rows in memory; bytes of what a block knows of x, and of each tile that it sums up.
  __host__ __device__ int columns() const { return a.rows > 8 ? 16 : 8; }
  __host__ __device__ int x_bytes() const { return each * QUARTER * 2 + 16; }
  __host__ __device__ int known_bytes() const { return columns() * x_bytes() + a.rows * steps * STEP_BYTES; }
  __host__ __device__ int owned_bytes() const { return RANKS * TILE * columns() * 4; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// c[16, 8] += how many bits of a[16, 256] and b[256, 8] are both set
__device__ __forceinline__ void count_both(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes, or zeros; then nothing is read. The first are read once, the others perhaps by several rows.
__device__ __forceinline__ uint4 weights_if(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return x;
}
__device__ __forceinline__ uint4 bits_if(const void* from, bool there) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(there)));
  return x;
}
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t over_there(uint32_t at, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}
// Four floats to there, counted by a barrier there.
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, float x, float y, float z, float w) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(x), "f"(y), "f"(z), "f"(w), "r"(bar)
               : "memory");
}
// As barrier_wait, for what other blocks of the cluster have sent.
__device__ __forceinline__ void wait_for_cluster(uint64_t& bar, int parity) {
  asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra wait;\n}" ::"r"(shared_address(&bar)), "r"(parity)
               : "memory");
}

// What all warps of a block know.
struct StreamBoard {
  uint64_t sent[MOST_OWNED];
  int slots[STREAM_ROWS];
  float factors[HFL_STREAMED_PARTS][STREAM_ROWS];  // worth of a whole number of the row, times the scale, twice
  float minus[HFL_STREAMED_PARTS][STREAM_ROWS];    // of this rank's inputs without signs
};

// Where a lane's first weights and bits of a tile lie, of two outputs 8 apart.
struct StreamPlace {
  const uint16_t* weights[2];
  const int32_t* bits[2];
  int64_t apart;  // words from slot to slot
  int part;
};

template <typename T>
__device__ __forceinline__ T one_of(const T (&x)[HFL_STREAMED_PARTS], int part) {
  return part == 0 ? x[0] : part == 1 ? x[1] : x[2];
}

// EACH: rows whose bits come with a quarter of a step: all of them with four.
template <int EACH, bool BF16>
struct Streamer {
  static constexpr int NT = EACH > 2 ? 2 : 1;
  struct Batch {
    uint4 weights[4][2], bits[EACH][2];
  };
  const StreamTask& p;
  const StreamBoard& board;
  int lane, begin, mine;          // quarters: the first, and how many are this rank's
  uint32_t x_at, planes_at, some;  // some: bit r: row r has bits
  float base[NT][4], deltas[NT][4], kept[4][2];

  __device__ __forceinline__ int part_of(int tile) const { return (tile >= p.ends[0]) + (tile >= p.ends[1]); }
  __device__ __forceinline__ int output_of(int tile, int part) const {
    return (tile - (part == 0 ? 0 : part == 1 ? p.ends[0] : p.ends[1])) * TILE;
  }

  __device__ __forceinline__ StreamPlace place_of(int tile) const {
    StreamPlace at;
    at.part = part_of(tile);
    const int first = output_of(tile, at.part), outputs = one_of(p.a.outputs, at.part), words = p.a.inputs / WORD;
    const uint16_t* weight = static_cast<const uint16_t*>(one_of(p.a.weight, at.part));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t output = min(first + h * 8 + lane / 4, outputs - 1);
      at.weights[h] = weight + output * one_of(p.a.weight_r, at.part) + begin * QUARTER + lane % 4 * 8;
      at.bits[h] = one_of(p.a.bits, at.part) + output * words + (begin + lane % 4) * 4;
    }
    at.apart = static_cast<int64_t>(outputs) * words;
    return at;
  }

  __device__ __forceinline__ void load_weights(Batch& to, const StreamPlace& at, int quarter) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        to.weights[i][h] = weights_if(at.weights[h] + quarter * QUARTER + i * 32, quarter < mine);
      }
  }
  __device__ __forceinline__ void load_bits(Batch& to, const StreamPlace& at, int quarter) const {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int row = quarter % 4 * EACH + e, step = quarter / 4;
      const bool there = (some >> row & 1) && step * 4 + lane % 4 < mine;
      const int64_t from = board.slots[row] * at.apart + step * (STEP / WORD);
#pragma unroll
      for (int h = 0; h < 2; ++h) to.bits[e][h] = bits_if(at.bits[h] + from, there);
    }
  }
  __device__ __forceinline__ void load(Batch& to, const StreamPlace& at, int quarter) const {
    load_weights(to, at, quarter);
    load_bits(to, at, quarter);
  }

  // Products of 128 inputs with the weights. Lane 4 g + t has inputs 32 i + 8 t to + 7 of output g, and of row g.
  __device__ __forceinline__ void multiply(const Batch& own, int quarter) {
    if (quarter >= mine) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 w = own.weights[i][0], v = own.weights[i][1];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 x = load_shared(x_at + static_cast<uint32_t>(n * 8 * p.x_bytes() + quarter * QUARTER * 2 + i * 64));
        if (BF16) {
          mma_bf16(base[n], make_uint4(w.x, v.x, w.y, v.y), x.x, x.y);
          mma_bf16(base[n], make_uint4(w.z, v.z, w.w, v.w), x.z, x.w);
        } else {
          mma_f16(base[n], make_uint4(w.x, v.x, w.y, v.y), x.x, x.y);
          mma_f16(base[n], make_uint4(w.z, v.z, w.w, v.w), x.z, x.w);
        }
      }
    }
  }

  // Sums of a row's whole numbers where its bits are set, over 512 inputs: a lane's share, of outputs g and g + 8.
  __device__ __forceinline__ void count(float (&sum)[2], const uint4 (&bits)[2], int row, int step, float factor) const {
    int both[PLACES / 8][4] = {};
    const uint32_t from = planes_at + static_cast<uint32_t>((row * p.steps + step) * STEP_BYTES);
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

  // Of four rows' shares a lane t of four gets the sum of row t.
  __device__ __forceinline__ static float gather_rows(float a, float b, float c, float d, int t) {
    const bool upper = t & 2, odd = t & 1;
    const float first = (upper ? c : a) + __shfl_xor_sync(0xffffffffu, upper ? a : c, 2);
    const float second = (upper ? d : b) + __shfl_xor_sync(0xffffffffu, upper ? b : d, 2);
    return (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  }

  template <int Q>
  __device__ __forceinline__ void work(const Batch& own, int step, int part) {
    multiply(own, step * 4 + Q);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      constexpr int FIRST = Q * EACH;
      const int row = FIRST + e;
      float(&sum)[2] = kept[(FIRST + e) % 4];
      sum[0] = sum[1] = 0.0f;
      if (some >> row & 1) {
        const float factor = board.factors[part][row] * static_cast<float>(1 << lane % 4 * 2);
        count(sum, own.bits[e], row, step, factor);
      }
      if ((FIRST + e) % 4 < 3) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        deltas[(FIRST + e) / 8][(FIRST + e) / 4 % 2 + 2 * h] +=
            gather_rows(kept[0][h], kept[1][h], kept[2][h], kept[3][h], lane % 4);
      }
    }
  }

  // All of a tile; `even` has its first batch and gets that of the next one.
  __device__ __forceinline__ void run(Batch& even, Batch& odd, const StreamPlace& at, const StreamPlace& next, bool more) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) base[n][j] = deltas[n][j] = 0.0f;
#pragma unroll 1
    for (int first = 0; first < mine; first += 4) {
      load(odd, at, first + 1);
      work<0>(even, first / 4, at.part);
      load(even, at, first + 2);
      work<1>(odd, first / 4, at.part);
      load(odd, at, first + 3);
      work<2>(even, first / 4, at.part);
      if (first + 4 < mine) {
        load(even, at, first + 4);
      } else if (more) {
        load(even, next, 0);
      }
      work<3>(odd, first / 4, at.part);
    }
  }

  // Sums of this rank to the block that adds them up: to its shared memory at `to`, counted by its barrier.
  __device__ __forceinline__ void leave(uint32_t to, uint32_t bar, int part) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[j] = base[n][j] + (deltas[n][j] - board.minus[part][n * 8 + j % 2 * 4 + lane % 4]);
      }
      send(to + static_cast<uint32_t>(n * 512 + lane * 16), bar, out[0], out[1], out[2], out[3]);
    }
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

// What the board says of the rows, and their inputs and planes of this rank to shared memory.
__device__ __forceinline__ void know_rows(const StreamTask& p, StreamBoard& board, int begin, int mine, int rank,
                                          uint32_t x_at, uint32_t planes_at) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int row = thread / 32; row < p.a.rows; row += STREAM_WARPS) {
    const uint16_t* x = static_cast<const uint16_t*>(p.a.x) + row * p.a.x_r + begin * QUARTER;
    for (int i = lane; i < mine * (QUARTER / 8); i += 32) {
      copy_async(x_at + static_cast<uint32_t>(row * p.x_bytes() + i * 16), x + i * 8, true);
    }
    const uint32_t* planes = p.planes + (static_cast<int64_t>(row) * RANKS + rank) * p.steps * (STEP_BYTES / 4);
    for (int i = lane; i < (mine + 3) / 4 * (STEP_BYTES / 16); i += 32) {
      copy_async(planes_at + static_cast<uint32_t>(row * p.steps * STEP_BYTES + i * 16), planes + i * 4, true);
    }
  }
  copy_commit();
  if (thread < STREAM_ROWS) {
    const int slot = thread < p.a.rows ? p.a.slots_of_rows[thread] : -1;
    const bool there = slot >= 0 && slot < p.a.slots;
    board.slots[thread] = there ? slot : -1;
    float unit = 0.0f, sum = 0.0f;
    if (thread < p.a.rows) {
      unit = p.units[thread];
      for (int i = 0; i < mine; ++i) sum += static_cast<float>(p.sums[thread * p.quarters + begin + i]);
    }
#pragma unroll
    for (int part = 0; part < HFL_STREAMED_PARTS; ++part) {
      float factor = 0.0f;
      if (slot >= 0 && part < p.a.parts) {
        factor = there ? unit * p.a.scales[part][slot] : __int_as_float(0x7fffffff);  // there is no such slot
      }
      board.factors[part][thread] = 2.0f * factor, board.minus[part][thread] = factor * sum;
    }
  }
  copy_wait<0>();
  __syncthreads();
}

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
  const int begin = min(rank * p.each, p.quarters), mine = min(p.each, p.quarters - begin);
  const uint32_t slots = shared_address(stream_shared),
                 x_at = slots + static_cast<uint32_t>(p.owned * p.owned_bytes()),
                 planes_at = x_at + static_cast<uint32_t>(p.columns() * p.x_bytes());
  if (threadIdx.x == 0) {
    for (int i = 0; i < owned; ++i) barrier_init(board.sent[i], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < owned; ++i) barrier_expect(board.sent[i], p.owned_bytes());
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  using S = Streamer<EACH, BF16>;
  const int g = lane / 4, t = lane % 4;
  S own = {p, board, lane, begin, mine, x_at + static_cast<uint32_t>((g / 2 + g % 2 * 4) * p.x_bytes() + t * 16),
           planes_at + static_cast<uint32_t>(lane * 16), 0, {}, {}, {}};
  typename S::Batch even = {}, odd = {};
  StreamPlace place = own.place_of(first + min(warp, tiles - 1));
  if (warp < tiles && mine > 0) {
    own.load_weights(even, place, 0);
    if (t == 0) {
      const int bytes = min(mine * QUARTER, AHEAD) * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(place.weights[h]), "r"(bytes) : "memory");
      }
    }
  }
  wait_for_previous(warp);
  know_rows(p, board, begin, mine, rank, x_at, planes_at);
  for (int row = 0; row < STREAM_ROWS; ++row) own.some |= (board.slots[row] >= 0 ? 1u : 0u) << row;
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (warp < tiles) own.load_bits(even, place, 0);
#pragma unroll 1
  for (int tile = warp; tile < tiles; tile += STREAM_WARPS) {
    const bool more = tile + STREAM_WARPS < tiles;
    const StreamPlace next = own.place_of(first + min(tile + STREAM_WARPS, tiles - 1));
    own.run(even, odd, place, next, more);
    const int owner = tile % RANKS, slot = tile / RANKS;
    own.leave(over_there(slots + static_cast<uint32_t>(slot * p.owned_bytes() + rank * S::NT * 512), owner),
              over_there(shared_address(&board.sent[slot]), owner), place.part);
    place = next;
  }
#pragma unroll 1
  for (int slot = warp; slot < owned; slot += STREAM_WARPS) {
    wait_for_cluster(board.sent[slot], 0);
    own.finish(first + slot * RANKS + rank, slots + static_cast<uint32_t>(slot * p.owned_bytes()));
  }
#endif
}

}  // namespace hfl
