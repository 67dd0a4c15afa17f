// Fresh tokens into their slots, and bounds of stored keys: by a warp, and by a block. append.cu says what is computed.
#pragma once
#include <math.h>

#include "eight.cuh"
#include "numbers.cuh"

namespace hfl {

__device__ __forceinline__ float least_of(float a, float b) { return a < b || a != a ? a : b; }

// A lane's eight channels as they are packed, and the scale and zero of the token.
struct Encoded {
  uint2 payload;
  __half scale, zero;
};

// In float32 before the last rounding, which keeps their order.
__device__ __forceinline__ Eight decode(const Encoded& from, int bits) {
  const float scale = __half2float(from.scale), zero = __half2float(from.zero);
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t byte = ((i < 4 ? from.payload.x : from.payload.y) >> (i % 4 * 8)) & 255u;
    const uint32_t number = bits == 8 ? byte : (from.payload.x >> (4 * i)) & 15u;
    out.x[i] = __fmul_rn(__fsub_rn(static_cast<float>(number), zero), scale);
  }
  return out;
}

// One lane's eight channels of a stored token, as `decode`.
__device__ __forceinline__ Eight read_stored(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot, int channel,
                                             int dtype) {
  const int64_t start = b * rows.b + h * rows.h + slot * rows.t;
  if (rows.bits == 0) return unpack(load(rows.data, start + channel, dtype), dtype);
  const uint8_t* at = static_cast<const uint8_t*>(rows.data) + start + channel * rows.bits / 8;
  const int64_t side = b * rows.scale_b + h * rows.scale_h + slot;
  Encoded from;
  from.scale = static_cast<const __half*>(rows.scale)[side];
  from.zero = static_cast<const __half*>(rows.zero)[side];
  if (rows.bits == 8) {
    from.payload = *reinterpret_cast<const uint2*>(at);
  } else {
    from.payload = make_uint2(*reinterpret_cast<const uint32_t*>(at), 0);
  }
  return decode(from, rows.bits);
}

// A warp quantizes a token as ops.encode_kv does; `active`: the lane has channels.
__device__ __forceinline__ Encoded encode(const Eight& x, int bits, bool active) {
  float least = INFINITY, largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    least = active ? least_of(x.x[i], least) : least;
    largest = active ? most_of(x.x[i], largest) : largest;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
    least = least_of(__shfl_xor_sync(0xffffffffu, least, step), least);
    largest = most_of(__shfl_xor_sync(0xffffffffu, largest, step), largest);
  }
  const float steps = static_cast<float>((1 << bits) - 1);
  const float size = most_of(fabsf(least), fabsf(largest)) * (1.0f / 2048.0f);
  const float wide = most_of(__fdiv_rn(__fsub_rn(largest, least), steps), size);
  Encoded out;
  out.scale = __float2half_rn(most_of(wide, 6.103515625e-05f));  // the least normal number
  const float divisor = __half2float(out.scale);
  out.zero = __float2half_rn(__fdiv_rn(-least, divisor));
  const float shift = __half2float(out.zero);
  out.payload = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float y = rintf(__fadd_rn(__fdiv_rn(x.x[i], divisor), shift));
    const uint32_t number = static_cast<uint32_t>(fminf(fmaxf(y, 0.0f), steps));
    if (bits == 4) {
      out.payload.x |= number << (4 * i);
    } else if (i < 4) {
      out.payload.x |= number << (8 * i);
    } else {
      out.payload.y |= number << (8 * (i - 4));
    }
  }
  return out;
}

// A warp writes what it has packed of a token.
__device__ __forceinline__ void write_packed(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot,
                                             const Encoded& x, int lane, bool active) {
  uint8_t* to = static_cast<uint8_t*>(rows.data) + b * rows.b + h * rows.h + slot * rows.t + lane * rows.bits;
  if (active && rows.bits == 8) *reinterpret_cast<uint2*>(to) = x.payload;
  if (active && rows.bits == 4) *reinterpret_cast<uint32_t*>(to) = x.payload.x;
  if (lane == 0) {
    const int64_t side = b * rows.scale_b + h * rows.scale_h + slot;
    static_cast<__half*>(rows.scale)[side] = x.scale;
    static_cast<__half*>(rows.zero)[side] = x.zero;
  }
}

// A warp writes one token of the keys, or of the values; `active`: the lane has channels, `raw`.
__device__ __forceinline__ void write_token(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot, const Raw& raw,
                                            int dtype, int lane, bool active) {
  if (rows.bits) {
    const Encoded packed = encode(unpack(raw, dtype), rows.bits, active);
    write_packed(rows, b, h, slot, packed, lane, active);
  } else if (active) {
    const int bytes = dtype == HFL_F32 ? 4 : 2;
    const int64_t to = b * rows.b + h * rows.h + slot * rows.t + lane * 8;
    uint4* target = reinterpret_cast<uint4*>(static_cast<char*>(rows.data) + to * bytes);
    target[0] = raw.low;
    if (bytes == 4) target[1] = raw.high;
  }
}

__device__ __forceinline__ void write_value(void* to, int64_t index, float x, int dtype) {
  if (dtype == HFL_F32) static_cast<float*>(to)[index] = x;
  if (dtype == HFL_F16) static_cast<__half*>(to)[index] = __float2half_rn(x);
  if (dtype == HFL_BF16) static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(x);
}

// The slot of a position.
__device__ __forceinline__ int64_t slot_of(const hfl_append& a, int64_t pos) {
  const bool round = a.ring > 0 && pos >= a.sink;
  return round ? a.sink + static_cast<uint32_t>(pos - a.sink) % static_cast<uint32_t>(a.ring) : pos;
}

// Bounds of the keys in slots `first` to `last`, by all threads; `room`: [2, groups, D] floats, at most 16 a thread.
template <int THREADS>
__device__ __forceinline__ void bound(const hfl_append& a, int64_t b, int64_t h, int64_t first, int64_t last,
                                      void* entry, float* room) {
  const int chunks = a.dim / 8, groups = THREADS / chunks;
  const int chunk = static_cast<int>(threadIdx.x) % chunks, group = static_cast<int>(threadIdx.x) / chunks;
  if (group < groups) {
    Eight low, high;
#pragma unroll
    for (int i = 0; i < 8; ++i) low.x[i] = INFINITY, high.x[i] = -INFINITY;
    for (int64_t slot = first + group; slot <= last; slot += groups) {
      const Eight key = read_stored(a.k, b, h, slot, chunk * 8, a.dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) low.x[i] = least_of(key.x[i], low.x[i]), high.x[i] = most_of(key.x[i], high.x[i]);
    }
    float4* to = reinterpret_cast<float4*>(room + group * a.dim + chunk * 8);
    to[0] = make_float4(low.x[0], low.x[1], low.x[2], low.x[3]);
    to[1] = make_float4(low.x[4], low.x[5], low.x[6], low.x[7]);
    to += groups * a.dim / 4;
    to[0] = make_float4(high.x[0], high.x[1], high.x[2], high.x[3]);
    to[1] = make_float4(high.x[4], high.x[5], high.x[6], high.x[7]);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * a.dim; i += THREADS) {
    const bool upper = i >= a.dim;
    const float* from = room + (upper ? (groups - 1) * a.dim : 0) + i;
    float x = from[0];
#pragma unroll 8
    for (int g = 1; g < groups; ++g) {
      const float y = from[g * a.dim];
      x = upper ? most_of(y, x) : least_of(y, x);
    }
    write_value(entry, i, x, a.dtype);
  }
  __syncthreads();
}

// Store a step's token of a row and KV head, which is number `from` of the fresh ones, and bound its sub-block: by a
// block, whose first warp takes the key and whose second the value. `stored`: a counter that is set to `readers` once
// the token is there, or nullptr.
template <int THREADS>
__device__ __forceinline__ void append_token(const hfl_append& a, int from, int batch, int head, int* stored,
                                             int readers, float* room) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool active = warp < 2 && lane * 8 < (warp ? a.v_dim : a.dim);
  Raw raw = {};
  if (active) {
    const int64_t at = warp ? batch * a.fv_b + from * a.fv_h : batch * a.fk_b + from * a.fk_h;
    raw = load(warp ? a.fresh_v : a.fresh_k, at + lane * 8, a.dtype);
  }
  const int64_t pos = a.pos[batch * a.pos_b], slot = slot_of(a, pos);
  const bool written = pos >= 0 && slot < a.capacity;
  if (written && warp < 2) write_token(warp ? a.v : a.k, batch, head, slot, raw, a.dtype, lane, active);
  __syncthreads();
  if (stored && threadIdx.x == 0) store_in_order(stored, readers);
  if (!a.bounds || !written) return;
  const int entry = static_cast<int>(pos) / a.sub;
  const int64_t at = batch * a.bounds_b + head * a.bounds_h + static_cast<int64_t>(entry) * 2 * a.dim;
  bound<THREADS>(a, batch, head, static_cast<int64_t>(entry) * a.sub, pos, static_cast<char*>(a.bounds) + at * 2, room);
}

}  // namespace hfl
