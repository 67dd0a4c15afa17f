// ops.rotate_heads: queries and keys turned to their positions: one launch instead of ten.
//
// Shapes: q [B, Hq, T, D] and k [B, Hkv, T, D] with any strides of rows, D and the channels that are turned multiples
// of 8; cos and sin [B or 1, T, size or size / 2]; out contiguous.
// Grid: as many blocks as there is work. Block: 128 threads, one for four channels and the four that turn with them, or
// for eight that stay. Shared memory: none. Bound by: a load and a store that wait for each other.
//
// Every rounding is that of the definition: of each product and of the sum, to the dtype of cos and sin, then to q's.
#include "../hf_longctx.h"
#include "divide.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 128;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <class T>
__device__ __forceinline__ Four<T> four(const T* from) {
  return *reinterpret_cast<const Four<T>*>(from);
}

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ float value(__half x) { return __half2float(x); }
__device__ __forceinline__ float value(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T>
__device__ __forceinline__ float rounded(float x) {
  T y;
  assign(y, x);
  return value(y);
}

// x * cos + y * sin
template <class Angle>
__device__ __forceinline__ float turned(float x, float cos, float y, float sin) {
  const float first = rounded<Angle>(__fmul_rn(x, cos)), second = rounded<Angle>(__fmul_rn(y, sin));
  return rounded<Angle>(__fadd_rn(first, second));
}

struct Task {
  hfl_turn a;
  Divisor pieces, heads, tokens;  // of a head; of queries and keys
  int work;
};

template <class T, class Angle>
__global__ void __launch_bounds__(THREADS) turn_kernel(const Task p) {
  const hfl_turn& a = p.a;
  const int place = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  const int row = p.pieces.divide(place), piece = place - row * p.pieces.by;
  const int token = p.heads.divide(row), head = row - token * p.heads.by;
  const int b = p.tokens.divide(token), t = token - b * p.tokens.by;
  wait_for_previous(piece);
  if (place >= p.work) return;
  const bool query = head < a.q_heads;
  const int h = query ? head : head - a.q_heads, count = query ? a.q_heads : a.kv_heads;
  const int64_t at = query ? b * a.q_b + h * a.q_h + t * a.q_t : b * a.k_b + h * a.k_h + t * a.k_t;
  const T* from = static_cast<const T*>(query ? a.q : a.k) + at;
  T* to = static_cast<T*>(query ? a.q_out : a.k_out) + ((static_cast<int64_t>(b) * count + h) * a.tokens + t) * a.dim;
  const bool stays = piece * 8 >= a.size;
  const int i = stays ? piece * 8 : piece * 4, j = stays ? i + 4 : i + a.size / 2;
  Four<T> x = four(from + i), y = four(from + j);
  if (!stays) {
    const int64_t angle = b * a.angle_b + t * a.angle_t;
    const Angle *cos = static_cast<const Angle*>(a.cos) + angle, *sin = static_cast<const Angle*>(a.sin) + angle;
    const int other = a.pairs ? i : j;
    const Four<Angle> cos_x = four(cos + i), sin_x = four(sin + i);
    const Four<Angle> cos_y = four(cos + other), sin_y = four(sin + other);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float before = value(x.x[n]), after = value(y.x[n]);
      assign(x.x[n], turned<Angle>(before, value(cos_x.x[n]), -after, value(sin_x.x[n])));
      assign(y.x[n], turned<Angle>(after, value(cos_y.x[n]), before, value(sin_y.x[n])));
    }
  }
  *reinterpret_cast<Four<T>*>(to + i) = x;
  *reinterpret_cast<Four<T>*>(to + j) = y;
}

using Kernel = void (*)(Task);

template <class T>
Kernel kernel_of(const hfl_turn& a) {
  return a.angle_dtype == HFL_F32 ? turn_kernel<T, float> : turn_kernel<T, T>;
}

const char* check(const hfl_turn& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "rotate_heads: expected float32, float16 or bfloat16";
  if (a.angle_dtype != a.dtype && a.angle_dtype != HFL_F32) {
    return "rotate_heads: expected cos and sin in the dtype of the queries, or in float32";
  }
  if (a.dim < 8 || a.dim % 8 || a.size < 8 || a.size % 8 || a.size > a.dim) {
    return "rotate_heads: expected multiples of 8 channels, and no more that are turned than there are";
  }
  if (a.batch < 1 || a.q_heads < 1 || a.kv_heads < 0 || a.tokens < 1) {
    return "rotate_heads: expected no empty axis but that of KV heads";
  }
  const int64_t heads = static_cast<int64_t>(a.q_heads) + a.kv_heads, rows = static_cast<int64_t>(a.batch) * a.tokens;
  if (heads > INT32_MAX / a.dim || rows > INT32_MAX / (heads * a.dim)) {
    return "rotate_heads: expected fewer than 2^31 channels in all";
  }
  const int64_t bytes = a.dtype == HFL_F32 ? 16 : 8, angle_bytes = a.angle_dtype == HFL_F32 ? 16 : 8;
  const void* const tensors[] = {a.q, a.k, a.q_out, a.k_out};
  for (const void* x : tensors) {
    if (reinterpret_cast<uintptr_t>(x) % bytes) return "rotate_heads: expected rows that begin at every fourth element";
  }
  for (const void* x : {a.cos, a.sin}) {
    if (reinterpret_cast<uintptr_t>(x) % angle_bytes) {
      return "rotate_heads: expected angles that begin at every fourth element";
    }
  }
  for (int64_t stride : {a.q_b, a.q_h, a.q_t, a.k_b, a.k_h, a.k_t, a.angle_b, a.angle_t}) {
    if (stride % 4) return "rotate_heads: expected rows that begin at every fourth element";
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_turn_cuda(const hfl_turn* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const hfl::Kernel kernel = a->dtype == HFL_F32   ? hfl::turn_kernel<float, float>
                             : a->dtype == HFL_F16 ? hfl::kernel_of<__half>(*a)
                                                   : hfl::kernel_of<__nv_bfloat16>(*a);
  const int heads = a->q_heads + a->kv_heads, pieces = a->dim / 8, work = a->batch * a->tokens * heads * pieces;
  const unsigned blocks = static_cast<unsigned>((work - 1) / hfl::THREADS + 1);
  hfl::Task task = {*a, hfl::Divisor(pieces), hfl::Divisor(heads), hfl::Divisor(a->tokens), work};
  void* arguments[] = {&task};
  const void* code = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = hfl::launch(code, dim3(blocks), hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
