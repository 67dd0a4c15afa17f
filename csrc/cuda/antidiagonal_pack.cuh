// ops.score_antidiagonal: tiles of queries and of keys side by side, rows of one product, for antidiagonal_wgmma.cuh.
//
// A row has the stride * D channels of a tile, keys in their order and queries last first; zeros stand for queries that
// are not in the call and for keys after the last query. Rounded to 8 bits, a row is divided by its largest channel
// over the largest of such numbers, which is kept beside it; what a channel loses is added to that of the token 256 / D
// further on, which the same lane has, so that little of the sum over a tile's tokens is lost.
// Where the rows of 16 bits can be read as they lie, nothing is done.
// Grid: (tiles / 4 or less, heads, B). Block: 128 threads, a warp has a tile, and those that follow. Bound by: bytes.
#pragma once
#include "antidiagonal_tile.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

namespace hfl {
namespace antidiagonal {

struct Eight {};  // floats of 8 bits, e4m3
struct Whole {};  // whole numbers of 8 bits
template <typename F>
constexpr bool IS_EIGHT = std::is_same<F, Eight>::value || std::is_same<F, Whole>::value;
template <typename F>
using SumOf = std::conditional_t<std::is_same<F, Whole>::value, int32_t, float>;

constexpr int PACK_THREADS = 128, HELD = 8;  // chunks of 8 channels that a thread holds at a time
constexpr unsigned FEW_BLOCKS = 16;              // of a head

template <typename T>
__device__ __forceinline__ float2 two_of(uint32_t x) {
  if constexpr (std::is_same<T, __half>::value) return unpack_f16(x);
  return unpack_bf16(x);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Two numbers rounded to 8 bits each, in the low half, and what these are worth.
template <typename F>
__device__ __forceinline__ uint32_t two_eights(float low, float high, float2& worth) {
  if constexpr (std::is_same<F, Eight>::value) {
    uint16_t x;
    uint32_t halves;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(x) : "f"(high), "f"(low));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(x));
    worth = unpack_f16(halves);
    return x;
  } else {
    const int first = max(min(__float2int_rn(low), 127), -127), second = max(min(__float2int_rn(high), 127), -127);
    worth = make_float2(static_cast<float>(first), static_cast<float>(second));
    return (static_cast<uint32_t>(first) & 0xffu) | (static_cast<uint32_t>(second) & 0xffu) << 8;
  }
}

// The larger one; NaN if either is.
__device__ __forceinline__ float larger(float x, float y) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
}

// One tile, of which this is a thread of the warp that packs it.
template <typename T, bool QUERIES>
struct Tile {
  const Call& call;
  const char* rows;         // of the head
  const int32_t* sources;   // of the tile's queries, last first
  int32_t key, last, lane;  // first key of the tile; last one that there is

  __device__ Tile(const Call& call, int tile, int head, int64_t b) : call(call), lane(threadIdx.x % 32) {
    const hfl_antidiagonal& a = call.a;
    const int64_t own = a.q_pos_b ? b : 0;
    if (QUERIES) {
      rows = static_cast<const char*>(a.q) + (b * a.q_b + head * a.q_h) * 2;
      sources = call.source + own * a.blocks * a.block + (static_cast<int64_t>(call.first) + tile + 1) * a.stride - 1;
    } else {
      rows = static_cast<const char*>(a.k) + (b * a.k_b + head * a.k_h) * 2;
      key = tile * a.stride, last = a.stored - 1;
      if (a.causal) last = min(last, call.last[own]);
    }
  }
  __device__ int chunks() const { return call.a.stride * call.a.dim / 8; }
  __device__ int chunk(int group, int i) const { return (group * HELD + i) * 32 + lane; }

  __device__ void load(int group, uint4 (&held)[HELD]) const {
    const int each = call.a.dim / 8;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int at = chunk(group, i), j = at / each, channel = (at - j * each) * 8;
      int64_t row = -1;
      if (at < chunks()) row = QUERIES ? sources[-j] : key + j <= last ? key + j : -1;
      held[i] = make_uint4(0, 0, 0, 0);
      const int64_t apart = QUERIES ? call.a.q_t : call.a.k_t;
      if (row >= 0) held[i] = *reinterpret_cast<const uint4*>(rows + (row * apart + channel) * 2);
    }
  }
};

template <typename T>
__device__ __forceinline__ float largest(const uint4 (&held)[HELD]) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
#pragma unroll
    for (const uint32_t two : {held[i].x, held[i].y, held[i].z, held[i].w}) {
      const float2 x = two_of<T>(two);
      most = larger(most, larger(fabsf(x.x), fabsf(x.y)));
    }
  }
  return most;
}

// Eight channels, times a factor and with what others lost, as 8 bits; `lost`, if `carries`: what these lose.
template <typename T, typename F>
__device__ __forceinline__ uint2 eight_eights(const uint4& x, float factor, float (&lost)[8], bool carries) {
  const uint32_t from[4] = {x.x, x.y, x.z, x.w};
  uint32_t halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = two_of<T>(from[i]);
    const float low = __fadd_rn(__fmul_rn(two.x, factor), lost[2 * i]);
    const float high = __fadd_rn(__fmul_rn(two.y, factor), lost[2 * i + 1]);
    float2 worth;
    halves[i] = two_eights<F>(low, high, worth);
    if (carries) lost[2 * i] = __fsub_rn(low, worth.x), lost[2 * i + 1] = __fsub_rn(high, worth.y);
  }
  return make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
}

#endif

template <typename T, typename F, bool QUERIES>
__device__ __forceinline__ void pack_tile(const Call& call, int tile) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Tile<T, QUERIES> from(call, tile, static_cast<int>(blockIdx.y), blockIdx.z);
  if (!QUERIES && from.key > from.last) return;  // nobody sees keys after the last
  const int64_t head = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t row = head * (QUERIES ? call.rows : call.padded) + tile;
  char* to = (QUERIES ? call.queries : call.keys) + row * from.chunks() * (IS_EIGHT<F> ? 8 : 16);
  const int groups = (from.chunks() - 1) / (32 * HELD) + 1;
  const bool carries = IS_EIGHT<F> && 256 % call.a.dim == 0;  // a lane has the same channels of all its tokens
  uint4 held[HELD];
  float factor = 1.0f, lost[8] = {};
  if (IS_EIGHT<F>) {
    constexpr float MOST = std::is_same<F, Eight>::value ? 448.0f : 127.0f;
    float most = 1e-20f;
    for (int group = 0; group < groups; ++group) from.load(group, held), most = larger(most, largest<T>(held));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, step));
    factor = MOST / most;
    if (from.lane == 0) (QUERIES ? call.query_sizes : call.key_sizes)[row] = most / MOST;
  }
  for (int group = 0; group < groups; ++group) {
    if (!IS_EIGHT<F> || groups > 1) from.load(group, held);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int at = from.chunk(group, i);
      if (at >= from.chunks()) continue;
      const uint4 x = held[i];
      if constexpr (IS_EIGHT<F>) {
        const uint2 eight = eight_eights<T, F>(x, factor, lost, carries);
        *reinterpret_cast<uint2*>(to + static_cast<int64_t>(at) * 8) = eight;
      } else {
        *reinterpret_cast<uint4*>(to + static_cast<int64_t>(at) * 16) = x;
      }
    }
  }
#endif
}

template <typename T, typename F, bool QUERIES>
__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(const Call call) {
  constexpr int WARPS = PACK_THREADS / 32;
  wait_for_previous(0);
  if (call.lies && *call.apart < 0) return;
  const int count = QUERIES ? call.rows : call.columns, step = static_cast<int>(gridDim.x) * WARPS;
  for (int tile = static_cast<int>(blockIdx.x * WARPS + threadIdx.x / 32); tile < count; tile += step) {
    pack_tile<T, F, QUERIES>(call, tile);
  }
}

// Launches a kernel of a call that begins with `wait_for_previous`.
inline cudaError_t follow(void (*kernel)(Call), dim3 grid, int threads, const Call& call, cudaStream_t stream) {
  void* arguments[] = {const_cast<Call*>(&call)};
  return launch(reinterpret_cast<const void*>(kernel), grid, threads, 0, stream, arguments);
}

template <typename T, typename F, bool QUERIES>
cudaError_t pack(const Call& call, cudaStream_t stream) {
  const unsigned count = static_cast<unsigned>(QUERIES ? call.rows : call.columns);
  const unsigned heads = static_cast<unsigned>(QUERIES ? call.a.q_heads : call.a.kv_heads);
  const unsigned blocks = (count - 1) / (PACK_THREADS / 32) + 1;  // few where it is likely that nothing is to be done
  const dim3 grid(call.lies && blocks > FEW_BLOCKS ? FEW_BLOCKS : blocks, heads, static_cast<unsigned>(call.a.batch));
  return follow(pack_kernel<T, F, QUERIES>, grid, PACK_THREADS, call, stream);
}

}  // namespace antidiagonal
}  // namespace hfl
