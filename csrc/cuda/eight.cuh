// Eight values of any dtype at a time: 16 bytes of a 16-bit one, 32 of float32.
#pragma once
#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {

struct Eight {
  float x[8];
};

// Eight values of the call's dtype as they lie in memory; of 16 bits only `low` is used.
struct Raw {
  uint4 low, high;
};

// `index` counts values and is a multiple of 8.
__device__ __forceinline__ Raw load(const void* from, int64_t index, int dtype) {
  Raw out = {};
  if (dtype == HFL_F32) {
    const uint4* at = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + index);
    out.low = at[0], out.high = at[1];
  } else {
    out.low = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + index);
  }
  return out;
}

__device__ __forceinline__ Eight unpack(const Raw& raw, int dtype) {
  const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair = dtype == HFL_BF16 ? unpack_bf16(words[i / 2]) : unpack_f16(words[i / 2]);
    out.x[i] = dtype == HFL_F32 ? __uint_as_float(words[i]) : i % 2 ? pair.y : pair.x;
  }
  return out;
}

// As `load`, the other way; rounds to the nearest.
__device__ __forceinline__ void store(void* to, int64_t index, const Eight& x, int dtype) {
  if (dtype == HFL_F32) {
    float4* at = reinterpret_cast<float4*>(static_cast<float*>(to) + index);
    at[0] = make_float4(x.x[0], x.x[1], x.x[2], x.x[3]);
    at[1] = make_float4(x.x[4], x.x[5], x.x[6], x.x[7]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = x.x[2 * i], high = x.x[2 * i + 1];
    words[i] = dtype == HFL_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + index) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace hfl
