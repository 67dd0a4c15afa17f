// ops.bring_blocks and ops.copy_blocks: blocks of keys and values between the device and pinned host memory, which
// kernels read and write at its own addresses. Which blocks are on the device only the device knows.
//
// Paper: InfLLM (arXiv:2402.04617) section 3.3. Differs: per KV head; the list of blocks is in the order of last use.
// Shapes: stores of up to six tensors [B, Hkv, pages, bytes of a block]; ids [B, Hs, 1, K]; pool [B, Hkv, 2, P].
// Grid: bring (B * Hkv), 1024 threads; copy (B * Hkv, blocks of a run), 256 threads.
// Shared memory: bring 8 bytes a place of the pool, to 32 KiB. Bound by: the bus to the host, with 64 KiB of a row and
//   KV head on their way; without a miss, latency of the passes over the pool and the ids.
#include "../host.h"
#include "scan.cuh"

namespace hfl {
namespace {

constexpr int COPIERS = 256, WORDS = 4, PARTS = 6, MOST_POOL = 4096, MOST_GRID = 1024;
constexpr int32_t IN_USE = -2;  // in place of a block that the call reads

__device__ __forceinline__ int bytes_of(const hfl_blocks& a) {
  int bytes = 0;
#pragma unroll
  for (int i = 0; i < PARTS; ++i) bytes += a.bytes[i];
  return bytes;
}

// 16 bytes of a block on the device; `offset` counts over all tensors. `line`: row and KV head.
__device__ __forceinline__ uint4* on_device(const hfl_blocks& a, int64_t line, int page, int offset) {
  char* data = nullptr;
  int bytes = 0, within = 0, left = offset;
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    if (left >= 0 && left < a.bytes[i]) data = static_cast<char*>(a.data[i]), bytes = a.bytes[i], within = left;
    left -= a.bytes[i];
  }
  return reinterpret_cast<uint4*>(data + (line * a.pages + page) * bytes + within);
}

// The same in host memory.
__device__ __forceinline__ uint4* on_host(const hfl_blocks& a, int64_t line, int id, int bytes, int offset) {
  char* segment = reinterpret_cast<char*>(a.table[id / a.per_segment]);
  return reinterpret_cast<uint4*>(segment + (line * a.per_segment + id % a.per_segment) * bytes + offset);
}

// All threads copy `count` blocks; `ids` and `pages` say which these are. OUT: to host memory.
template <bool OUT, class Ids, class Pages>
__device__ void copy(const hfl_blocks& a, int64_t line, int count, Ids ids, Pages pages) {
  const int bytes = bytes_of(a);
  const uint32_t words = static_cast<uint32_t>(bytes) / 16, all = static_cast<uint32_t>(count) * words;
  for (uint32_t start = threadIdx.x; start < all; start += WORDS * blockDim.x) {
    uint4 held[WORDS];
    uint4* to[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {  // all of them on their way before the first is waited for
      const uint32_t word = start + static_cast<uint32_t>(i) * blockDim.x, n = word / words;
      to[i] = nullptr;
      if (word >= all) continue;
      const int id = ids(static_cast<int>(n)), page = pages(static_cast<int>(n));
      const int offset = static_cast<int>(word - n * words) * 16;
      if (page >= a.pages || id / a.per_segment >= a.segments) __trap();  // our own mistake: memory of someone else
      uint4* here = on_device(a, line, page, offset);
      uint4* there = on_host(a, line, id, bytes, offset);
      held[i] = __ldcs(OUT ? here : there);
      to[i] = OUT ? there : here;
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if (to[i]) *to[i] = held[i];
    }
  }
}

// The place of a block that is among the sinks or the last ones.
__device__ __forceinline__ int page_of(const hfl_blocks& a, int id) {
  return id < a.sinks ? id : a.sinks + (id - a.sinks) % a.tail;
}

// Where `id` is among `count` ascending ids; -1: nowhere.
__device__ __forceinline__ int find(const int32_t* ids, int count, int32_t id) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && ids[low] == id ? low : -1;
}

// The run of far blocks among the ids: which is the first, and how many there are. Others are given their places.
__device__ int2 far_run(const hfl_bring& a, const int32_t* ids, int64_t length, int32_t* places) {
  const int last = length > 0 ? static_cast<int>((length - 1) / a.at.block) - a.at.tail : -1;
  int first = 0, count = 0;
  for (int start = 0; start < a.chosen; start += THREADS) {
    const int i = start + static_cast<int>(threadIdx.x), id = i < a.chosen ? ids[i] : -1;
    const bool far = id >= a.at.sinks && id <= last;
    if (i < a.chosen) places[i] = id < 0 || far ? -1 : page_of(a.at, id);
    first += __syncthreads_count(id >= 0 && id < a.at.sinks);
    count += __syncthreads_count(far);
  }
  return make_int2(first, count);
}

__global__ void __launch_bounds__(THREADS, 1) bring_kernel(const hfl_bring a) {
  extern __shared__ int32_t room[];
  __shared__ uint32_t sums[WARPS];
  const int64_t line = blockIdx.x, b = line / a.at.kv_heads, h = a.select_heads == 1 ? 0 : line % a.at.kv_heads;
  const int thread = static_cast<int>(threadIdx.x), own = a.at.sinks + a.at.tail;
  int32_t* held = a.held + line * 2 * a.pool;
  int32_t* places = a.places + line * a.chosen;
  const int2 run = far_run(a, a.ids + b * a.ids_b + h * a.ids_h, a.lengths[b * a.lengths_b], places);
  const int32_t* ids = a.ids + b * a.ids_b + h * a.ids_h + run.x;
  const int far = run.y;
  if (far > a.pool) __trap();  // our own mistake: more blocks at once than the pool has places
  if (far == 0) return;
  places += run.x;
  int32_t* spots = room;            // places of the pool, that of the block read longest ago first
  int32_t* blocks = room + a.pool;  // which block is in each
  for (int i = thread; i < 2 * a.pool; i += THREADS) room[i] = held[i];
  __syncthreads();
  int there = 0;
  for (int start = 0; start < a.pool; start += THREADS) {
    const int i = start + thread, found = i < a.pool ? find(ids, far, blocks[i]) : -1;
    if (found >= 0) places[found] = own + spots[i], blocks[i] = IN_USE;
    there += __syncthreads_count(found >= 0);
  }
  const uint32_t missing = static_cast<uint32_t>(far - there);
  uint32_t before = 0, total;
  for (int start = 0; start < a.pool; start += THREADS) {  // of the others the first give up their places
    const int i = start + thread;
    const bool idle = i < a.pool && blocks[i] != IN_USE;
    const int32_t spot = idle ? spots[i] : 0, block = idle ? blocks[i] : 0;
    const uint32_t rank = before + sum_before(idle, sums, total);
    before += total;
    if (idle && rank < missing) {
      spots[rank] = spot;  // no later than at i, and all up to there are read
    } else if (idle) {
      held[rank - missing] = spot, held[a.pool + static_cast<int>(rank - missing)] = block;
    }
  }
  __syncthreads();
  before = 0;
  for (int start = 0; start < far; start += THREADS) {
    const int i = start + thread, place = i < far ? places[i] : 0;
    const uint32_t rank = before + sum_before(place < 0, sums, total);
    before += total;
    if (i >= far) continue;
    const int32_t spot = place < 0 ? spots[rank] : place - own;
    if (place < 0) places[i] = own + spot, blocks[rank] = ids[i];
    held[a.pool - far + i] = spot, held[2 * a.pool - far + i] = ids[i];
  }
  __syncthreads();
  if (thread == 0) {
    unsigned long long* counts = reinterpret_cast<unsigned long long*>(a.counts);
    atomicAdd(counts, static_cast<unsigned long long>(there));
    atomicAdd(counts + 1, static_cast<unsigned long long>(missing));
  }
  copy<false>(a.at, line, static_cast<int>(missing), [&](int n) { return blocks[n]; },
              [&](int n) { return own + spots[n]; });
}

__global__ void __launch_bounds__(COPIERS) copy_kernel(const hfl_copy a) {
  const int64_t line = blockIdx.x, b = line / a.at.kv_heads, last = a.last[b * a.last_b];
  for (int64_t at = a.first[b * a.first_b] + blockIdx.y; at < last; at += gridDim.y) {
    const int id = static_cast<int>(at);
    const auto ids = [&](int) { return id; };
    const auto pages = [&](int) { return page_of(a.at, id); };
    if (a.out) {
      copy<true>(a.at, line, 1, ids, pages);
    } else {
      copy<false>(a.at, line, 1, ids, pages);
    }
  }
}

const char* check(const hfl_blocks& a) {
  if (a.batch < 1 || a.kv_heads < 1) return "blocks: expected no empty axis";
  if (static_cast<int64_t>(a.batch) * a.kv_heads > INT32_MAX) return "blocks: expected fewer rows * KV heads";
  if (a.block < 1 || a.sinks < 0 || a.tail < 1 || a.pages < 1) return "blocks: expected places on the device";
  if (!a.table || a.segments < 1 || a.per_segment < 1) return "blocks: expected segments in host memory";
  int64_t bytes = 0;
  for (int i = 0; i < PARTS; ++i) {
    bytes += a.bytes[i];
    if (a.bytes[i] < 0 || a.bytes[i] % 16 || reinterpret_cast<uintptr_t>(a.data[i]) % 16) {
      return "blocks: expected blocks of whole pieces of 16 bytes";
    }
  }
  return bytes < 1 || bytes / 16 * MOST_POOL > INT32_MAX ? "blocks: expected blocks of 16 bytes to 8 MiB" : nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_bring_cuda(const hfl_bring* a) {
  const char* message = hfl::check(a->at);
  if (message) return message;
  if (a->chosen < 1) return nullptr;
  if (a->pool < 1 || a->pool > hfl::MOST_POOL) return "bring_blocks: expected a pool of 1 to 4096 blocks";
  const unsigned lines = static_cast<unsigned>(a->at.batch) * static_cast<unsigned>(a->at.kv_heads);
  hfl::bring_kernel<<<lines, hfl::THREADS, static_cast<size_t>(a->pool) * 8, static_cast<cudaStream_t>(a->stream)>>>(
      *a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" const char* hfl_copy_cuda(const hfl_copy* a) {
  const char* message = hfl::check(a->at);
  if (message) return message;
  if (a->most < 1) return nullptr;
  const unsigned lines = static_cast<unsigned>(a->at.batch) * static_cast<unsigned>(a->at.kv_heads);
  const dim3 grid(lines, static_cast<unsigned>(a->most < hfl::MOST_GRID ? a->most : hfl::MOST_GRID));
  hfl::copy_kernel<<<grid, hfl::COPIERS, 0, static_cast<cudaStream_t>(a->stream)>>>(*a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
