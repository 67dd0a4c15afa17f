// Instructions of sm_90a: products of 64 rows by a group of four warps, and copies of tiles by a tensor map.
#pragma once
#include <cuda.h>

#include "barrier.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A matrix in shared memory whose rows have 128 bytes, their chunks of 16 permuted within eight rows (SWIZZLE_128B).
// at: of a row whose number is a multiple of 8, counted from a multiple of 1024 bytes; 32 bytes further on lie the next
// 16 columns. far: bytes to the next 64 columns, where these are not what is summed over.
__device__ __forceinline__ uint64_t matrix(uint32_t at, int far = 16) {
  return static_cast<uint64_t>((at & 0x3ffffu) >> 4) | static_cast<uint64_t>(far >> 4) << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups of products are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Products write these registers when the compiler does not see it: it moves nothing of them past here.
template <int N>
__device__ __forceinline__ void in_flight(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define HFL_8(i)                                                                                              \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define HFL_32(i) HFL_8(i), HFL_8(i + 8), HFL_8(i + 16), HFL_8(i + 24)
#define HFL_FIRST_32                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HFL_NEXT_32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define HFL_PRODUCT(TYPE)                                                                                            \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"                                                   \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" HFL_FIRST_32 HFL_NEXT_32          \
               "}, %64, %65, more, 1, 1, 0, 0;\n}"                                                                   \
               : HFL_32(0), HFL_32(32)                                                                               \
               : "l"(a), "l"(b), "r"(more))
// x[64, 128] = a[64, 16] b[128, 16]^T, plus x if `more`.
template <bool BF16>
__device__ __forceinline__ void product(float (&x)[64], uint64_t a, uint64_t b, int more) {
  if constexpr (BF16) {
    HFL_PRODUCT("bf16");
  } else {
    HFL_PRODUCT("f16");
  }
}

#define HFL_GATHER_128(TYPE)                                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" HFL_FIRST_32 HFL_NEXT_32 \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                                 \
               : HFL_32(0), HFL_32(32)                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define HFL_GATHER_64(TYPE)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" HFL_FIRST_32 \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                    \
               : HFL_32(0)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// x[64, D] += a[64, 16] b[16, D], a in registers as in mma.m16n8k16.
template <bool BF16>
__device__ __forceinline__ void gather(float (&x)[64], const uint32_t* a, uint64_t b) {
  if constexpr (BF16) {
    HFL_GATHER_128("bf16");
  } else {
    HFL_GATHER_128("f16");
  }
}
template <bool BF16>
__device__ __forceinline__ void gather(float (&x)[32], const uint32_t* a, uint64_t b) {
  if constexpr (BF16) {
    HFL_GATHER_64("bf16");
  } else {
    HFL_GATHER_64("f16");
  }
}
#undef HFL_8
#undef HFL_32
#undef HFL_FIRST_32
#undef HFL_NEXT_32
#undef HFL_PRODUCT
#undef HFL_GATHER_128
#undef HFL_GATHER_64

// A box of a tensor map of four axes, to shared memory; counted by the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint64_t& bar, int channel, int row,
                                         int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
               "%6}], [%2];" ::"r"(to), "l"(map), "r"(shared_address(&bar)), "r"(channel), "r"(row), "r"(head),
               "r"(batch)
               : "memory");
}

// Named barrier `id` of `threads` threads: those that wait, and those that only come by.
__device__ __forceinline__ void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void come_by(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of four threads each has two channels in four times eight; it gets all eight of its own.
__device__ __forceinline__ uint4 together(const uint32_t (&two)[4], int thread) {
  const bool odd = thread & 1, far = thread & 2;
  const uint32_t low = __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 1);
  const uint32_t high = __shfl_xor_sync(0xffffffffu, odd ? two[2] : two[3], 1);
  const uint2 near_by = odd ? make_uint2(low, two[1]) : make_uint2(two[0], low);
  const uint2 farther = odd ? make_uint2(high, two[3]) : make_uint2(two[2], high);
  const uint2 mine = far ? farther : near_by, other = far ? near_by : farther;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, other.x, 2), y = __shfl_xor_sync(0xffffffffu, other.y, 2);
  return far ? make_uint4(x, y, mine.x, mine.y) : make_uint4(mine.x, mine.y, x, y);
}

#endif

}  // namespace hfl
