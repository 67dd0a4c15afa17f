// A step's token of 16 bits into its slot, and the bounds of its sub-block: as append_token, of one format, where
// nothing that is read was written just before.
#pragma once
#include "append.cuh"
#include "ptx.cuh"

namespace hfl {

__device__ __forceinline__ uint32_t least_pair(uint32_t x, uint32_t y, __half) {
  return bits_of(__hmin2_nan(as_f16(x), as_f16(y)));
}
__device__ __forceinline__ uint32_t least_pair(uint32_t x, uint32_t y, __nv_bfloat16) {
  return bits_of(__hmin2_nan(as_bf16(x), as_bf16(y)));
}
__device__ __forceinline__ uint32_t most_pair(uint32_t x, uint32_t y, __half) {
  return bits_of(__hmax2_nan(as_f16(x), as_f16(y)));
}
__device__ __forceinline__ uint32_t most_pair(uint32_t x, uint32_t y, __nv_bfloat16) {
  return bits_of(__hmax2_nan(as_bf16(x), as_bf16(y)));
}

// Eight channels.
template <typename T>
__device__ __forceinline__ void bound_eight(uint4& low, uint4& high, const uint4& least, const uint4& most) {
  low.x = least_pair(low.x, least.x, T()), low.y = least_pair(low.y, least.y, T());
  low.z = least_pair(low.z, least.z, T()), low.w = least_pair(low.w, least.w, T());
  high.x = most_pair(high.x, most.x, T()), high.y = most_pair(high.y, most.y, T());
  high.z = most_pair(high.z, most.z, T()), high.w = most_pair(high.w, most.w, T());
}

// Of 128 channels, into a store without a ring, by a block of 256; `room`: 4 KiB. `from`: number of the fresh token.
template <typename T>
__device__ __forceinline__ void append_row(const hfl_append& a, int from, int b, int head, void* room) {
  constexpr int CHUNKS = 16, GROUPS = 16, WARPS = 8;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % CHUNKS, group = thread / CHUNKS;
  const uint4 key = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.fresh_k) + b * a.fk_b + from * a.fk_h +
                                                    chunk * 8);
  const uint4 value = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.fresh_v) + b * a.fv_b + from * a.fv_h +
                                                      chunk * 8);
  const int64_t pos = a.pos[b * a.pos_b];
  if (pos < 0 || pos >= a.capacity) return;
  T* keys = static_cast<T*>(a.k.data) + b * a.k.b + head * a.k.h + chunk * 8;
  T* values = static_cast<T*>(a.v.data) + b * a.v.b + head * a.v.h + chunk * 8;
  if (group == 0) *reinterpret_cast<uint4*>(keys + pos * a.k.t) = key;
  if (group == 1) *reinterpret_cast<uint4*>(values + pos * a.v.t) = value;
  if (!a.bounds) return;
  const int entry = static_cast<int>(pos) / a.sub;
  uint4 low = key, high = key;
#pragma unroll 1
  for (int64_t slot = static_cast<int64_t>(entry) * a.sub + group; slot < pos; slot += GROUPS) {
    const uint4 other = __ldcg(reinterpret_cast<const uint4*>(keys + slot * a.k.t));
    bound_eight<T>(low, high, other, other);
  }
  uint4* lows = static_cast<uint4*>(room);
  uint4* highs = lows + WARPS * CHUNKS;
  {
    const auto across = [](const uint4& x) {
      return make_uint4(__shfl_xor_sync(0xffffffffu, x.x, 16), __shfl_xor_sync(0xffffffffu, x.y, 16),
                        __shfl_xor_sync(0xffffffffu, x.z, 16), __shfl_xor_sync(0xffffffffu, x.w, 16));
    };
    bound_eight<T>(low, high, across(low), across(high));
  }
  if (thread % 32 < CHUNKS) lows[thread / 32 * CHUNKS + chunk] = low, highs[thread / 32 * CHUNKS + chunk] = high;
  __syncthreads();
  if (thread >= CHUNKS) return;
#pragma unroll 1
  for (int warp = 1; warp < WARPS; ++warp) {
    bound_eight<T>(low, high, lows[warp * CHUNKS + chunk], highs[warp * CHUNKS + chunk]);
  }
  const int64_t at = b * a.bounds_b + head * a.bounds_h + static_cast<int64_t>(entry) * 256 + chunk * 8;
  T* to = static_cast<T*>(a.bounds) + at;
  *reinterpret_cast<uint4*>(to) = low, *reinterpret_cast<uint4*>(to + 128) = high;
}

}  // namespace hfl
