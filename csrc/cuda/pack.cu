// A prompt's or a step's tokens of 16 bits into slots of 4 or 8, and the values that are then read of them: what
// ops.fill_pages and ops.append_pages do where stores have no bounds and no ring.
//
// Paper: the format is that of QServe (arXiv:2405.04532) section 4.2.
// Shapes: stores [B, Hkv', C, D], tokens [B, Hkv, T, D], D a multiple of 8 up to 128.
// Grid: (tokens of all rows and heads, 64 a block; keys and values). Block: 256 threads; 16 lanes take a token, 8
//   channels each, and have loads of EACH of them under way. Shared memory: none. Bound by: bytes, and nearly by what
//   is computed for each number: hence no division, and extremes in pairs of 16 bits.
//
// All roundings are those of the definition, in its order; a NaN stays one.
#include "pack.h"

#include "eight.cuh"
#include "launch.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 256, LANES = 16, GROUPS = THREADS / LANES, EACH = 4, MOST_CHANNELS = LANES * 8;
constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, the low bits of it

struct Pack {
  hfl_fill fill;
  int items, early;
};

template <bool BF16>
__device__ __forceinline__ uint32_t least_pair(uint32_t x, uint32_t y) {  // a NaN if one of both is
  if (BF16) {
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  } else {
    asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  }
  return x;
}
template <bool BF16>
__device__ __forceinline__ uint32_t largest_pair(uint32_t x, uint32_t y) {
  if (BF16) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  } else {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  }
  return x;
}

// The least in the low half, and minus the largest in the high one, of a token.
template <bool BF16>
__device__ __forceinline__ uint32_t extremes(const uint4& x, bool active) {
  const uint32_t low = least_pair<BF16>(least_pair<BF16>(x.x, x.y), least_pair<BF16>(x.z, x.w));
  const uint32_t high = largest_pair<BF16>(largest_pair<BF16>(x.x, x.y), largest_pair<BF16>(x.z, x.w)) ^ 0x80008000u;
  uint32_t both = least_pair<BF16>(__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
  if (!active) both = BF16 ? 0x7f807f80u : 0x7c007c00u;
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) both = least_pair<BF16>(both, __shfl_xor_sync(0xffffffffu, both, step));
  return both;
}

// x / y to the bit, where r = 1 / y rounded, all are finite, and a quotient too small for this is too small to matter.
__device__ __forceinline__ float quotient(float x, float y, float r) {
  const float q = __fmul_rn(x, r);
  return fmaf(fmaf(-q, y, x), r, q);
}

struct Level {
  float divisor, zero;  // as stored
  __half scale, shift;
};

template <bool BF16, int BITS>
__device__ __forceinline__ Level level_of(uint32_t both) {
  const float2 pair = BF16 ? unpack_bf16(both) : unpack_f16(both);
  const float least = pair.x, largest = -pair.y, steps = (1 << BITS) - 1;
  const float range = __fsub_rn(largest, least);
  const float share = range < INFINITY ? quotient(range, steps, 1.0f / steps) : range;
  const float size = (fabsf(least) > fabsf(largest) ? fabsf(least) : fabsf(largest)) * (1.0f / 2048.0f);
  const float wide = share > size || share != share ? share : size;
  Level out;
  out.scale = __float2half_rn(wide > 6.103515625e-05f || wide != wide ? wide : 6.103515625e-05f);
  out.divisor = __half2float(out.scale);
  out.shift = __float2half_rn(__fdiv_rn(-least, out.divisor));
  out.zero = __half2float(out.shift);
  return out;
}

// Numbers, each added to `ROUNDS`.
__device__ __forceinline__ float number_of(float quotient_of, float zero, float steps) {
  return __fadd_rn(fminf(fmaxf(__fadd_rn(quotient_of, zero), 0.0f), steps), ROUNDS);
}

template <bool BF16, int BITS>
__device__ __forceinline__ uint2 numbers(const uint4& raw, const Level& by, float (&rounded)[8]) {
  const Eight x = unpack(Raw{raw, {}}, BF16 ? HFL_BF16 : HFL_F16);
  constexpr float steps = (1 << BITS) - 1;
  if (by.divisor < INFINITY) {
    const float r = __frcp_rn(by.divisor);
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] = number_of(quotient(x.x[i], by.divisor, r), by.zero, steps);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] = number_of(__fdiv_rn(x.x[i], by.divisor), by.zero, steps);
  }
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t number = __float_as_uint(rounded[i]) - __float_as_uint(ROUNDS);
    words[BITS == 8 ? i / 4 : 0] |= number << (BITS == 8 ? i % 4 * 8 : i * 4);
  }
  return make_uint2(words[0], words[1]);
}

template <bool BF16, int BITS>
__global__ void __launch_bounds__(THREADS) few_bits_kernel(const __grid_constant__ Pack p) {
  const hfl_append& a = p.fill.at;
  const bool keys = blockIdx.y == 0;
  const int lane = static_cast<int>(threadIdx.x) % LANES, group = static_cast<int>(threadIdx.x) / LANES;
  const bool active = lane * 8 < (keys ? a.dim : a.v_dim);
  const int channel = active ? lane * 8 : 0, first = static_cast<int>(blockIdx.x) * GROUPS * EACH + group;
  const uint16_t* fresh = static_cast<const uint16_t*>(keys ? a.fresh_k : a.fresh_v) + channel;
  const int64_t from_b = keys ? a.fk_b : a.fv_b, from_h = keys ? a.fk_h : a.fv_h, from_t = keys ? a.fk_t : a.fv_t;
  if (p.early) {
    wait_for_previous(group);
  } else {
    wait_alone(group);
  }
  uint4 raw[EACH];
  int row[EACH], head[EACH], token[EACH];
  int64_t pos[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const unsigned item = static_cast<unsigned>(min(first + i * GROUPS, p.items - 1));
    const unsigned problem = item / static_cast<unsigned>(a.tokens);
    token[i] = static_cast<int>(item - problem * static_cast<unsigned>(a.tokens));
    row[i] = static_cast<int>(problem / static_cast<unsigned>(a.kv_heads));
    head[i] = static_cast<int>(problem) - row[i] * a.kv_heads;
    const int of = p.fill.heads ? p.fill.heads[head[i]] : head[i];
    raw[i] = *reinterpret_cast<const uint4*>(fresh + row[i] * from_b + of * from_h + token[i] * from_t);
    pos[i] = a.pos ? a.pos[row[i] * a.pos_b + token[i]] : token[i];
  }
  const hfl_rows& rows = keys ? a.k : a.v;
  uint16_t* const read = static_cast<uint16_t*>(keys ? p.fill.read_k : p.fill.read_v);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const Level by = level_of<BF16, BITS>(extremes<BF16>(raw[i], active));
    float rounded[8];
    const uint2 payload = numbers<BF16, BITS>(raw[i], by, rounded);
    if (first + i * GROUPS >= p.items || !active) continue;
    if (pos[i] >= 0 && pos[i] < a.capacity) {
      uint8_t* const to = static_cast<uint8_t*>(rows.data) + row[i] * rows.b + head[i] * rows.h + pos[i] * rows.t;
      if (BITS == 8) *reinterpret_cast<uint2*>(to + lane * 8) = payload;
      if (BITS == 4) *reinterpret_cast<uint32_t*>(to + lane * 4) = payload.x;
      const int64_t side = row[i] * rows.scale_b + head[i] * rows.scale_h + pos[i];
      if (lane == 0) static_cast<__half*>(rows.scale)[side] = by.scale, static_cast<__half*>(rows.zero)[side] = by.shift;
    }
    if (!read) continue;
    Eight y;
#pragma unroll
    for (int j = 0; j < 8; ++j) y.x[j] = __fmul_rn(__fsub_rn(__fsub_rn(rounded[j], ROUNDS), by.zero), by.divisor);
    const int of = p.fill.heads ? p.fill.heads[head[i]] : head[i];
    const int64_t at = keys ? row[i] * p.fill.rk_b + of * p.fill.rk_h + token[i] * p.fill.rk_t
                            : row[i] * p.fill.rv_b + of * p.fill.rv_h + token[i] * p.fill.rv_t;
    store(read, at + channel, y, BF16 ? HFL_BF16 : HFL_F16);
  }
}

}  // namespace

bool packs(const hfl_append& a) {
  const int bits = a.k.bits, most = a.dim > a.v_dim ? a.dim : a.v_dim;
  const bool plain = !a.bounds && a.ring <= 0 && (bits == 4 || bits == 8) && (!a.v.data || a.v.bits == bits);
  const int64_t items = static_cast<int64_t>(a.batch) * a.kv_heads;
  return plain && a.dtype != HFL_F32 && most <= MOST_CHANNELS && items < (1 << 30) / a.tokens;
}

cudaError_t launch_pack(const hfl_fill& fill, void* stream, bool early) {
  const hfl_append& a = fill.at;
  Pack p = {fill, a.batch * a.kv_heads * a.tokens, early};
  const void* kernels[] = {reinterpret_cast<const void*>(&few_bits_kernel<false, 4>),
                           reinterpret_cast<const void*>(&few_bits_kernel<true, 4>),
                           reinterpret_cast<const void*>(&few_bits_kernel<false, 8>),
                           reinterpret_cast<const void*>(&few_bits_kernel<true, 8>)};
  const void* kernel = kernels[(a.k.bits == 8 ? 2 : 0) + (a.dtype == HFL_BF16 ? 1 : 0)];
  const unsigned blocks = static_cast<unsigned>((p.items + GROUPS * EACH - 1) / (GROUPS * EACH));
  void* arguments[] = {&p};
  return launch(kernel, dim3(blocks, a.v.data ? 2 : 1), THREADS, 0, stream, arguments);
}

}  // namespace hfl
