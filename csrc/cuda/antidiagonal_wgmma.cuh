// ops.score_antidiagonal on sm_90: tiles of 128 x 256 logits with wgmma, in one kernel that stays, of factors that
// antidiagonal_pack.cuh has put side by side, or that are read where they lie.
//
// Grid: as many blocks as multiprocessors, in clusters of two, which take one pair of tiles after the other: two strips
//   of queries and the same keys, of which each block copies half to both. Block: 384 threads; one copies stages ahead,
//   by tensor maps, and two groups of four warps have 64 x 256 logits each. The first group is a stage ahead, so that
//   one group multiplies while the other makes sums.
// Shared memory: four stages of 48 KiB. In code for other architectures the kernel is empty, which shows as one without
// static shared memory.
// Bound by: the L2, which a multiprocessor asks for 32 KiB a stage of 1024 cycles: without the other's half it is 48.
#pragma once
#include <algorithm>

#include "antidiagonal_pack.cuh"
#include "tensor_map.cuh"

namespace hfl {
namespace antidiagonal {

constexpr int PAIR = 2, COLUMNS = 256;

// Boxes of LINE bytes of ROWS tiles; axes: channels, tokens of a tile, tiles, heads, rows. What is put side by side is
// one token, as long as its tile.
struct Maps {
  CUtensorMap queries, keys;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFL_FOUR(kind, i) kind(x[i][0]), kind(x[i][1]), kind(x[i][2]), kind(x[i][3])
#define HFL_SIXTEEN(kind, i) HFL_FOUR(kind, i), HFL_FOUR(kind, i + 1), HFL_FOUR(kind, i + 2), HFL_FOUR(kind, i + 3)
#define HFL_ALL_OF_X(kind) \
  HFL_SIXTEEN(kind, 0), HFL_SIXTEEN(kind, 4), HFL_SIXTEEN(kind, 8), HFL_SIXTEEN(kind, 12), HFL_SIXTEEN(kind, 16), \
      HFL_SIXTEEN(kind, 20), HFL_SIXTEEN(kind, 24), HFL_SIXTEEN(kind, 28)
#define HFL_WGMMA(kind, types, turned) \
  asm volatile( \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256" types " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
      "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, more" turned ";\n}" \
      : HFL_ALL_OF_X(kind) \
      : "l"(a), "l"(b), "r"(more))

// x[64, 256] = a[64, 32 bytes] b[32 bytes, 256], plus x if `more`.
template <typename F>
__device__ __forceinline__ void multiply_step(SumOf<F> (&x)[32][4], uint64_t a, uint64_t b, int more) {
  if constexpr (std::is_same<F, Whole>::value) {
    HFL_WGMMA("+r", "k32.s32.s8.s8", "");
  } else if constexpr (std::is_same<F, Eight>::value) {
    HFL_WGMMA("+f", "k32.f32.e4m3.e4m3", ", 1, 1");
  } else if constexpr (std::is_same<F, __half>::value) {
    HFL_WGMMA("+f", "k16.f32.f16.f16", ", 1, 1, 0, 0");
  } else {
    HFL_WGMMA("+f", "k16.f32.bf16.bf16", ", 1, 1, 0, 0");
  }
}
// Until at most N groups of products are under way, which write x.
template <int N>
__device__ __forceinline__ void wait_for(float (&x)[32][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : HFL_ALL_OF_X("+f") : "n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void wait_for(int32_t (&x)[32][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : HFL_ALL_OF_X("+r") : "n"(N) : "memory");
}
#undef HFL_WGMMA
#undef HFL_ALL_OF_X
#undef HFL_SIXTEEN
#undef HFL_FOUR

__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Until all threads of the cluster are here.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrive at the barrier of that block of the cluster.
__device__ __forceinline__ void arrive_at(uint64_t& bar, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&bar)),
               "r"(rank)
               : "memory");
}
// A box to shared memory; counted by the barrier.
__device__ __forceinline__ void copy_tiles(uint32_t to, const CUtensorMap* map, uint64_t& bar, int channel, int token,
                                           int tile, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
               "%6, %7}], [%2];" ::"r"(to), "l"(map), "r"(shared_address(&bar)), "r"(channel), "r"(token), "r"(tile),
               "r"(head), "r"(batch)
               : "memory");
}
// The same, to the same place in both blocks of a pair, and counted by the barriers of both.
__device__ __forceinline__ void copy_tiles_to_both(uint32_t to, const CUtensorMap* map, uint64_t& bar, int channel,
                                                   int token, int tile, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to), "l"(map), "r"(shared_address(&bar)), "r"(channel),
               "r"(token), "r"(tile), "r"(head), "r"(batch), "h"(static_cast<uint16_t>(3))
               : "memory");
}
#endif

template <typename F>
struct Groups {
  static constexpr int FEEDERS = 128, THREADS = 384, STAGES = 4, NT = 32, LEAD = 1, SIZE = IS_EIGHT<F> ? 1 : 2;
  static constexpr int QUERIES = ROWS * LINE, HALF = COLUMNS / PAIR * LINE, STAGE = QUERIES + PAIR * HALF;
  static constexpr int BYTES = 1024 + STAGES * STAGE;
  static_assert(COLUMNS / PAIR == ROWS, "boxes of queries and of keys are alike");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  struct Barriers {
    uint64_t full[STAGES], empty[STAGES];
  };
  const Call& call;
  const Maps &packed, &lying;
  Barriers& barriers;
  uint32_t stages, rank;

  __device__ int steps() const { return (call.a.stride * call.a.dim * SIZE - 1) / LINE + 1; }

  // Calls `f` with all works of this block: of which it or the other of the pair sees a key.
  template <typename Each>
  __device__ __forceinline__ void for_works(Each f) const {
    const int pairs = static_cast<int>(gridDim.x) / PAIR, count = call.seen[0];
    int at = static_cast<int>(blockIdx.x) / PAIR, next = at < count ? call.seen[1 + at] : 0;
    for (; at < count; at += pairs) {
      const int pair = next;
      if (at + pairs < count) next = call.seen[1 + at + pairs];
      f(Work(call, PAIR * pair + static_cast<int>(rank), COLUMNS));
    }
  }

  // One thread.
  __device__ void feed() const {
    const int group = call.a.q_heads / call.a.kv_heads, count = steps();
    const bool lies = call.lies && *call.apart < 0;
    const Maps& maps = lies ? lying : packed;
    const int tokens = lies ? call.a.stride : 1, each = lies ? call.a.dim : call.a.stride * call.a.dim;
    const int first = lies ? call.first : 0;
    uint32_t filled = 0;
    for_works([&](const Work& work) {
      const int queries = first + work.strip * ROWS, keys = work.column + static_cast<int>(rank) * ROWS;
      for (int step = 0, channel = 0, token = 0; step < count; ++step, ++filled) {
        const uint32_t stage = filled % STAGES, to = stages + stage * STAGE;
        uint64_t& full = barriers.full[stage];
        barrier_wait(barriers.empty[stage], (filled / STAGES & 1) ^ 1);
        barrier_expect(full, STAGE);
        copy_tiles(to, &maps.queries, full, channel, tokens - 1 - token, queries, work.head, work.b);
        copy_tiles_to_both(to + QUERIES + rank * HALF, &maps.keys, full, channel, token, keys, work.head / group,
                           work.b);
        channel += LINE / SIZE;
        if (lies && channel == each) channel = 0, ++token;
      }
    });
  }

  __device__ void release(uint32_t used, int lane) const {
    if (lane < PAIR) arrive_at(barriers.empty[used % STAGES], static_cast<uint32_t>(lane));
  }

  // A group of four warps.
  __device__ void multiply(int group, int lane) const {
    const int count = steps();
    const bool in_turn = count >= 2 * STAGES;  // else the first group could come by twice before the other
    SumOf<F> x[NT][4];
    uint32_t used = 0;
    for_works([&](const Work& work) {
      if (in_turn && group == 1) meet(1, 256);
      for (int step = 0; step < count; ++step, ++used) {
        const uint32_t stage = stages + used % STAGES * STAGE;
        const uint64_t a = matrix(stage + group * 64 * LINE), b = matrix(stage + QUERIES);
        barrier_wait(barriers.full[used % STAGES], used / STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < LINE / 32; ++s) multiply_step<F>(x, a + 2 * s, b + 2 * s, step + s);
        wgmma_commit();
        wait_for<1>(x);
        if (step) release(used - 1, lane);
        if (in_turn && group == 0 && step == LEAD - 1) come_by(1, 256);
      }
      wait_for<0>(x);
      release(used - 1, lane);
      const int thread = thread_anew();
      write_sums<IS_EIGHT<F>>(call, work, x, (thread - FEEDERS) / 32 * 16, 0, thread % 32);
    });
  }
#endif
};

template <typename F>
__global__ void __launch_bounds__(Groups<F>::THREADS, 1)
    wgmma_kernel(const __grid_constant__ Call call, const __grid_constant__ Maps packed,
                 const __grid_constant__ Maps lying) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using G = Groups<F>;
  extern __shared__ char room[];
  __shared__ typename G::Barriers barriers;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < G::STAGES; ++i) {
      barrier_init(barriers.full[i], 1);
      barrier_init(barriers.empty[i], PAIR * (G::THREADS - G::FEEDERS) / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  meet_cluster();
  wait_for_previous(thread);
  const G groups{call, packed, lying, barriers, (shared_address(room) + 1023) / 1024 * 1024, rank_in_cluster()};
  if (thread < G::FEEDERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (thread == 0) groups.feed();
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    groups.multiply(__shfl_sync(0xffffffffu, thread / 128 - 1, 0), thread % 32);
  }
  meet_cluster();  // the other still arrives at barriers here
#endif
}

// Whether the current device has the kernel, and the driver what it needs.
template <typename F>
bool has_wgmma() {
  cudaFuncAttributes of_kernel;
  if (!tensor_map_maker()) return false;
  if (cudaFuncGetAttributes(&of_kernel, wgmma_kernel<F>) == cudaSuccess) return of_kernel.sharedSizeBytes != 0;
  static_cast<void>(cudaGetLastError());
  return false;
}

// A map of a tensor whose axes lie so many bytes apart, channels aside.
template <typename F>
bool map_axes(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[5], const cuuint64_t (&apart)[4]) {
  constexpr CUtensorMapDataType type = IS_EIGHT<F>                      ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                       : std::is_same<F, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint32_t box[5] = {LINE / Groups<F>::SIZE, 1, ROWS, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  return tensor_map_maker()(&map, type, 5, const_cast<void*>(data), sizes, apart, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// What is put side by side.
template <typename F>
bool map_packed(Maps& maps, const Call& call) {
  const hfl_antidiagonal& a = call.a;
  const auto map = [&](CUtensorMap& to, const char* data, int64_t tiles, int64_t heads) {
    const cuuint64_t channels = cuuint64_t(a.stride) * a.dim, line = channels * Groups<F>::SIZE;
    return map_axes<F>(to, data, {channels, 1, cuuint64_t(tiles), cuuint64_t(heads), cuuint64_t(a.batch)},
                       {line, line, line * cuuint64_t(tiles), line * cuuint64_t(tiles * heads)});
  };
  return map(maps.queries, call.queries, call.rows, a.q_heads) && map(maps.keys, call.keys, call.padded, a.kv_heads);
}

// Queries and keys where they lie.
template <typename F>
bool map_lying(Maps& maps, const Call& call) {
  const hfl_antidiagonal& a = call.a;
  const auto map = [&](CUtensorMap& to, const void* data, int64_t tiles, int64_t heads, int64_t b, int64_t h, int64_t t) {
    const cuuint64_t size = Groups<F>::SIZE, dim = cuuint64_t(a.dim), stride = cuuint64_t(a.stride);
    return map_axes<F>(to, data, {dim, stride, cuuint64_t(tiles), cuuint64_t(heads), cuuint64_t(a.batch)},
                       {cuuint64_t(t) * size, cuuint64_t(t) * size * stride, cuuint64_t(h) * size, cuuint64_t(b) * size});
  };
  return map(maps.queries, a.q, int64_t{a.blocks} * call.tiles, a.q_heads, a.q_b, a.q_h, a.q_t) &&
         map(maps.keys, a.k, call.columns, a.kv_heads, a.k_b, a.k_h, a.k_t);
}

// The product of a part, of T in the precision of F.
template <typename T, typename F>
cudaError_t launch_wgmma(const Call& call, cudaStream_t stream) {
  using G = Groups<F>;
  Maps packed, lying = {};
  if (!map_packed<F>(packed, call) || (call.lies && !map_lying<F>(lying, call))) return cudaErrorInvalidValue;
  cudaError_t error = pack<T, F, true>(call, stream);
  int device = 0, processors = 0;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(wgmma_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize, G::BYTES);
  }
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(std::min(call.works, processors / PAIR * PAIR)));
  void* arguments[] = {const_cast<Call*>(&call), &packed, &lying};
  const void* kernel = reinterpret_cast<const void*>(&wgmma_kernel<F>);
  return launch(kernel, grid, G::THREADS, G::BYTES, stream, arguments, true, PAIR);
}

}  // namespace antidiagonal
}  // namespace hfl
