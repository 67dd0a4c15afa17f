// Instructions of sm_90a for products of bytes, and copies of tokens and codes; beside those of wgmma.cuh.
#pragma once
#include "wgmma.cuh"

namespace hfl {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class T, int N>
__device__ __forceinline__ void in_flight(T (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define HFL_8(i)                                                                                              \
  "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3]), "+r"(x[i + 4]), "+r"(x[i + 5]), "+r"(x[i + 6]), \
      "+r"(x[i + 7])
#define HFL_32(i) HFL_8(i), HFL_8(i + 8), HFL_8(i + 16), HFL_8(i + 24)
#define HFL_32_NAMES                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HFL_64_NAMES                                                                                                  \
  HFL_32_NAMES ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "   \
               "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HFL_NEXT_64_NAMES                                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"

// x[64, 128] = a[64, 32] b[128, 32]^T, plus x if `more`; a unsigned, in registers as in mma.m16n8k32, b signed.
__device__ __forceinline__ void product_u8(int (&x)[64], const uint32_t* a, uint64_t b, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {" HFL_64_NAMES
               "}, {%64, %65, %66, %67}, %68, more;\n}"
               : HFL_32(0), HFL_32(32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}
// The same with 64 tokens.
__device__ __forceinline__ void product_u8(int (&x)[32], const uint32_t* a, uint64_t b, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {" HFL_32_NAMES
               "}, {%32, %33, %34, %35}, %36, more;\n}"
               : HFL_32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}
// The same with 16 tokens.
__device__ __forceinline__ void product_u8(int (&x)[8], const uint32_t* a, uint64_t b, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %13, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n16k32.s32.u8.s8 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9, %10, %11}, %12, more;\n}"
               : HFL_8(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}
// The same with 256 tokens.
__device__ __forceinline__ void product_u8(int (&x)[128], const uint32_t* a, uint64_t b, int more) {
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %133, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k32.s32.u8.s8 {" HFL_64_NAMES HFL_NEXT_64_NAMES
               "}, {%128, %129, %130, %131}, %132, more;\n}"
               : HFL_32(0), HFL_32(32), HFL_32(64), HFL_32(96)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}
#undef HFL_8
#undef HFL_32
#undef HFL_32_NAMES
#undef HFL_64_NAMES
#undef HFL_NEXT_64_NAMES

// True in one thread of a warp, all of which ask.
__device__ __forceinline__ bool elected() {
  uint32_t x;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(x));
  return x != 0;
}

// The map itself, which the first copy would wait for.
__device__ __forceinline__ void fetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor map of two axes, to shared memory; counted by the barrier.
__device__ __forceinline__ void copy_tokens(uint32_t to, const CUtensorMap* map, uint64_t& bar, int column, int token) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(to), "l"(map), "r"(shared_address(&bar)), "r"(column), "r"(token)
               : "memory");
}

// Bytes that lie side by side, a multiple of 16, to shared memory; counted by the barrier.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, int bytes, uint64_t& bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(shared_address(&bar))
               : "memory");
}
// The same of what nobody reads again: it leaves the L2 before what somebody does.
__device__ __forceinline__ void copy_once(uint32_t to, const void* from, int bytes, uint64_t& bar) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(shared_address(&bar)), "l"(policy)
               : "memory");
}

#endif

}  // namespace hfl
