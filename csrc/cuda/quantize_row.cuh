// A row of 16-bit channels in the registers of a block, as quantize.cu and linear_one.cuh make 8 bits of it. Roundings are
// those of the definition, but for the sum of squares, which is added up as in norm.cu, and the exponential, which is
// torch's.
#pragma once
#include "../linear.h"
#include "eight.cuh"
#include "linear.cuh"
#include "silu.cuh"

namespace hfl {

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr float LEAST = 0x1p-100f, ROUNDS = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x + y;
  }
};

// Of a warp, the same in all threads.
__device__ __forceinline__ uint32_t most_of_warp(uint32_t x) {
  uint32_t y;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ int sum_of_warp(int x) {
  int y;
  asm volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}

// The same in all threads.
template <class T, class Both>
__device__ __forceinline__ T of_block(T x, Both both, T nothing) {
  __shared__ T parts[MOST_THREADS / WARP];
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x = both(x, __shfl_xor_sync(0xffffffffu, x, step));
  if (blockDim.x == WARP) return x;
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x) / WARP ? parts[lane] : nothing;
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) x = both(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

__device__ __forceinline__ uint32_t low_bytes(const uint32_t* of) {
  return __byte_perm(__byte_perm(of[0], of[1], 0x0040), __byte_perm(of[2], of[3], 0x0040), 0x5410);
}

// Pairs of 16 bits: the product, rounded, and the larger of two sizes; a NaN stays one.
template <int DTYPE>
__device__ __forceinline__ uint32_t product(uint32_t x, uint32_t y) {
  if (DTYPE == HFL_BF16) {
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(y), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  }
  return x;
}
template <int DTYPE>
__device__ __forceinline__ uint32_t larger(uint32_t most, uint32_t x) {
  x &= 0x7fff7fffu;
  if (DTYPE == HFL_BF16) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(most) : "r"(x));
  } else {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(most) : "r"(x));
  }
  return most;
}
template <int DTYPE>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  return DTYPE == HFL_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Of integers of a block, by one instruction a warp, the same in all threads. Sizes are in order as their bits are; a NaN
// is larger than all.
template <class Warp>
__device__ __forceinline__ auto all_of_block(uint32_t x, Warp&& of_warp) {
  __shared__ uint32_t parts[MOST_THREADS / WARP];
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  x = of_warp(x);
  if (blockDim.x == WARP) return x;
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  return of_warp(lane < static_cast<int>(blockDim.x) / WARP ? parts[lane] : 0u);
}
__device__ __forceinline__ float largest_of_block(float x) {
  const auto most = [](uint32_t y) -> uint32_t { return __reduce_max_sync(0xffffffffu, y); };
  return __uint_as_float(all_of_block(__float_as_uint(x), most));
}
__device__ __forceinline__ int sum_of_block(int x) {
  const auto sum = [](uint32_t y) -> uint32_t { return __reduce_add_sync(0xffffffffu, y); };
  return static_cast<int>(all_of_block(static_cast<uint32_t>(x), sum));
}

template <int PIECES, int DTYPE>
struct Row {
  const hfl_quantize& a;
  uint4 x[PIECES];  // 16-bit channels

  __device__ explicit Row(const hfl_quantize& a_) : a(a_) {}

  __device__ __forceinline__ int channel(int p) const {
    return static_cast<int>(threadIdx.x + static_cast<unsigned>(p) * blockDim.x) * 8;
  }
  __device__ __forceinline__ Eight eight(int p) const { return unpack(Raw{x[p], {}}, DTYPE); }
  __device__ __forceinline__ void keep(int p, const Eight& y) {
    x[p] = make_uint4(packed<DTYPE>(y.x[0], y.x[1]), packed<DTYPE>(y.x[2], y.x[3]), packed<DTYPE>(y.x[4], y.x[5]),
                      packed<DTYPE>(y.x[6], y.x[7]));
  }

  // To the L2, while kernels before this one run: what none of them writes is not there after weights went through it.
  __device__ __forceinline__ void ask(const void* rows, int64_t at) const {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      if (channel(p) % 64 || channel(p) >= a.columns) continue;  // a line of 128 bytes
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint16_t*>(rows) + at + channel(p)));
    }
  }

  __device__ __forceinline__ void read(int64_t row) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      x[p] = make_uint4(0, 0, 0, 0);
      if (channel(p) < a.columns) x[p] = load(a.x, row * a.x_row + channel(p), DTYPE).low;
    }
  }

  __device__ __forceinline__ void multiply(int64_t row) {
    constexpr int AT_ONCE = PIECES < 2 ? PIECES : 2;  // on their way before one is waited for
#pragma unroll
    for (int first = 0; first < PIECES; first += AT_ONCE) {
      uint4 other[AT_ONCE] = {};
#pragma unroll
      for (int p = 0; p < AT_ONCE; ++p) {
        if (channel(first + p) < a.columns) other[p] = load(a.y, row * a.y_row + channel(first + p), DTYPE).low;
      }
#pragma unroll
      for (int p = 0; p < AT_ONCE; ++p) {
        Eight gate = eight(first + p);
#pragma unroll
        for (int i = 0; i < 8; ++i) gate.x[i] = silu_near(gate.x[i], DTYPE);
        keep(first + p, gate);
        uint4& to = x[first + p];
        to = make_uint4(product<DTYPE>(to.x, other[p].x), product<DTYPE>(to.y, other[p].y),
                        product<DTYPE>(to.z, other[p].z), product<DTYPE>(to.w, other[p].w));
      }
    }
  }

  // The sum of all squares, the same in all threads, added up in the order of norm.cu: there a thread has 8 channels, or,
  // where a block has not so many threads, 16.
  __device__ __forceinline__ float squares() const {
    __shared__ float parts[MOST_THREADS / WARP];
    const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
    const int warps = static_cast<int>(blockDim.x) / WARP;
    const bool apart = warps * PIECES <= WARP;
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const Eight y = eight(p);
      if (apart) sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(y.x[i], y.x[i], sum);
      if (!apart) continue;
#pragma unroll
      for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) parts[p * warps + warp] = sum;
    }
    if (!apart) return of_block(sum, Sum(), 0.0f);
    __syncthreads();
    sum = lane < warps * PIECES ? parts[lane] : 0.0f;
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }

  __device__ __forceinline__ void normalize(int64_t row) {
    const float mean = __fmul_rn(squares(), __fdiv_rn(1.0f, static_cast<float>(a.columns)));
    const float factor = rsqrtf(__fadd_rn(mean, a.eps));
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      if (channel(p) >= a.columns) continue;
      // unpacked anew: what was unpacked for the squares is not kept, as there is no room for it
      asm volatile("" : "+r"(x[p].x), "+r"(x[p].y), "+r"(x[p].z), "+r"(x[p].w));
      const Raw stored = load(a.weight, channel(p), a.weight_dtype);
      const Eight scale = a.weight_dtype == HFL_F32 ? unpack(stored, HFL_F32) : unpack(stored, DTYPE);
      Eight y = eight(p);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float unit = __fmul_rn(y.x[i], factor);
        y.x[i] = __fmul_rn(a.early ? rounded_16(unit, DTYPE) : unit, __fadd_rn(scale.x[i], a.offset));
      }
      keep(p, y);
      if (a.normed) *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.normed) + row * a.columns + channel(p)) = x[p];
    }
  }

  __device__ __forceinline__ float largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      most = larger<DTYPE>(larger<DTYPE>(most, x[p].x), x[p].y);
      most = larger<DTYPE>(larger<DTYPE>(most, x[p].z), x[p].w);
    }
    const float2 pair = DTYPE == HFL_BF16 ? unpack_bf16(most) : unpack_f16(most);
    return largest_of_block(__uint_as_float(max(__float_as_uint(pair.x), __float_as_uint(pair.y))));
  }

  // Eight values at a time, with their first channel, and the sum of this thread's. None is beyond 127 by more than what
  // is rounded away.
  template <class Put>
  __device__ __forceinline__ int write(float up, Put&& put) const {
    int sum = 0;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      if (channel(p) >= a.columns) continue;
      uint2 words = make_uint2(0, 0);
      if (up != 0.0f) {
        const Eight y = eight(p);
        uint32_t values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = __float_as_uint(__fadd_rn(__fmul_rn(y.x[i], up), ROUNDS));  // its low byte is the integer
        }
        words = make_uint2(low_bytes(values), low_bytes(values + 4));
        sum = __dp4a(static_cast<int>(words.x), 0x01010101, sum);
        sum = __dp4a(static_cast<int>(words.y), 0x01010101, sum);
      }
      put(channel(p), words);
    }
    return sum;
  }
};

// 127 / x, rounded as a division is, of what 16 bits hold of at least LEAST: a division calls a subprogram, for which
// there may be no registers.
__device__ __forceinline__ float steps_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  const float part = __uint_as_float((bits & 0x7fffffu) | 128u << 23);  // of 2 to 4
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(part));
  y = __fmaf_rn(y, __fmaf_rn(-part, y, 1.0f), y);
  float steps = __fmul_rn(y, 127.0f);
  steps = __fmaf_rn(y, __fmaf_rn(-part, steps, 127.0f), steps);
  return __fmul_rn(steps, __uint_as_float((255u << 23) - (bits & 0x7f800000u)));
}

// x / 127, rounded as a division is: what a first quotient lacks is exact.
__device__ __forceinline__ float step_of(float x) {
  constexpr float PART = 1.0f / 127.0f;
  const float step = __fmul_rn(x, PART);
  return __fmaf_rn(__fmaf_rn(-127.0f, step, x), PART, step);
}

// What a row is multiplied with to become 8 bits, and what they are multiplied with; not a number where it is none.
struct Steps {
  float up, scale;
  __device__ __forceinline__ explicit Steps(float most) {
    const bool finite = most < INFINITY;  // and no NaN
    up = !finite || most < LEAST ? 0.0f : steps_of(most);
    scale = finite ? step_of(most) : __int_as_float(0x7fc00000);
  }
};

}  // namespace hfl
