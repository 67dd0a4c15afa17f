// The products of ops.linear_with_delta, for sm_90a: wgmma of weights that become those of a tenant in registers.
// delta_merged.cu says who does what. In code for other architectures the kernel is empty, which shows as one without
// static shared memory.
#pragma once
#include "delta_rows.cuh"
#include "wgmma.cuh"

namespace hfl {

struct MergedStages {
  static constexpr int ROWS = 256, OUTPUTS = 128, INPUTS = 64, THREADS = 384, STAGES = 6;
  static constexpr int PAIR = 2;  // blocks that share rows
  static constexpr int TILE = ROWS * INPUTS * 2,
                       BYTES = STAGES * TILE + 1024;  // so that it can begin at a multiple of 1024
};

struct MergedRows {
  uint16_t* x;     // [R, K], rows by their slots; in each 32 inputs, pair 4 q + 2 s + h of two stands at 8 s + 4 h + q
  int32_t* order;  // as in DeltaRows
  int32_t* starts;
  int32_t* pieces;
  int4* known;  // [R], of each piece: the first place in the order, how many rows, the first row and its first slot
  int64_t bytes;

  explicit MergedRows(const hfl_delta& a) {
    const int64_t rows = a.rows;
    bytes = 0;
    x = static_cast<uint16_t*>(take(a.scratch, rows * a.inputs * 2));
    order = static_cast<int32_t*>(take(a.scratch, rows * 4));
    starts = static_cast<int32_t*>(take(a.scratch, rows * 4 + 4));
    pieces = static_cast<int32_t*>(take(a.scratch, 4));
    known = static_cast<int4*>(take(a.scratch, rows * 16));
  }

 private:
  void* take(void* scratch, int64_t size) {
    void* at = static_cast<char*>(scratch) + bytes;
    bytes += (size + 127) / 128 * 128;
    return at;
  }
};

struct MergedTask {
  hfl_merged a;
  MergedRows rows;
  int pairs;  // of tiles of outputs
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define HFL_8(i)                                                                                              \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define HFL_32(i) HFL_8(i), HFL_8(i + 8), HFL_8(i + 16), HFL_8(i + 24)
#define HFL_SPREAD(TYPE)                                                                                               \
  asm volatile(                                                                                                        \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %133, 0;\n"                                                              \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "    \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
      "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, " \
      "%67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, " \
      "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "  \
      "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
      "%127}, {%128, %129, %130, %131}, %132, more, 1, 1, 0;\n}"                                                       \
      : HFL_32(0), HFL_32(32), HFL_32(64), HFL_32(96)                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more))
// x[64, 256] = a[64, 16] b[256, 16]^T, plus x if `more`; a in registers as in mma.m16n8k16.
template <bool BF16>
__device__ __forceinline__ void spread(float (&x)[128], const uint32_t* a, uint64_t b, int more) {
  if constexpr (BF16) {
    HFL_SPREAD("bf16");
  } else {
    HFL_SPREAD("f16");
  }
}
#undef HFL_8
#undef HFL_32
#undef HFL_SPREAD

__device__ __forceinline__ int rank_of_block() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Until all threads of the cluster that are still there have come.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// As barrier_arrive, in another block of the cluster, or in this one.
__device__ __forceinline__ void barrier_arrive_in(uint64_t& bar, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&bar)),
               "r"(rank)
               : "memory");
}
// As copy_box of the first head and batch, to both blocks of a pair, counted by the barrier of each.
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const CUtensorMap* map, uint64_t& bar, int channel,
                                                 int row) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4, %5, %5}], [%2], %6;" ::"r"(to), "l"(map), "r"(shared_address(&bar)), "r"(channel),
               "r"(row), "r"(0), "h"(static_cast<uint16_t>(3))
               : "memory");
}

struct MergedBoard {
  uint64_t full[MergedStages::STAGES], empty[MergedStages::STAGES];
};

// A group of four warps, which has 64 outputs of an item: a thread those of two rows of weights, 8 apart.
template <bool BF16>
struct MergedGroup {
  using S = MergedStages;
  const MergedTask& p;
  MergedBoard& board;
  uint32_t base;
  int group, warp, lane, rank, filled;  // filled: stages so far
  // of the item
  int first, count, output,
      slots[2];                // output: of the warp's first row; slots: place in `slots_of_rows`, and the first
  const uint16_t* weights[2];  // of both rows, from this lane's first input on
  const int32_t* bits[2];
  float scale[2];
  float x[128];

  __device__ MergedGroup(const MergedTask& p_, MergedBoard& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), lane(lane_of_thread()), rank(rank_of_block()), filled(0) {
    group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  }

  __device__ void run(int first_item, int step, int items, int pieces) {
    if (first_item >= items) return;
    Raw4 raw;
    int4 next = p.rows.known[first_item % pieces];
    begin(first_item / pieces, next);
    read(raw, 0);
#pragma unroll 1
    for (int item = first_item; item < items; item += step) {
      const bool more = item + step < items;
      if (more) next = p.rows.known[(item + step) % pieces];
      multiply(raw);
      const int of_rows = first, rows = count, outputs = output;
      if (more) {  // its first weights are on their way while these results leave
        begin((item + step) / pieces, next);
        read(raw, 0);
      }
      leave(of_rows, rows, outputs);
    }
  }

 private:
  struct Raw4 {
    uint4 weights[2][2];  // [32 inputs][row]
    uint2 words[2];       // of both rows
  };

  __device__ __forceinline__ float scale_of(int slot, int row, int input) const {
    const hfl_delta& d = p.a.delta;
    if (slot < 0) return 0.0f;
    if (slot >= d.slots) return __int_as_float(0x7fffffff);  // there is no such slot
    const int64_t line = static_cast<int64_t>(slot) * d.scale_rows + (d.scale_rows > 1 ? row : 0);
    return d.scales[line * d.groups + input / (d.inputs / d.groups)];
  }
  __device__ __forceinline__ int row_of(int i) const { return min(output + i * 8 + lane / 4, p.a.delta.outputs - 1); }
  __device__ __forceinline__ int64_t words_at(int slot, int row) const {
    const hfl_delta& d = p.a.delta;
    return (static_cast<int64_t>(slot < 0 || slot >= d.slots ? 0 : slot) * d.outputs + row) * (d.inputs / WORD);
  }

  __device__ __forceinline__ void begin(int tiles, const int4& piece) {
    const hfl_delta& d = p.a.delta;
    first = piece.x, count = piece.y, slots[0] = piece.z, slots[1] = piece.w;
    output = (tiles * S::PAIR + rank) * S::OUTPUTS + group * 64 + warp * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of(i);
      weights[i] = static_cast<const uint16_t*>(p.a.weight) + row * p.a.weight_r + lane % 4 * 8;
      bits[i] = d.bits + words_at(slots[1], row);
      scale[i] = scale_of(slots[1], row, 0);
    }
  }

  __device__ __forceinline__ void read(Raw4& raw, int tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raw.words[i] = __ldg(reinterpret_cast<const uint2*>(bits[i]) + tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        raw.weights[half][i] = __ldg(reinterpret_cast<const uint4*>(weights[i] + tile * S::INPUTS + half * 32));
      }
    }
  }

  // A scale with the sign of a delta, which is minus where the highest bit is set.
  __device__ __forceinline__ static float signed_scale(uint32_t signs, float of) {
    return __uint_as_float((signs & 0x80000000u) ^ __float_as_uint(of));
  }

  // Weights of 64 inputs and their deltas, as the product takes them.
  __device__ __forceinline__ void merge(uint32_t (&a)[16], const Raw4& raw, int tile) {
    if (p.a.delta.groups > 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[i] = scale_of(slots[1], row_of(i), tile * S::INPUTS);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 pairs = raw.weights[half][i];
        float2 two[4] = {as_floats(pairs.x), as_floats(pairs.y), as_floats(pairs.z), as_floats(pairs.w)};
        add(two, half ? raw.words[i].y : raw.words[i].x, scale[i]);
        if (p.a.delta.planes > 1) add_planes(two, i, tile * S::INPUTS + half * WORD);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[(half * 2 + j / 2) * 4 + j % 2 * 2 + i] =
              BF16 ? pack_bf16(two[j].x, two[j].y) : pack_f16(two[j].x, two[j].y);
        }
      }
    }
  }
  __device__ __forceinline__ static float2 as_floats(uint32_t x) { return BF16 ? unpack_bf16(x) : unpack_f16(x); }
  // The deltas of this lane's 8 weights of a word of bits.
  __device__ __forceinline__ void add(float2 (&two)[4], uint32_t word, float of) const {
    const uint32_t signs = ~word << (24 - lane % 4 * 8);  // bit 24 + j: of weight j
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      two[j].x += signed_scale(signs << (7 - 2 * j), of);
      two[j].y += signed_scale(signs << (6 - 2 * j), of);
    }
  }
  // What other planes add.
  __device__ __forceinline__ void add_planes(float2 (&two)[4], int i, int input) const {
    const hfl_delta& d = p.a.delta;
#pragma unroll 1
    for (int plane = 1; plane < d.planes; ++plane) {
      const int slot = d.slots_of_rows[static_cast<int64_t>(slots[0]) * d.planes + plane];
      add(two, static_cast<uint32_t>(d.bits[words_at(slot, row_of(i)) + input / WORD]),
          scale_of(slot, row_of(i), input));
    }
  }

  __device__ __forceinline__ void issue(const uint32_t (&a)[16], int tile) {
    const int stage = filled % S::STAGES;
    barrier_wait(board.full[stage], filled / S::STAGES % 2);
    const uint64_t rows = matrix(base + static_cast<uint32_t>(stage * S::TILE));
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; ++s) spread<BF16>(x, a + 4 * s, rows + s * 2, tile | s);
    wgmma_commit();
    ++filled;
  }
  // The products before the last ones are done: their rows may go, and their weights' registers.
  template <int N>
  __device__ __forceinline__ void finish(const uint32_t (&a)[16], int stage) {
    wgmma_wait<N>();
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(a[i]) : "memory");
    __syncwarp();
    if (lane < S::PAIR) barrier_arrive_in(board.empty[stage % S::STAGES], lane);
  }

  // `raw` has the first weights.
  __device__ __forceinline__ void multiply(Raw4& raw) {
    const int tiles = p.a.delta.inputs / S::INPUTS;
    uint32_t even[16], odd[16];
    merge(even, raw, 0);
    if (tiles > 1) read(raw, 1);
#pragma unroll 1
    for (int tile = 0;; tile += 2) {
      issue(even, tile);
      if (tile) finish<1>(odd, filled - 2);
      if (tile + 1 == tiles) break;
      merge(odd, raw, tile + 1);
      if (tile + 2 < tiles) read(raw, tile + 2);
      issue(odd, tile + 1);
      finish<1>(even, filled - 2);
      if (tile + 2 == tiles) break;
      merge(even, raw, tile + 2);
      if (tile + 3 < tiles) read(raw, tile + 3);
    }
    finish<0>(even, filled - 1);
    in_flight(x);
  }

  // Of 8 rows and 16 outputs at a time.
  __device__ __forceinline__ void leave(int of_rows, int rows, int outputs) const {
    const hfl_delta& d = p.a.delta;
    const uint16_t* bias = static_cast<const uint16_t*>(p.a.bias);
    float add[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (bias) add[i] = to_float(bias[min(outputs + i * 8 + lane / 4, d.outputs - 1)], d.dtype);
    }
#pragma unroll
    for (int n = 0; n < S::ROWS / 8; ++n) {
      const int at = n * 8 + lane / 4;
      uint32_t two[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = x[4 * n + 2 * i] + add[i], high = x[4 * n + 2 * i + 1] + add[i];
        two[i] = transpose(BF16 ? pack_bf16(low, high) : pack_f16(low, high));
      }
      if (at >= rows) continue;
      uint16_t* to = static_cast<uint16_t*>(d.out) + static_cast<int64_t>(p.rows.order[of_rows + at]) * d.outputs;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own = outputs + i * 8 + lane % 4 * 2;
        if (own < d.outputs) *reinterpret_cast<uint32_t*>(to + own) = two[i];
      }
    }
  }
};

#endif

template <bool BF16>
__global__ __launch_bounds__(MergedStages::THREADS,
                             1) void merged_wgmma_kernel(const __grid_constant__ MergedTask p,
                                                         const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = MergedStages;
  extern __shared__ __align__(128) unsigned char merged_shared[];
  __shared__ MergedBoard board;
  const uint32_t base = (shared_address(merged_shared) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::STAGES; ++s) barrier_init(board.full[s], 1), barrier_init(board.empty[s], 8 * S::PAIR);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  meet_cluster();
  wait_for_previous(static_cast<int>(threadIdx.x));
  const int pieces = *p.rows.pieces, items = pieces * p.pairs;
  const int pair = static_cast<int>(blockIdx.x) / S::PAIR, step = static_cast<int>(gridDim.x) / S::PAIR;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x) return;
    const int rank = rank_of_block();
    int filled = 0;
    for (int item = pair; item < items; item += step) {
      const int first = p.rows.known[item % pieces].x + rank * (S::ROWS / S::PAIR);
      for (int at = 0; at < p.a.delta.inputs; at += S::INPUTS, ++filled) {
        const int stage = filled % S::STAGES;
        barrier_wait(board.empty[stage], filled / S::STAGES % 2 ^ 1);
        barrier_expect(board.full[stage], S::TILE);
        copy_box_to_both(base + static_cast<uint32_t>(stage * S::TILE + rank * (S::TILE / S::PAIR)), &map,
                         board.full[stage], at, first);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    MergedGroup<BF16>(p, board, base).run(pair, step, items, pieces);
  }
  meet_cluster();  // the other block still writes here, or its warps come to barriers here
#endif
}

}  // namespace hfl
