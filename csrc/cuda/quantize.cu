// linear.quantize_tokens, quantize_norm and quantize_gated: rows to int8, with the scale and the sum of each.
//
// Paper: QoQ, arXiv:2405.04532, section 5.
// Shapes: x (and y) [M, K] with rows apart, K a multiple of 8 up to 32768; values [M, K], scale and sums [M].
// Grid: a block for a row. Block: up to 1024 threads, each with 8 channels once or up to four times; they stay in
//   registers. Shared memory: what each warp adds up. Bound by: bytes; of few rows, loads and barriers that wait for
//   each other.
//
// Roundings are those of the definition, but for the sum of squares, which is added up as in norm.cu, and the
//   exponential, which is torch's.
#include "../linear.h"

#include <array>

#include "eight.cuh"
#include "linear.cuh"
#include "silu.cuh"

namespace hfl {
namespace {

constexpr int WARP = 32, MOST_THREADS = 1024, MOST_CHANNELS = 32768, MANY = 2048;
constexpr int WIDE = 16, BESIDE = 512;  // rows from which linear_wide.cuh follows; threads of a block beside its own
constexpr float LEAST = 0x1p-100f, ROUNDS = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer

// Of a warp and of a block, the same in all threads. Sizes are numbers of at least 0, which are in order as their bits
// are; a NaN is larger than all.
struct Largest {
  __device__ __forceinline__ uint32_t of_warp(uint32_t x) const { return __reduce_max_sync(0xffffffffu, x); }
};
struct Sum {
  __device__ __forceinline__ int of_warp(int x) const { return __reduce_add_sync(0xffffffffu, x); }
  __device__ __forceinline__ float of_warp(float x) const {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

template <class T, class All>
__device__ __forceinline__ T of_block(T x, All all) {
  __shared__ T parts[MOST_THREADS / WARP];
  const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  x = all.of_warp(x);
  if (blockDim.x == WARP) return x;
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  return all.of_warp(lane < static_cast<int>(blockDim.x) / WARP ? parts[lane] : T(0));
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

// 127 / x, rounded as a division is, of what 16 bits hold of at least LEAST: a division calls a subprogram, for which
// there are no registers.
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
      sum = Sum().of_warp(sum);
      if (lane == 0) parts[p * warps + warp] = sum;
    }
    if (!apart) return of_block(sum, Sum());
    __syncthreads();
    return Sum().of_warp(lane < warps * PIECES ? parts[lane] : 0.0f);
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
    return __uint_as_float(of_block(max(__float_as_uint(pair.x), __float_as_uint(pair.y)), Largest()));
  }

  // Values, and the sum of this thread's. None is beyond 127 by more than what is rounded away.
  __device__ __forceinline__ int write(int64_t row, float up) const {
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
      *reinterpret_cast<uint2*>(a.values + row * a.columns + channel(p)) = words;
    }
    return sum;
  }
};

// THREADS: at most; of fewer, registers are so few that a block fits beside one of linear_wide.cuh, which is then set up
// while this one runs.
template <int PIECES, int KIND, int DTYPE, int THREADS = MOST_THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == BESIDE ? 3 : 1) quantize_kernel(
    const __grid_constant__ hfl_quantize a) {
  const int64_t row = blockIdx.x;
  let_next_begin();
  wait_for_last();
  Row<PIECES, DTYPE> x(a);
  x.read(row);
  if (KIND == HFL_OF_GATE) x.multiply(row);
  if (KIND == HFL_OF_NORM) x.normalize(row);
  const float most = x.largest();
  const bool finite = most < INFINITY;  // and no NaN
  const float up = !finite || most < LEAST ? 0.0f : steps_of(most);
  const int own = x.write(row, up);
  if (threadIdx.x == 0) a.scale[row] = finite ? __fdiv_rn(most, 127.0f) : __int_as_float(0x7fc00000);
  const int sum = of_block(own, Sum());
  if (threadIdx.x == 0) a.sums[row] = sum;
}

// With 8 channels a thread once, twice, four times; and that beside another kernel.
template <int KIND, int DTYPE>
std::array<const void*, 4> kernels() {
  return {reinterpret_cast<const void*>(&quantize_kernel<1, KIND, DTYPE>),
          reinterpret_cast<const void*>(&quantize_kernel<2, KIND, DTYPE>),
          reinterpret_cast<const void*>(&quantize_kernel<4, KIND, DTYPE>),
          reinterpret_cast<const void*>(&quantize_kernel<4, HFL_OF_ROWS, DTYPE, BESIDE>)};
}
template <int DTYPE>
std::array<const void*, 4> kernels_of(int kind) {
  if (kind == HFL_OF_ROWS) return kernels<HFL_OF_ROWS, DTYPE>();
  return kind == HFL_OF_NORM ? kernels<HFL_OF_NORM, DTYPE>() : kernels<HFL_OF_GATE, DTYPE>();
}

const char* check(const hfl_quantize& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "quantize_tokens: expected float16 or bfloat16";
  if (a.kind < HFL_OF_ROWS || a.kind > HFL_OF_GATE) return "quantize_tokens: expected rows, a norm or a gate";
  if (a.tokens < 1 || a.columns < 8 || a.columns % 8 || a.columns > MOST_CHANNELS) {
    return "quantize_tokens: expected rows, of a multiple of 8 channels up to 32768";
  }
  if (a.kind == HFL_OF_NORM && a.weight_dtype != a.dtype && (a.weight_dtype != HFL_F32 || a.early)) {
    return "quantize_tokens: expected a weight of the dtype of the rows";
  }
  const bool gate = a.kind == HFL_OF_GATE;
  const bool norm = a.kind == HFL_OF_NORM;
  for (const void* x : {a.x, gate ? a.y : nullptr, norm ? a.weight : nullptr, static_cast<const void*>(a.normed)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "quantize_tokens: expected tensors at multiples of 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(a.values) % 8) return "quantize_tokens: expected values at a multiple of 8 bytes";
  if (a.x_row % 8 || (gate && a.y_row % 8)) return "quantize_tokens: expected rows at multiples of 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_quantize_cuda(const hfl_quantize* a) {
  if (const char* message = hfl::check(*a)) return message;
  const int warps = (a->columns / 8 + hfl::WARP - 1) / hfl::WARP;
  const bool beside = a->kind == HFL_OF_ROWS && a->tokens >= hfl::WIDE && a->tokens < hfl::MANY &&
                      warps <= 4 * hfl::BESIDE / hfl::WARP;
  const int most = (beside ? hfl::BESIDE : hfl::MOST_THREADS) / hfl::WARP;
  const auto kernels =
      a->dtype == HFL_BF16 ? hfl::kernels_of<HFL_BF16>(a->kind) : hfl::kernels_of<HFL_F16>(a->kind);
  // Of few rows, more threads are done sooner; of many, smaller blocks are more rows at a time. A norm of which a thread
  // has more than 8 channels in norm.cu has as many here.
  int which = a->tokens >= hfl::MANY && warps >= 4 && (a->kind != HFL_OF_NORM || warps <= most) ? 2 : 0;
  while (warps > most << which) ++which;
  const void* kernel = kernels[static_cast<size_t>(beside && which == 2 ? 3 : which)];
  const int threads = (warps + (1 << which) - 1) / (1 << which) * hfl::WARP;
  hfl_quantize copy = *a;
  void* arguments[] = {&copy};
  cudaError_t error = hfl::keep_shared(kernel);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = hfl::launch(kernel, dim3(static_cast<unsigned>(a->tokens)), threads, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
