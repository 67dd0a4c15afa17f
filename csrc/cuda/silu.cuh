// x / (1 + exp(-x)) of numbers of 16 bits, to the bit as torch rounds it.
#pragma once
#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {

__device__ __forceinline__ float rounded_16(float x, int dtype) {
  return dtype == HFL_BF16 ? __bfloat162float(__float2bfloat16_rn(x)) : __half2float(__float2half_rn(x));
}

// What is rounded to that. The fast way is off by less than 2^-18 of the result: it does wherever that cannot turn the
// rounding, which is looked for in the bits that are rounded away; not where float16 has fewer of them than else.
__device__ __forceinline__ float silu_near(float x, int dtype) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -LOG2E)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(power, 1.0f)));
  const float fast = __fmul_rn(x, inverse);
  const uint32_t half = dtype == HFL_BF16 ? 1u << 15 : 1u << 12, off = 1u << 6;
  const uint32_t rest = __float_as_uint(fast) & (2 * half - 1);
  const bool near = dtype == HFL_BF16 ? x > -32.0f : fabsf(fast) > 0x1p-12f;
  return near && rest - (half - off) >= 2 * off ? fast : __fdiv_rn(x, __fadd_rn(1.0f, expf(-x)));
}

__device__ __forceinline__ float silu(float x, int dtype) { return rounded_16(silu_near(x, dtype), dtype); }

}  // namespace hfl
