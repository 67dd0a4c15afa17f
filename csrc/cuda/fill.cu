// ops.fill_pages: a prompt's tokens into their slots, quantized where the store is, the values that are then read of
// them, the bounds of the sub-blocks that they touch, and zeros for the rest of a new store, in one launch for each
// group of heads; ops.encode_kv, which is the same without values; and ops.decode_kv.
//
// Paper: formats as in QServe (arXiv:2405.04532) section 4.2; bounds as in Quest (arXiv:2406.10774) section 3.2.
// Shapes: stores [B, Hkv', C, D], tokens [B, Hkv, T, D], D a multiple of 8 up to 256; bounds [B, Hkv', M', 2, D].
// Grid: (runs of positions, then runs of slots to clear; B * Hkv'; keys and values).
// Block: 256 threads; a warp takes a token at a time, 8 channels a lane, and has loads of FLIGHT of them under way. A
// run is whole sub-blocks, so that a block reads of the store only what it has written itself, or an earlier call.
// Shared memory: 16 KiB, bounds of each group of lanes. Bound by: bytes. What pack.cu takes is stored there.
//
// All roundings are those of the definition, in its order; a NaN stays one. Positions are below 2^32.
#include "../fill.h"

#include "append.cuh"
#include "launch.cuh"
#include "pack.h"

namespace hfl {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, FLIGHT = 4, RUN = 64, MOST_CHANNELS = 256;

struct Fill {
  hfl_fill fill;
  int run, runs;    // tokens of a run; runs of tokens, after which come runs to clear
  int64_t cleared;  // slots from there on are cleared, those of longer rows aside
};

// How many tokens of a row are written, by all threads.
__device__ __forceinline__ int count_of(const int64_t* pos, int tokens) {
  int low = 0, size = tokens;
  while (size > 0) {
    const int stride = (size + THREADS - 1) / THREADS, at = static_cast<int>(threadIdx.x) * stride;
    const int found = __syncthreads_count(at < size && pos[low + at] >= 0);
    if (stride == 1 || found == 0) return low + found;
    low += (found - 1) * stride;
    size = stride < tokens - low ? stride : tokens - low;
  }
  return low;
}

// What a row of the call is: its first position, -1 if none is written, and how many are.
struct Row {
  int64_t first;
  int count;
};

__device__ __forceinline__ Row row_of(const Fill& f, int64_t b) {
  const hfl_append& a = f.fill.at;
  if (!a.pos) return {0, a.tokens};
  const int64_t* pos = a.pos + b * a.pos_b;
  return {pos[0], f.fill.even ? a.tokens : count_of(pos, a.tokens)};
}

__device__ __forceinline__ void clear(const Fill& f, bool keys, int64_t b, int64_t h, const Row& row) {
  const hfl_append& a = f.fill.at;
  const hfl_rows& rows = keys ? a.k : a.v;
  const int dim = keys ? a.dim : a.v_dim, bytes = rows.bits ? dim * rows.bits / 8 : dim * (a.dtype == HFL_F32 ? 4 : 2);
  const int64_t unit = rows.bits ? 1 : a.dtype == HFL_F32 ? 4 : 2, part = static_cast<int64_t>(blockIdx.x) - f.runs;
  const int64_t end = row.first < 0 ? 0 : row.first + row.count;
  const int64_t used = a.ring > 0 && end > a.sink + a.ring ? a.sink + a.ring : end;
  const int words = bytes / 4, lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < RUN; i += WARPS) {
    const int64_t slot = f.cleared + part * RUN + i;
    if (slot < used || slot >= a.capacity) continue;
    char* row_at = static_cast<char*>(rows.data) + (b * rows.b + h * rows.h + slot * rows.t) * unit;
    uint32_t* to = reinterpret_cast<uint32_t*>(row_at);
    for (int word = lane; word < words; word += 32) to[word] = 0;
    if (rows.bits && lane < 2) {
      const int64_t side = b * rows.scale_b + h * rows.scale_h + slot;
      static_cast<__half*>(lane ? rows.zero : rows.scale)[side] = __float2half_rn(0.0f);
    }
  }
  if (!a.bounds || !keys) return;
  const int64_t parts = static_cast<int64_t>(gridDim.x) - f.runs;
  for (int64_t entry = (end + a.sub - 1) / a.sub + part; entry < f.fill.entries; entry += parts) {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * a.dim; i += THREADS) {
      const int64_t at = b * a.bounds_b + h * a.bounds_h + entry * 2 * a.dim + i;
      write_value(a.bounds, at, i < a.dim ? INFINITY : -INFINITY, a.dtype);
    }
  }
}

__global__ void __launch_bounds__(THREADS, 2) fill_kernel(const Fill f) {
  __shared__ __align__(16) float room[2 * THREADS * 8];
  const hfl_append& a = f.fill.at;
  const int64_t b = blockIdx.y / static_cast<unsigned>(a.kv_heads), h = blockIdx.y % static_cast<unsigned>(a.kv_heads);
  const bool keys = blockIdx.z == 0;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const hfl_rows& rows = keys ? a.k : a.v;
  const bool active = lane * 8 < (keys ? a.dim : a.v_dim);
  wait_alone(warp);
  const Row row = row_of(f, b);
  if (static_cast<int>(blockIdx.x) >= f.runs) return clear(f, keys, b, h, row);
  const int64_t head = f.fill.heads ? f.fill.heads[h] : h;
  const int64_t from = keys ? b * a.fk_b + head * a.fk_h : b * a.fv_b + head * a.fv_h;
  const int64_t to = keys ? b * f.fill.rk_b + head * f.fill.rk_h : b * f.fill.rv_b + head * f.fill.rv_h;
  const int64_t from_t = keys ? a.fk_t : a.fv_t, to_t = keys ? f.fill.rk_t : f.fill.rv_t;
  void* read = keys ? f.fill.read_k : f.fill.read_v;
  const uint32_t first = row.first < 0 ? 0 : static_cast<uint32_t>(row.first);
  const int ahead = static_cast<int>(first % static_cast<uint32_t>(f.run));
  const int start = static_cast<int>(blockIdx.x) * f.run - ahead;  // the run's first token
  const int begin = start < 0 ? 0 : start, end = start + f.run < a.tokens ? start + f.run : a.tokens;
  const int64_t last = row.first + row.count - 1;
  for (int t = begin + warp; t < end; t += WARPS * FLIGHT) {
    Raw raw[FLIGHT] = {};
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int own = t + i * WARPS;
      if (active && own < end) raw[i] = load(keys ? a.fresh_k : a.fresh_v, from + own * from_t + lane * 8, a.dtype);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int own = t + i * WARPS;
      if (own >= end) break;
      const int64_t pos = row.first + own, slot = slot_of(a, pos);
      const bool stays = own < row.count && slot < a.capacity && (a.ring <= 0 || pos < a.sink || pos > last - a.ring);
      if (!rows.bits) {
        if (stays) write_token(rows, b, h, slot, raw[i], a.dtype, lane, active);
        if (read && active) store(read, to + own * to_t + lane * 8, unpack(raw[i], a.dtype), a.dtype);
        continue;
      }
      const Encoded packed = encode(unpack(raw[i], a.dtype), rows.bits, active);
      if (stays) write_packed(rows, b, h, slot, packed, lane, active);
      if (read && active) store(read, to + own * to_t + lane * 8, decode(packed, rows.bits), a.dtype);
    }
  }
  if (!a.bounds || !keys) return;
  __syncthreads();  // the block sees what it has written
  const int written = end < row.count ? end : row.count;
  if (begin >= written) return;
  const int64_t most = row.first + written - 1, highest = most < a.capacity ? most : a.capacity - 1;
  for (int64_t entry = (row.first + begin) / a.sub; entry * a.sub <= highest; ++entry) {
    const int64_t low = entry * a.sub, high = low + a.sub - 1;
    const int64_t at = b * a.bounds_b + h * a.bounds_h + entry * 2 * a.dim;
    bound<THREADS>(a, b, h, low, high < highest ? high : highest,
                   static_cast<char*>(a.bounds) + at * (a.dtype == HFL_F32 ? 4 : 2), room);
  }
}

// A thread takes eight channels of a token; blockIdx.y: the row and KV head.
__global__ void __launch_bounds__(THREADS) decode_kernel(const hfl_decode a) {
  const int chunks = a.dim / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  wait_for_previous(static_cast<int>(threadIdx.x));
  if (i >= static_cast<int64_t>(a.tokens) * chunks) return;
  const int64_t b = blockIdx.y / static_cast<unsigned>(a.kv_heads), h = blockIdx.y % static_cast<unsigned>(a.kv_heads);
  const int64_t slot = i / chunks, out = static_cast<int64_t>(blockIdx.y) * a.tokens * a.dim + i * 8;
  store(a.out, out, read_stored(a.x, b, h, slot, static_cast<int>(i % chunks) * 8, a.dtype), a.dtype);
}

const char* wrong_side(const hfl_rows& x, const hfl_append& a, int32_t dim) {
  if (x.bits != 0 && x.bits != 8 && x.bits != 4) return "fill_pages: expected keys and values of 4, 8 or all bits";
  if (dim < 8 || dim % 8 || dim > MOST_CHANNELS) return "fill_pages: expected a multiple of 8 channels, at most 256";
  const int64_t unit = x.bits ? 1 : a.dtype == HFL_F32 ? 4 : 2, piece = x.bits ? x.bits : 16;
  if (reinterpret_cast<uintptr_t>(x.data) % 16 || x.b * unit % piece || x.h * unit % piece || x.t * unit % piece) {
    return "fill_pages: expected rows of the store that begin at whole pieces";
  }
  return x.bits && (!x.scale || !x.zero) ? "fill_pages: expected scales and zeros" : nullptr;
}

bool in_pieces(const void* p, int64_t x, int64_t y, int64_t z, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && x * bytes % 16 == 0 && y * bytes % 16 == 0 && z * bytes % 16 == 0;
}

const char* check_fill(const hfl_fill& f) {
  const hfl_append& a = f.at;
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "fill_pages: expected float32, float16 or bfloat16";
  if (a.tokens < 1 || a.batch < 1 || a.kv_heads < 1) return "fill_pages: expected no empty axis";
  if (static_cast<int64_t>(a.batch) * a.kv_heads > 65535) return "fill_pages: expected fewer rows * KV heads";
  if (a.sink < 0 || a.ring > UINT32_MAX) return "fill_pages: expected no negative sink, and a ring below 2^32";
  if (a.bounds && (a.ring > 0 || a.sub < 1)) return "fill_pages: expected a sub of at least 1 and no ring with bounds";
  const int64_t bytes = a.dtype == HFL_F32 ? 4 : 2;
  if (!in_pieces(a.fresh_k, a.fk_b, a.fk_h, a.fk_t, bytes) || !in_pieces(a.fresh_v, a.fv_b, a.fv_h, a.fv_t, bytes) ||
      !in_pieces(f.read_k, f.rk_b, f.rk_h, f.rk_t, bytes) || !in_pieces(f.read_v, f.rv_b, f.rv_h, f.rv_t, bytes)) {
    return "fill_pages: expected tokens that begin at multiples of 16 bytes";
  }
  if (a.v.data && !f.read_k != !f.read_v) return "fill_pages: expected room for keys and for values, or for none";
  const char* message = wrong_side(a.k, a, a.dim);
  return message || !a.v.data ? message : wrong_side(a.v, a, a.v_dim);
}

cudaError_t launch_fill(const hfl_fill& fill, void* stream) {
  const hfl_append& a = fill.at;
  Fill f = {fill, RUN, 0, 0};
  if (a.bounds) f.run = a.sub >= RUN ? a.sub : RUN / a.sub * a.sub;
  f.runs = (a.tokens + f.run - 1) / f.run + 1;  // the first may begin before the text does
  unsigned parts = 0;
  if (fill.blank) {
    const int64_t limit = a.ring > 0 ? a.sink + a.ring : a.capacity;
    const int64_t least = fill.even ? (a.tokens < limit ? a.tokens : limit) : 0;
    f.cleared = least < a.capacity ? least : a.capacity;
    parts = static_cast<unsigned>((a.capacity - f.cleared + RUN - 1) / RUN);
    if (a.bounds && parts == 0) parts = 1;
  }
  const unsigned problems = static_cast<unsigned>(a.batch) * static_cast<unsigned>(a.kv_heads);
  if (packs(a)) {
    const cudaError_t error = launch_pack(fill, stream, false);
    if (error != cudaSuccess || parts == 0) return error;
    f.runs = 0;  // what is left is to clear
  }
  const dim3 grid(static_cast<unsigned>(f.runs) + parts, problems, a.v.data ? 2 : 1);
  void* arguments[] = {&f};
  return launch(reinterpret_cast<const void*>(&fill_kernel), grid, THREADS, 0, stream, arguments);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_fill_cuda(const hfl_fill* fills) {
  for (int i = 0; i < fills->count; ++i) {
    if (const char* message = hfl::check_fill(fills[i])) return message;
  }
  for (int i = 0; i < fills->count; ++i) {
    const cudaError_t error = hfl::launch_fill(fills[i], fills->stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

extern "C" const char* hfl_decode_cuda(const hfl_decode* a) {
  const hfl_rows& x = a->x;
  if (a->dtype < HFL_F32 || a->dtype > HFL_BF16) return "decode_kv: expected float32, float16 or bfloat16";
  if (x.bits != 8 && x.bits != 4) return "decode_kv: expected 4 or 8 bits";
  if (a->tokens < 1 || a->batch < 1 || a->kv_heads < 1) return "decode_kv: expected no empty axis";
  if (static_cast<int64_t>(a->batch) * a->kv_heads > 65535) return "decode_kv: expected fewer rows * KV heads";
  if (a->dim < 8 || a->dim % 8) return "decode_kv: expected a multiple of 8 channels";
  if (reinterpret_cast<uintptr_t>(x.data) % 16 || x.b % x.bits || x.h % x.bits || x.t % x.bits) {
    return "decode_kv: expected rows that begin at whole pieces";
  }
  const int64_t blocks = (static_cast<int64_t>(a->tokens) * (a->dim / 8) + hfl::THREADS - 1) / hfl::THREADS;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a->batch) * static_cast<unsigned>(a->kv_heads));
  hfl_decode block = *a;
  void* arguments[] = {&block};
  const void* kernel = reinterpret_cast<const void*>(&hfl::decode_kernel);
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
