// What kernels that read bounds, and keys, have in common: products of 16 rows by their type, and the larger number.
#pragma once
#include "ptx.cuh"

namespace hfl {

// NaN where one of them is.
__device__ __forceinline__ float most_of(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, __half) {
  mma_f16(c, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, __nv_bfloat16) {
  mma_bf16(c, a, b0, b1);
}

}  // namespace hfl
