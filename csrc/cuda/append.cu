// ops.append_pages: up to 8 tokens of each row into their slots, quantized where the store is, and the bounds of the
// sub-blocks that they touch made anew from the keys as they are stored: one launch instead of about twenty.
//
// Paper: formats as in QServe (arXiv:2405.04532) section 4.2; bounds as in Quest (arXiv:2406.10774) section 3.2.
// Shapes: stores [B, Hkv, C, D], tokens [B, Hkv, T, D], T <= 8, D a multiple of 8 up to 256; bounds [B, Hkv, M', 2, D].
// Grid: (B * Hkv, 2): a block for the keys of a row and KV head, which goes on to their bounds, one for its values.
// Block: 256 threads; a warp takes a token, 8 channels a lane; then groups of lanes take a key each, 8 channels a lane.
// Shared memory: 16 KiB, bounds of each group of lanes. Bound by: two loads that wait for each other.
//
// All roundings are those of the definition, in its order; a NaN stays one. Positions are below 2^32.
#include <math.h>

#include "eight.cuh"
#include "launch.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 256, MOST_TOKENS = 8, MOST_CHANNELS = 256;

__device__ __forceinline__ float least_of(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float most_of(float a, float b) { return a > b || a != a ? a : b; }

// One lane's eight channels of a stored token, in float32 before the last rounding, which keeps their order.
__device__ __forceinline__ Eight read_stored(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot, int channel,
                                             int dtype) {
  const int64_t start = b * rows.b + h * rows.h + slot * rows.t;
  if (rows.bits == 0) return unpack(load(rows.data, start + channel, dtype), dtype);
  const uint8_t* at = static_cast<const uint8_t*>(rows.data) + start + channel * rows.bits / 8;
  const int64_t side = b * rows.scale_b + h * rows.scale_h + slot;
  const float scale = __half2float(static_cast<const __half*>(rows.scale)[side]);
  const float zero = __half2float(static_cast<const __half*>(rows.zero)[side]);
  uint2 payload;
  if (rows.bits == 8) {
    payload = *reinterpret_cast<const uint2*>(at);
  } else {
    payload = make_uint2(*reinterpret_cast<const uint32_t*>(at), 0);
  }
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t byte = ((i < 4 ? payload.x : payload.y) >> (i % 4 * 8)) & 255u;
    const uint32_t number = rows.bits == 8 ? byte : (payload.x >> (4 * i)) & 15u;
    out.x[i] = __fmul_rn(__fsub_rn(static_cast<float>(number), zero), scale);
  }
  return out;
}

// A warp quantizes a token as ops.encode_kv does; `active`: the lane has channels.
__device__ __forceinline__ void write_packed(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot, const Eight& x,
                                             int lane, bool active) {
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
  const float steps = static_cast<float>((1 << rows.bits) - 1);
  const float size = most_of(fabsf(least), fabsf(largest)) * (1.0f / 2048.0f);
  const float wide = most_of(__fdiv_rn(__fsub_rn(largest, least), steps), size);
  const __half scale = __float2half_rn(most_of(wide, 6.103515625e-05f));  // the least normal number
  const float divisor = __half2float(scale);
  const __half zero = __float2half_rn(__fdiv_rn(-least, divisor));
  const float shift = __half2float(zero);
  uint2 payload = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float y = rintf(__fadd_rn(__fdiv_rn(x.x[i], divisor), shift));
    const uint32_t number = static_cast<uint32_t>(fminf(fmaxf(y, 0.0f), steps));
    if (rows.bits == 4) {
      payload.x |= number << (4 * i);
    } else if (i < 4) {
      payload.x |= number << (8 * i);
    } else {
      payload.y |= number << (8 * (i - 4));
    }
  }
  uint8_t* to = static_cast<uint8_t*>(rows.data) + b * rows.b + h * rows.h + slot * rows.t + lane * rows.bits;
  if (active && rows.bits == 8) *reinterpret_cast<uint2*>(to) = payload;
  if (active && rows.bits == 4) *reinterpret_cast<uint32_t*>(to) = payload.x;
  if (lane == 0) {
    const int64_t side = b * rows.scale_b + h * rows.scale_h + slot;
    static_cast<__half*>(rows.scale)[side] = scale;
    static_cast<__half*>(rows.zero)[side] = zero;
  }
}

// A warp writes one token of the keys, or of the values; `active`: the lane has channels, `raw`.
__device__ __forceinline__ void write_token(const hfl_rows& rows, int64_t b, int64_t h, int64_t slot, const Raw& raw,
                                            int dtype, int lane, bool active) {
  if (rows.bits) {
    write_packed(rows, b, h, slot, unpack(raw, dtype), lane, active);
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

// Bounds of the keys in slots `first` to `last`, by all threads; `room`: [2, groups, D] floats.
__device__ void bound(const hfl_append& a, int64_t b, int64_t h, int64_t first, int64_t last, void* entry,
                      float* room) {
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

__global__ void __launch_bounds__(THREADS) append_kernel(const hfl_append a) {
  __shared__ __align__(16) float room[2 * THREADS * 8];
  __shared__ int64_t places[MOST_TOKENS];
  const int64_t b = blockIdx.x / static_cast<unsigned>(a.kv_heads), h = blockIdx.x % static_cast<unsigned>(a.kv_heads);
  const bool keys = blockIdx.y == 0;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const hfl_rows& rows = keys ? a.k : a.v;
  const bool active = warp < a.tokens && lane * 8 < (keys ? a.dim : a.v_dim);
  wait_for_previous(active);
  Raw raw = {};
  if (active) {  // while the positions are on their way
    const int64_t from = keys ? b * a.fk_b + h * a.fk_h + warp * a.fk_t : b * a.fv_b + h * a.fv_h + warp * a.fv_t;
    raw = load(keys ? a.fresh_k : a.fresh_v, from + lane * 8, a.dtype);
  }
  if (threadIdx.x < static_cast<unsigned>(a.tokens)) places[threadIdx.x] = a.pos[b * a.pos_b + threadIdx.x];
  __syncthreads();
  int64_t last = -1;
  for (int t = 0; t < a.tokens; ++t) last = places[t] > last ? places[t] : last;
  if (warp < a.tokens && places[warp] >= 0) {
    const int64_t pos = places[warp];
    const bool round = a.ring > 0 && pos >= a.sink;
    const int64_t slot =
        round ? a.sink + static_cast<uint32_t>(pos - a.sink) % static_cast<uint32_t>(a.ring) : pos;
    const bool stays = !round || pos > last - a.ring;  // a later token of the call may have its slot
    if (stays && slot < a.capacity) write_token(rows, b, h, slot, raw, a.dtype, lane, active);
  }
  if (!a.bounds || !keys) return;
  __syncthreads();  // the block sees what it has written
  last = last < a.capacity ? last : a.capacity - 1;
  int done = -1;
  for (int t = 0; t < a.tokens; ++t) {  // the same for all threads of the block
    if (places[t] < 0 || places[t] >= a.capacity) continue;
    const int entry = static_cast<int>(places[t]) / a.sub;
    if (entry == done) continue;
    done = entry;
    const int64_t first = static_cast<int64_t>(entry) * a.sub, end = first + a.sub - 1;
    const int64_t at = b * a.bounds_b + h * a.bounds_h + static_cast<int64_t>(entry) * 2 * a.dim;
    bound(a, b, h, first, end < last ? end : last, static_cast<char*>(a.bounds) + at * (a.dtype == HFL_F32 ? 4 : 2),
          room);
  }
}

bool in_pieces(const void* p, int64_t x, int64_t y, int64_t z, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && x * bytes % 16 == 0 && y * bytes % 16 == 0 && z * bytes % 16 == 0;
}

const char* wrong_rows(const hfl_rows& x, const hfl_append& a, int32_t dim) {
  const int64_t bytes = a.dtype == HFL_F32 ? 4 : 2;
  if (x.bits != 0 && x.bits != 8 && x.bits != 4) return "append_pages: expected keys and values of 4, 8 or all bits";
  if (dim < 8 || dim % 8 || dim > MOST_CHANNELS) {
    return "append_pages: expected a multiple of 8 channels, at most 256";
  }
  if (!in_pieces(x.data, x.b, x.h, x.t, x.bits ? 1 : bytes)) {
    return "append_pages: expected rows of the store that begin at multiples of 16 bytes";
  }
  return x.bits && (!x.scale || !x.zero) ? "append_pages: expected scales and zeros" : nullptr;
}

const char* check(const hfl_append& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "append_pages: expected float32, float16 or bfloat16";
  if (a.tokens < 1 || a.tokens > MOST_TOKENS) return "append_pages: expected 1 to 8 tokens a row";
  if (a.batch < 1 || a.kv_heads < 1) return "append_pages: expected no empty axis";
  if (static_cast<int64_t>(a.batch) * a.kv_heads > INT32_MAX) return "append_pages: expected fewer rows * KV heads";
  if (a.sink < 0 || a.ring > UINT32_MAX) return "append_pages: expected no negative sink, and a ring below 2^32";
  if (a.bounds && (a.ring > 0 || a.sub < 1)) {
    return "append_pages: expected a sub of at least 1 and no ring with bounds";
  }
  const int64_t bytes = a.dtype == HFL_F32 ? 4 : 2;
  if (!in_pieces(a.fresh_k, a.fk_b, a.fk_h, a.fk_t, bytes) || !in_pieces(a.fresh_v, a.fv_b, a.fv_h, a.fv_t, bytes)) {
    return "append_pages: expected tokens that begin at multiples of 16 bytes";
  }
  const char* message = wrong_rows(a.k, a, a.dim);
  return message ? message : wrong_rows(a.v, a, a.v_dim);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_append_cuda(const hfl_append* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const dim3 grid(static_cast<unsigned>(a->batch) * static_cast<unsigned>(a->kv_heads), 2);
  hfl_append block = *a;
  void* arguments[] = {&block};
  const void* kernel = reinterpret_cast<const void*>(&hfl::append_kernel);
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
