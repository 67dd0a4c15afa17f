// ops.attend_blocks: attention of many queries over all keys before them, sinks and a window, or chosen blocks.
//
// Paper: FlashAttention 2, arXiv:2307.08691; lists of blocks as in XAttention, arXiv:2503.16428.
// Shapes: q [B, Hq, T, D], k and v [B, Hkv, S, D], D 64, 96, 128 or 256; positions below 2^31.
// Work: a block of threads has 128 queries (64 for D = 256) of one head. It goes through the tiles of 64 keys that one
//   of them may see and reads no other: of the list of its head and block of queries, or else the sinks and the band of
//   the window. Only tiles that some query does not see as a whole are masked.
// On sm_90a, for D = 64 and 128 and logits without cap and slopes: products are wgmma, tiles are copied by tensor maps,
//   and as many blocks as multiprocessors take one tile of queries after the other; prefill_wgmma.cuh says more.
// Elsewhere: products are mma.m16n8k16; a warp has 32 queries (16), whose results stay in registers. While keys are
//   multiplied the values of the tile are on their way, and while those are, the keys of the next.
//   Grid: (B * Hq * tiles of queries), in the order of QueryTile; 128 threads.
//   Shared memory: 32 KiB (D = 64), 48, 64 or 96 KiB (D = 256), of which two blocks share a multiprocessor that has
//   room.
// Keys at lap positions, packed ones, and columns that are not positions have a kernel of their own (prefill_any.cuh):
//   tiles are unpacked and turned in shared memory; sinks, or keys beyond the clamped distance, are a pass before the
//   others, with queries turned to them. 64 KiB for D = 256, whose tiles are of 32 keys, and up to 16 KiB more where
//   keys are packed.
// Bound by: tensor cores. D = 128, 128K tokens on an H200: 593 TFLOP/s with all blocks and 559 with a tenth of them
//   (benchmarks/results/prefill-h200.json), of 741 that a matrix product reaches.
#include <algorithm>
#include <initializer_list>

#include "launch.cuh"
#include "prefill_any.cuh"
#include "prefill_wgmma.cuh"
#include "tensor_map.cuh"

namespace hfl {
namespace {

struct Kernel {
  const void* function;
  int rows, threads, bytes;
};

// Columns are positions, where keys are as they are multiplied.
bool plain(const hfl_prefill& a) { return !a.k_pos && !a.lap && !a.k.bits; }

template <int D, bool BF16>
Kernel kernel_of(const hfl_prefill& a) {
  using R = PrefillRoom<D>;
  using Any = AnyRoom<D>;
  if (plain(a)) return {reinterpret_cast<const void*>(&prefill_mma_kernel<D, BF16>), R::ROWS, R::THREADS, R::BYTES};
  const void* function = reinterpret_cast<const void*>(&prefill_any_kernel<D, BF16>);
  return {function, Any::ROWS, Any::THREADS, Any::bytes(a.k.bits)};
}

template <bool BF16>
Kernel kernel_of(const hfl_prefill& a) {
  if (a.dim == 64) return kernel_of<64, BF16>(a);
  if (a.dim == 96) return kernel_of<96, BF16>(a);
  return a.dim == 128 ? kernel_of<128, BF16>(a) : kernel_of<256, BF16>(a);
}

bool aligned(const void* p, std::initializer_list<int64_t> strides, int each = 8) {
  bool all = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : strides) all = all && stride % each == 0;
  return all;
}

bool aligned(const hfl_rows& rows) {
  const bool sides = aligned(rows.scale, {rows.scale_b, rows.scale_h}) && aligned(rows.zero, {});
  return aligned(rows.data, {rows.b, rows.h, rows.t}, rows.bits ? 16 : 8) && sides;
}

const char* check(const hfl_prefill& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "attend_blocks: expected float16 or bfloat16";
  if (a.dim != 64 && a.dim != 96 && a.dim != 128 && a.dim != 256) {
    return "attend_blocks: expected keys and values of 64, 96, 128 or 256 channels";
  }
  if (a.batch < 1 || a.kv_heads < 1 || a.tokens < 1 || a.stored < 1) return "attend_blocks: expected no empty axis";
  if (a.q_heads < 1 || a.q_heads % a.kv_heads) return "attend_blocks: expected q_heads as a multiple of kv_heads";
  if (!a.q_pos && a.stored < a.tokens) return "attend_blocks: expected no more queries than keys";
  if (!aligned(a.q, {a.q_b, a.q_h, a.q_t}) || !aligned(a.k) || !aligned(a.v) ||
      !aligned(a.out, {a.out_b, a.out_h, a.out_t})) {
    return "attend_blocks: expected rows that begin at multiples of 16 bytes";
  }
  if (a.places && a.all_heads < a.q_heads) return "attend_blocks: expected heads among those that there are";
  if (!(a.scale > 0.0f)) return "attend_blocks: expected a scale above zero";
  if (a.sink < 0) return "attend_blocks: expected no negative sink";
  if (a.k.bits != a.v.bits || (a.k.bits != 0 && a.k.bits != 4 && a.k.bits != 8)) {
    return "attend_blocks: expected keys and values in one format";
  }
  if (a.lap < 0 || a.lap > INT_MAX || a.offset < 0 || a.offset > INT_MAX || a.clamp < 0 || a.clamp > INT_MAX) {
    return "attend_blocks: expected a lap, an offset and a distance below 2^31";
  }
  if (a.lap) {
    if (a.pairs % 8 || a.pairs < 0 || 2 * a.pairs > a.dim) return "attend_blocks: expected pairs in multiples of 8";
    if (!a.ids && a.sink && !a.clamp && !a.sink_pos) {
      return "attend_blocks: expected positions that sinks are seen from";
    }
  }
  if (a.k_pos && (a.ids || a.stored < a.tokens)) {
    return "attend_blocks: expected the queries' own columns among the keys";
  }
  if (a.ids) {
    if (a.chosen < 1) return "attend_blocks: expected lists of at least one block";
    if (a.block < 64 || a.block % 64) return "attend_blocks: expected blocks of a multiple of 64 keys";
    if (a.q_block < 128 || a.q_block % 128) return "attend_blocks: expected blocks of a multiple of 128 queries";
    if (a.select_heads != 1 && a.select_heads != a.kv_heads && a.select_heads != a.q_heads) {
      return "attend_blocks: expected a selection for all heads, each KV head or each query head";
    }
  }
  return nullptr;
}

bool map_heads(CUtensorMap& map, const hfl_prefill& a, const void* data, int heads, int rows, int64_t batch_stride,
               int64_t head_stride, int64_t row_stride) {
  return map_rows(map, a.dtype == HFL_BF16, data, {a.dim, rows, heads, a.batch},
                  {row_stride, head_stride, batch_stride}, 64);
}

template <int D>
Kernel wgmma_kernel_of(bool bf16) {
  using S = PrefillStages<D>;
  const void* function = bf16 ? reinterpret_cast<const void*>(&prefill_wgmma_kernel<D, true>)
                              : reinterpret_cast<const void*>(&prefill_wgmma_kernel<D, false>);
  return {function, S::ROWS, S::THREADS, S::BYTES};
}

// The kernel of sm_90a, where it takes the task, this library has code for it, and the device runs that.
bool wgmma_takes(const hfl_prefill& a, Kernel& kernel, PrefillMaps& maps) {
  if (!plain(a) || (a.dim != 128 && a.dim != 64) || a.softcap != 0.0f || a.slopes || !a.counter) return false;
  kernel = a.dim == 128 ? wgmma_kernel_of<128>(a.dtype == HFL_BF16) : wgmma_kernel_of<64>(a.dtype == HFL_BF16);
  cudaFuncAttributes found;
  if (cudaFuncGetAttributes(&found, kernel.function) != cudaSuccess || !found.sharedSizeBytes) return false;
  return map_heads(maps.q, a, a.q, a.places ? a.all_heads : a.q_heads, a.tokens, a.q_b, a.q_h, a.q_t) &&
         map_heads(maps.k, a, a.k.data, a.kv_heads, a.stored, a.k.b, a.k.h, a.k.t) &&
         map_heads(maps.v, a, a.v.data, a.kv_heads, a.stored, a.v.b, a.v.h, a.v.t);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_prefill_cuda(const hfl_prefill* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  hfl::Kernel kernel;
  hfl::PrefillMaps maps;
  const bool persistent = hfl::wgmma_takes(*a, kernel, maps);
  if (!persistent) kernel = a->dtype == HFL_BF16 ? hfl::kernel_of<true>(*a) : hfl::kernel_of<false>(*a);
  hfl::PrefillTask p = {*a, a->q_heads / a->kv_heads, (a->tokens + kernel.rows - 1) / kernel.rows};
  int64_t blocks = static_cast<int64_t>(a->batch) * a->q_heads * p.tiles;
  if (blocks > INT_MAX) return "attend_blocks: expected fewer than 2^31 tiles of queries";
  cudaError_t error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes);
  if (error == cudaSuccess && persistent) {
    int device = 0, processors = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    blocks = std::min<int64_t>(blocks, processors);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* arguments[] = {&p, &maps};  // kernels that need no maps have one parameter
  error = hfl::launch(kernel.function, dim3(static_cast<unsigned>(blocks)), kernel.threads,
                      static_cast<size_t>(kernel.bytes), a->stream, arguments, persistent);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
