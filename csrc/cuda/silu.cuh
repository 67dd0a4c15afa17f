// x / (1 + exp(-x)) of numbers of 16 bits, to the bit as torch rounds it.
#pragma once
#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {

__device__ __forceinline__ float rounded_16(float x, int dtype) {
  return dtype == HFL_BF16 ? __bfloat162float(__float2bfloat16_rn(x)) : __half2float(__float2half_rn(x));
}

// As torch computes it, rounded to 16 bits. The fast way is off by less than 2^-18 of the result: it does wherever that
// cannot turn the rounding, which is looked for in the bits that are rounded away.
__device__ __forceinline__ float silu(float x, int dtype) {
  const float fast = __fdividef(x, 1.0f + __expf(-x));
  const uint32_t half = dtype == HFL_BF16 ? 1u << 15 : 1u << 12, off = 1u << 6;
  const uint32_t rest = __float_as_uint(fast) & (2 * half - 1);
  const bool sure = fabsf(x) < 16.0f && fabsf(fast) > 0x1p-12f && rest - (half - off) >= 2 * off;
  return rounded_16(sure ? fast : __fdiv_rn(x, __fadd_rn(1.0f, expf(-x))), dtype);
}

}  // namespace hfl
