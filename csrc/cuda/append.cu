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
#include "append.cuh"
#include "pack.h"
#include "step.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 256, MOST_TOKENS = 8, MOST_CHANNELS = 256;

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
    const int64_t slot = slot_of(a, pos);
    const bool stays = a.ring <= 0 || pos < a.sink || pos > last - a.ring;  // a later token of the call may have its slot
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
    bound<THREADS>(a, b, h, first, end < last ? end : last,
                   static_cast<char*>(a.bounds) + at * (a.dtype == HFL_F32 ? 4 : 2), room);
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

const char* wrong_append(const hfl_append& a) { return check(a); }

}  // namespace hfl

extern "C" const char* hfl_append_cuda(const hfl_append* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  if (hfl::packs(*a)) {
    hfl_fill fill = {};
    fill.at = *a;
    const cudaError_t error = hfl::launch_pack(fill, a->stream, true);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  const dim3 grid(static_cast<unsigned>(a->batch) * static_cast<unsigned>(a->kv_heads), 2);
  hfl_append block = *a;
  void* arguments[] = {&block};
  const void* kernel = reinterpret_cast<const void*>(&hfl::append_kernel);
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
