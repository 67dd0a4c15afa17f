// ops.score_antidiagonal on sm_90: tiles of 128 x 256 logits with wgmma, in one kernel that stays.
//
// Grid: as many blocks as multiprocessors, which take one tile after the other. Block: 384 threads; four warps copy
// stages ahead, with cp.async because places of queries and the ends of rows are known to the device only, and two
// groups of four warps have 64 x 256 logits each.
// Shared memory: four stages of 48 KiB, and a strip's table of queries. In code for other architectures the kernel is
// empty, which shows as a kernel without static shared memory.
#pragma once
#include <algorithm>
#include <type_traits>

#include "antidiagonal_tile.cuh"

namespace hfl {
namespace antidiagonal {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra wait;\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// A matrix of rows of 128 bytes, permuted, eight rows at a time.
__device__ __forceinline__ uint64_t matrix(const void* at) {
  return static_cast<uint64_t>((shared_address(at) & 0x3ffffu) >> 4) | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

#define HFL_FOUR(i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define HFL_SIXTEEN(i) HFL_FOUR(i), HFL_FOUR(i + 1), HFL_FOUR(i + 2), HFL_FOUR(i + 3)
#define HFL_ALL_OF_X \
  HFL_SIXTEEN(0), HFL_SIXTEEN(4), HFL_SIXTEEN(8), HFL_SIXTEEN(12), HFL_SIXTEEN(16), HFL_SIXTEEN(20), HFL_SIXTEEN(24), \
      HFL_SIXTEEN(28)
#define HFL_WGMMA(type) \
  asm volatile( \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
      "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, more, 1, 1, 0, 0;\n}" \
      : HFL_ALL_OF_X \
      : "l"(a), "l"(b), "r"(more))

// x[64, 256] = a[64, 16] b[16, 256], plus x if `more`.
template <typename T>
__device__ __forceinline__ void wgmma(float (&x)[32][4], uint64_t a, uint64_t b, int more) {
  if constexpr (std::is_same<T, __half>::value) {
    HFL_WGMMA("f16");
  } else {
    HFL_WGMMA("bf16");
  }
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait(float (&x)[32][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;" : HFL_ALL_OF_X : "n"(N) : "memory");
}
#undef HFL_WGMMA
#undef HFL_ALL_OF_X
#undef HFL_SIXTEEN
#undef HFL_FOUR
#endif

template <typename T>
struct Groups {
  static constexpr int COPIERS = 128, THREADS = 384, STAGES = 4, COLUMNS = 256, NT = 32, LAG = 2;
  using Copies = Loader<COLUMNS, COPIERS>;
  static size_t bytes(int stride) { return 1024 + STAGES * Copies::BYTES + sizeof(int32_t) * ROWS * stride; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  struct Barriers {
    uint64_t full[STAGES], empty[STAGES];
  };

  // Whether some row of the work sees a key; all lanes of a warp ask.
  __device__ static bool any(const Call& call, const Work& work, int lane) {
    bool seen = false;
#pragma unroll
    for (int row = lane; row < ROWS; row += 32) seen |= work.seen(call, work.tile(call, row)) > 0;
    return __any_sync(0xffffffffu, seen);
  }

  __device__ static void sync_copiers() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

  // Stages that were copied are made known LAG stages later, so that copies overlap.
  __device__ static void copy(const Call& call, char* stages, int32_t* sources, Barriers& barriers, int thread) {
    const int steps = (call.a.stride * call.a.dim - 1) / DEEP + 1;
    uint32_t count = 0;
    for (int index = static_cast<int>(blockIdx.x); index < call.works; index += static_cast<int>(gridDim.x)) {
      const Work work(call, index, COLUMNS);
      if (!any(call, work, thread % 32)) continue;
      sync_copiers();  // nobody still reads the table of the work before
      read_sources(call, work, sources, thread, COPIERS);
      sync_copiers();
      Copies copies(call, work, sources, thread);
      for (int step = 0; step < steps; ++step, ++count) {
        barrier_wait(barriers.empty + count % STAGES, (count / STAGES & 1) ^ 1);
        copies.copy(call, stages + count % STAGES * Copies::BYTES);
        copy_commit();
        if (count >= LAG) publish<LAG>(barriers.full + (count - LAG) % STAGES);
      }
    }
    for (uint32_t i = count < LAG ? 0 : count - LAG; i < count; ++i) publish<0>(barriers.full + i % STAGES);
  }
  template <int LATER>
  __device__ static void publish(uint64_t* barrier) {
    copy_wait<LATER>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads through another proxy
    barrier_arrive(barrier);
  }

  __device__ static void multiply(const Call& call, const char* stages, Barriers& barriers, int warp, int lane) {
    const int steps = (call.a.stride * call.a.dim - 1) / DEEP + 1, row = warp / 4 * 64;
    float x[NT][4] = {};
    uint32_t count = 0;
    for (int index = static_cast<int>(blockIdx.x); index < call.works; index += static_cast<int>(gridDim.x)) {
      const Work work(call, index, COLUMNS);
      if (!any(call, work, lane)) continue;
      for (int step = 0; step < steps; ++step, ++count) {
        const char* stage = stages + count % STAGES * Copies::BYTES;
        const uint64_t a = matrix(stage + row * LINE), b = matrix(stage + ROWS * LINE);
        barrier_wait(barriers.full + count % STAGES, count / STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < DEEP / 16; ++s) wgmma<T>(x, a + 2 * s, b + 2 * s, step + s);
        wgmma_commit();
        wgmma_wait<1>(x);
        if (step && lane == 0) barrier_arrive(barriers.empty + (count - 1) % STAGES);
      }
      wgmma_wait<0>(x);
      if (lane == 0) barrier_arrive(barriers.empty + (count - 1) % STAGES);
      const int thread = thread_anew();
      write_sums(call, work, x, (thread - COPIERS) / 32 * 16, 0, thread % 32);
    }
  }
#endif
};

template <typename T>
__global__ void __launch_bounds__(Groups<T>::THREADS, 1) wgmma_kernel(const __grid_constant__ Call call) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using G = Groups<T>;
  extern __shared__ char room[];
  __shared__ typename G::Barriers barriers;
  char* stages = room + (1024 - shared_address(room) % 1024) % 1024;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < G::STAGES; ++i) {
      barrier_init(barriers.full + i, G::COPIERS);
      barrier_init(barriers.empty + i, (G::THREADS - G::COPIERS) / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (thread < G::COPIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    G::copy(call, stages, reinterpret_cast<int32_t*>(stages + G::STAGES * G::Copies::BYTES), barriers, thread);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    G::multiply(call, stages, barriers, thread / 32 - G::COPIERS / 32, thread % 32);
  }
#endif
}

// Launches the kernel if the device has it: says so in `ran`.
template <typename T>
cudaError_t launch_wgmma(const Call& call, cudaStream_t stream, bool& ran) {
  using G = Groups<T>;
  cudaFuncAttributes of_kernel;
  int device = 0, processors = 0;
  cudaError_t error = cudaFuncGetAttributes(&of_kernel, wgmma_kernel<T>);
  if (error != cudaSuccess || of_kernel.sharedSizeBytes == 0) return error;
  const int bytes = static_cast<int>(G::bytes(call.a.stride));
  error = cudaFuncSetAttribute(wgmma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(std::min(call.works, processors));
  wgmma_kernel<T><<<blocks, G::THREADS, bytes, stream>>>(call);
  ran = true;
  return cudaGetLastError();
}

}  // namespace antidiagonal
}  // namespace hfl
