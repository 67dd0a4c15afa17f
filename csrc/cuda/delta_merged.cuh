// The products of ops.linear_with_delta, for sm_90a: wgmma of weights that become those of a tenant in registers.
// delta_merged.cu says who does what. In code for other architectures the kernel is empty, which shows as one without
// static shared memory.
#pragma once
#include "delta_merged_task.cuh"
#include "wgmma.cuh"

namespace hfl {

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

struct MergedBoard {
  uint64_t full[MergedStages::STAGES], empty[MergedStages::STAGES];
};

// A group of four warps, which has 64 outputs of an item: a thread those of two rows of weights, 8 apart. PLAIN: rows
// have one slot, and that has one scale for all inputs.
template <bool BF16, bool PLAIN>
struct MergedGroup {
  using S = MergedStages;
  const MergedTask& p;
  MergedBoard& board;
  uint32_t base;
  int group, warp, lane, filled;  // filled: stages so far
  // of the item
  int part, first, count, output,
      slots[2];                // output: of the warp's first row; slots: place in `slots_of_rows`, and the first
  const uint16_t* weights[2];  // of both rows, from this lane's first input on
  const int32_t* bits[2];
  float scale[2];
  float x[128];

  __device__ MergedGroup(const MergedTask& p_, MergedBoard& board_, uint32_t base_)
      : p(p_), board(board_), base(base_), lane(lane_of_thread()), filled(0) {
    group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32 % 4, 0);
  }

  __device__ void run(int items, int pieces) {
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      begin(item, pieces);
      multiply();
      leave();
    }
  }

 private:
  struct Raw4 {
    uint4 weights[2][2];  // [32 inputs][row]
    uint2 words[2];       // of both rows
  };

  __device__ __forceinline__ float scale_of(int slot, int row, int input) const {
    const hfl_delta& d = p.delta;
    if (slot < 0) return 0.0f;
    if (slot >= d.slots) return __int_as_float(0x7fffffff);  // there is no such slot
    const int64_t line = static_cast<int64_t>(slot) * own().scale_rows + (own().scale_rows > 1 ? row : 0);
    return own().scales[line * d.groups + input / (d.inputs / d.groups)];
  }
  __device__ __forceinline__ const MergedPart& own() const { return p.parts[part]; }
  __device__ __forceinline__ int row_of(int i) const { return min(output + i * 8 + lane / 4, own().outputs - 1); }
  __device__ __forceinline__ int64_t words_at(int slot, int row) const {
    const hfl_delta& d = p.delta;
    return (static_cast<int64_t>(slot < 0 || slot >= d.slots ? 0 : slot) * own().outputs + row) * (d.inputs / WORD);
  }

  __device__ __forceinline__ void begin(int item, int pieces) {
    const hfl_delta& d = p.delta;
    const int piece = item % pieces, tile = item / pieces;
    part = 0;
#pragma unroll
    for (int i = 1; i < HFL_JOINED_PARTS; ++i) part += tile >= p.parts[i].begin;
    first = p.rows.starts[piece], count = p.rows.starts[piece + 1] - first;
    output = (tile - own().begin) * S::OUTPUTS + group * 64 + warp * 16;
    slots[0] = p.rows.order[first], slots[1] = d.slots_of_rows[static_cast<int64_t>(slots[0]) * d.planes];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of(i);
      weights[i] = own().weight + row * own().weight_r + lane % 4 * 8;
      bits[i] = own().bits + words_at(slots[1], row);
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
    if (!PLAIN && p.delta.groups > 1) {
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
        if (!PLAIN && p.delta.planes > 1) add_planes(two, i, tile * S::INPUTS + half * WORD);
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
    const hfl_delta& d = p.delta;
#pragma unroll 1
    for (int plane = 1; plane < d.planes; ++plane) {
      const int slot = d.slots_of_rows[static_cast<int64_t>(slots[0]) * d.planes + plane];
      add(two, static_cast<uint32_t>(own().bits[words_at(slot, row_of(i)) + input / WORD]),
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
    if (lane == 0) barrier_arrive(board.empty[stage % S::STAGES]);
  }

  __device__ __forceinline__ void multiply() {
    const int tiles = p.delta.inputs / S::INPUTS;
    uint32_t even[16], odd[16];
    constexpr int AHEAD = PLAIN ? 2 : 1;  // tiles; for more there are no registers
    Raw4 raws[AHEAD], &first_raw = raws[0], &last_raw = raws[AHEAD - 1];
    read(first_raw, 0);
    if (PLAIN && tiles > 1) read(last_raw, 1);
    merge(even, first_raw, 0);
    if (tiles > AHEAD) read(first_raw, AHEAD);
#pragma unroll 1
    for (int tile = 0;; tile += 2) {
      issue(even, tile);
      if (tile) finish<1>(odd, filled - 2);
      if (tile + 1 == tiles) break;
      merge(odd, last_raw, tile + 1);
      if (tile + 1 + AHEAD < tiles) read(last_raw, tile + 1 + AHEAD);
      issue(odd, tile + 1);
      finish<1>(even, filled - 2);
      if (tile + 2 == tiles) break;
      merge(even, first_raw, tile + 2);
      if (tile + 2 + AHEAD < tiles) read(first_raw, tile + 2 + AHEAD);
    }
    finish<0>(even, filled - 1);
    in_flight(x);
  }

  // Of 8 rows and 16 outputs at a time.
  __device__ __forceinline__ void leave() {
    const uint16_t* bias = own().bias;
    const int outputs = own().outputs;
    const float add[2] = {bias ? to_float(bias[row_of(0)], p.delta.dtype) : 0.0f,
                          bias ? to_float(bias[row_of(1)], p.delta.dtype) : 0.0f};
#pragma unroll
    for (int n = 0; n < S::ROWS / 8; ++n) {
      const int at = n * 8 + lane / 4;
      uint32_t two[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = x[4 * n + 2 * i] + add[i], high = x[4 * n + 2 * i + 1] + add[i];
        two[i] = transpose(BF16 ? pack_bf16(low, high) : pack_f16(low, high));
      }
      if (at >= count) continue;
      uint16_t* to = own().out + static_cast<int64_t>(p.rows.order[first + at]) * outputs;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at_output = output + i * 8 + lane % 4 * 2;
        if (at_output < outputs) *reinterpret_cast<uint32_t*>(to + at_output) = two[i];
      }
    }
  }
};

#endif

template <bool BF16, bool PLAIN>
__global__ __launch_bounds__(MergedStages::THREADS,
                             1) void merged_wgmma_kernel(const __grid_constant__ MergedTask p,
                                                         const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = MergedStages;
  extern __shared__ __align__(128) unsigned char merged_shared[];
  __shared__ MergedBoard board;
  const uint32_t base = (shared_address(merged_shared) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::STAGES; ++s) barrier_init(board.full[s], 1), barrier_init(board.empty[s], 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous(static_cast<int>(threadIdx.x));
  const int pieces = *p.rows.pieces, items = pieces * p.tiles;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x) return;
    int filled = 0;
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const int first = p.rows.starts[item % pieces];
      for (int at = 0; at < p.delta.inputs; at += S::INPUTS, ++filled) {
        const int stage = filled % S::STAGES;
        barrier_wait(board.empty[stage], filled / S::STAGES % 2 ^ 1);
        barrier_expect(board.full[stage], S::TILE);
        copy_box(base + static_cast<uint32_t>(stage * S::TILE), &map, board.full[stage], at, first, 0, 0);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    MergedGroup<BF16, PLAIN>(p, board, base).run(items, pieces);
  }
#endif
}

}  // namespace hfl
