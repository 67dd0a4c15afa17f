// ops.attend_pages: attention of up to 8 queries a row over stored keys, plain or of 8 or 4 bits, all or chosen blocks.
//
// Paper: Flash-Decoding (split keys, merge by log-sum-exp), arXiv:2205.14135 section 3 for the online softmax; packed
// keys as in QServe, arXiv:2405.04532, but with the scales taken out of the products.
// Shapes: q [B, Hq, T, D], k and v [B, Hkv, S, D], D 64, 96, 128 or 256; positions below 2^31.
// Work: a unit is up to 8 queries of a KV head, all T * G of them, or with a selection those that read one list. The
//   keys that they see, known on the device only, are cut into slabs of 16, or 32 packed ones, and shared out over
//   `splits` blocks, so that a large capacity with a short text costs nothing. Each warp of a unit's n warps takes every
//   n-th slab, so that what is read at a time lies together, through its own ring of cp.async copies, and never waits
//   for another warp; products are mma.m16n8k16, with packed keys m16n8k32 of integers, keys and then channels the 16
//   rows, queries the 8 columns. In the end the block merges its warps, and the last block of a unit (a counter, which
//   it sets back to zero) all blocks, in their order: results do not depend on timing.
// Grid: (units of a KV head, splits, B * Hkv); 128 threads, 64 for D = 256.
// Shared memory: ring of about 64 KiB or less, 16 D bytes for each variant of the queries (1, or up to 3 with turns),
//   1 KiB.
// Bound by: bytes of keys and values. Three blocks of a multiprocessor keep about 140 KiB of bf16 on their way. Of 32
//   keys of 4 bits with 128 channels, a warp's slab, about 510 instructions stand beside 910 cycles of memory.
#include <algorithm>
#include <initializer_list>

#include "attend_kernel.cuh"

namespace hfl {
namespace {

struct Kernel {
  const void *function, *of_both;
  int threads, warps, slab, bytes[3];  // keys of a slab, shared memory by variants
  std::atomic<int>* fits[3];           // blocks that the device holds at a time; 0: not known yet
};

// Of two groups at once, for the usual head: what it saves is a launch, and it takes as much code again.
template <int D, Format F>
const void* both() {
  if constexpr (D == 128) return reinterpret_cast<const void*>(&attend_both_kernel<D, F>);
  return nullptr;
}

template <int D, Format F>
const Kernel& kernel() {
  using R = Room<D, F>;
  static std::atomic<int> fits[3][MOST_DEVICES];
  static const Kernel it = {reinterpret_cast<const void*>(&attend_kernel<D, F>),
                            both<D, F>(),
                            R::WARPS * 32,
                            R::WARPS,
                            R::S::KEYS,
                            {R::bytes(1), R::bytes(2), R::bytes(3)},
                            {fits[0], fits[1], fits[2]}};
  return it;
}

template <int D>
const Kernel& kernel_of(const hfl_attend& a) {
  if (a.k.bits == 4) return kernel<D, Format::int4>();
  if (a.k.bits == 8) return kernel<D, Format::int8>();
  return a.dtype == HFL_BF16 ? kernel<D, Format::bf16>() : kernel<D, Format::f16>();
}

const Kernel& kernel_of(const hfl_attend& a) {
  if (a.dim == 64) return kernel_of<64>(a);
  if (a.dim == 96) return kernel_of<96>(a);
  return a.dim == 128 ? kernel_of<128>(a) : kernel_of<256>(a);
}

bool aligned(const void* p, std::initializer_list<int64_t> strides, int64_t multiple) {
  bool all = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : strides) all = all && stride % multiple == 0;
  return all;
}

const char* check_rows(const hfl_rows& x) {
  if (x.bits != 0 && x.bits != 8 && x.bits != 4) return "attend_pages: expected keys and values of 4, 8 or all bits";
  if (!aligned(x.data, {x.b, x.h, x.t}, x.bits ? 16 : 8)) {
    return "attend_pages: expected rows of keys and values that begin at multiples of 16 bytes";
  }
  if (x.t < 0 || x.t > INT_MAX) return "attend_pages: expected rows of keys and values less than 2^31 elements apart";
  if (x.bits && !(aligned(x.scale, {x.scale_b, x.scale_h}, 8) && aligned(x.zero, {}, 8))) {
    return "attend_pages: expected scales and zeros of a head that begin at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace

const char* wrong_attend(const hfl_attend& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "attend_pages: expected float16 or bfloat16";
  if (a.dim != a.v_dim || (a.dim != 64 && a.dim != 96 && a.dim != 128 && a.dim != 256)) {
    return "attend_pages: expected keys and values of 64, 96, 128 or 256 channels";
  }
  if (a.batch < 1 || a.kv_heads < 1 || a.tokens < 1 || a.stored < 1) return "attend_pages: expected no empty axis";
  if (a.q_heads < 1 || a.q_heads % a.kv_heads) return "attend_pages: expected q_heads as a multiple of kv_heads";
  if (static_cast<int64_t>(a.batch) * a.kv_heads > 65535) return "attend_pages: expected at most 65535 rows * KV heads";
  if (a.k.bits != a.v.bits) return "attend_pages: expected keys and values in the same format";
  if (!aligned(a.q, {a.q_b, a.q_h, a.q_t}, 8) || !aligned(a.q_before, {}, 8) || !aligned(a.q_sinks, {}, 8)) {
    return "attend_pages: expected queries that begin at multiples of 16 bytes";
  }
  if (!aligned(a.out, {a.out_b, a.out_h, a.out_t}, 8)) {
    return "attend_pages: expected an output whose rows begin at multiples of 16 bytes";
  }
  if (a.q_before && (a.slopes || a.lap < 1)) return "attend_pages: expected no slopes, and a lap, with turned queries";
  if (a.q_before && !a.ids && a.sink > 0 && !a.q_sinks) return "attend_pages: expected queries turned to the sinks";
  if (a.sink < 0) return "attend_pages: expected no negative sink";
  if (a.ids) {
    if (a.chosen < 1 || a.block < 1) return "attend_pages: expected blocks of at least one token";
    if (a.k.bits && a.block % 8) return "attend_pages: expected blocks of a multiple of 8 tokens where keys are packed";
    if (a.select_heads != 1 && a.select_heads != a.kv_heads && a.select_heads != a.q_heads) {
      return "attend_pages: expected a selection for all heads, each KV head or each query head";
    }
  }
  const char* message = check_rows(a.k);
  return message ? message : check_rows(a.v);
}

namespace {

AttendTask task_of(const hfl_attend& a) {
  AttendTask p = {};
  p.turn.append = {}, p.a = a, p.group = a.q_heads / a.kv_heads, p.splits = a.splits, p.variants = 1;
  p.apart = a.ids && a.select_heads != a.kv_heads && a.select_heads != 1;
  const int queries = a.ids ? p.group : p.group * a.tokens;  // that may share a unit
  const int tiles = p.apart ? queries : (queries + ROWS - 1) / ROWS;
  p.units = (a.ids ? a.tokens : 1) * tiles;
  p.kv_heads = Divisor(a.kv_heads), p.tokens = Divisor(a.ids ? 1 : a.tokens), p.tiles = Divisor(tiles);
  p.block = Divisor(std::max(a.block, 1)), p.share = Divisor(std::max(p.splits, 1) * kernel_of(a).warps);
  if (a.q_before) p.variants = !a.ids && a.sink > 0 ? 3 : 2;
  return p;
}

// Blocks that the current device holds at a time, having allowed the kernel its shared memory.
cudaError_t blocks_that_fit(const Kernel& kernel, int variants, int& blocks) {
  int device = 0, each = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>& known = kernel.fits[variants - 1][device % MOST_DEVICES];
  blocks = device < MOST_DEVICES ? known.load(std::memory_order_acquire) : 0;
  if (blocks) return cudaSuccess;
  const int bytes = kernel.bytes[variants - 1];
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes[2]);
  if (error == cudaSuccess && kernel.of_both) {
    error = cudaFuncSetAttribute(kernel.of_both, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes[2]);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, kernel.threads, bytes);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  blocks = each * processors;
  if (device < MOST_DEVICES) known.store(blocks, std::memory_order_release);
  return cudaSuccess;
}

// How many blocks a unit may have: one for each place on the device; of 16 bits, half as many where they are ENOUGH, as
// memory is busy then, and who comes last has less to merge.
constexpr int64_t ENOUGH = 24;

int most_splits(const hfl_attend& a, int places, int64_t units) {
  const int64_t all = places / units, most = a.k.bits ? all : std::max(std::min(all, ENOUGH), all / 2);
  return static_cast<int>(std::clamp<int64_t>(most, 1, MOST_SPLITS));
}

}  // namespace

int attend_units(const hfl_attend& a) { return wrong_attend(a) ? 0 : task_of(a).units; }

// One block of a unit for each place on the device that others leave, or fewer where there is little to do.
int64_t attend_scratch(const hfl_attend& a, int others, int32_t* splits) {
  *splits = 1;
  if (wrong_attend(a)) return 0;  // hfl_attend_cuda will say why
  const AttendTask p = task_of(a);
  const Kernel& kernel = kernel_of(a);
  int fit = 0;
  if (blocks_that_fit(kernel, p.variants, fit) != cudaSuccess) return 0;
  const int64_t units = hfl_attend_counters(&a);
  const int64_t keys = a.ids ? static_cast<int64_t>(a.chosen) * a.block : a.stored;
  const int slabs = static_cast<int>((keys + kernel.slab - 1) / kernel.slab);
  const int most = most_splits(a, fit - others, units);
  const int wanted = (slabs + most * kernel.warps - 1) / (most * kernel.warps);
  const int each = slabs_of_warp(slabs, wanted, kernel.warps) * kernel.warps;
  // Short units that are a block for each multiprocessor without being cut keep memory as busy, and need not be merged.
  const bool whole = 4 * units >= fit && slabs <= 4 * kernel.warps;
  *splits = whole ? 1 : (slabs + each - 1) / each;
  return *splits == 1 ? 0 : units * *splits * ROWS * (a.dim + 2) * static_cast<int64_t>(sizeof(float));
}

bool attend_fits(const hfl_attend& a) {
  const AttendTask p = task_of(a);
  int fit = 0;
  if (blocks_that_fit(kernel_of(a), p.variants, fit) != cudaSuccess) return true;  // hfl_layer_cuda will say why
  return static_cast<int64_t>(a.batch) * a.kv_heads * p.units * (a.splits + 1) <= fit;
}

namespace {

const char* wrong(const hfl_attend& a, const AttendTurn& turn) {
  const char* message = wrong_attend(a);
  if (message) return message;
  if (turn.appended && (a.tokens != 1 || !a.q_pos || task_of(a).apart)) {
    return "attend_pages: expected, in a step, one token at a position and a selection for each KV head or for all";
  }
  if (a.splits < 1 || a.splits > MOST_SPLITS) return "attend_pages: expected the splits of hfl_attend_scratch";
  if (a.splits > 1 && (!a.counters || !aligned(a.scratch, {}, 1) || !a.scratch)) {
    return "attend_pages: expected counters, and scratch at a multiple of 16 bytes, for more than one split";
  }
  return nullptr;
}

}  // namespace

const char* attend_in_turn(const hfl_attend& a, const AttendTurn& turn) {
  const char* message = wrong(a, turn);
  if (message) return message;
  AttendTask p = task_of(a);
  p.turn = turn;
  const Kernel& kernel = kernel_of(a);
  int fit = 0;
  cudaError_t error = blocks_that_fit(kernel, p.variants, fit);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 grid(static_cast<unsigned>(p.units), static_cast<unsigned>(p.splits) + (turn.appended ? 1u : 0u),
                  static_cast<unsigned>(a.batch) * static_cast<unsigned>(a.kv_heads));
  void* arguments[] = {&p};
  error = launch(kernel.function, grid, kernel.threads, static_cast<size_t>(kernel.bytes[p.variants - 1]), a.stream,
                 arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool attend_together(const hfl_attend& a, const hfl_attend& b) {
  const AttendTask first = task_of(a), second = task_of(b);
  if (&kernel_of(a) != &kernel_of(b) || !kernel_of(a).of_both) return false;
  if (first.variants != second.variants || first.units != 1 || second.units != 1) return false;
  int fit = 0;
  if (blocks_that_fit(kernel_of(a), first.variants, fit) != cudaSuccess) return false;
  return static_cast<int64_t>(a.batch) * (a.kv_heads * (a.splits + 1) + b.kv_heads * (b.splits + 1)) <= fit;
}

const char* attend_both_in_turn(const hfl_attend (&a)[2], const AttendTurn (&turns)[2]) {
  AttendTasks tasks = {};
  int blocks[2];
  for (int i = 0; i < 2; ++i) {
    const char* message = wrong(a[i], turns[i]);
    if (message) return message;
    tasks.of[i] = task_of(a[i]), tasks.of[i].turn = turns[i];
    tasks.blocks[i] = Divisor(a[i].splits + 1), blocks[i] = a[i].batch * a[i].kv_heads * (a[i].splits + 1);
  }
  tasks.first = blocks[0];
  const Kernel& kernel = kernel_of(a[0]);
  void* arguments[] = {&tasks};
  const cudaError_t error =
      launch(kernel.of_both, dim3(static_cast<unsigned>(blocks[0] + blocks[1])), kernel.threads,
             static_cast<size_t>(kernel.bytes[tasks.of[0].variants - 1]), a[0].stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfl

extern "C" int64_t hfl_attend_counters(const hfl_attend* a) {
  return static_cast<int64_t>(a->batch) * a->kv_heads * hfl::attend_units(*a);
}

extern "C" int64_t hfl_attend_scratch(const hfl_attend* a, int32_t* splits) {
  return hfl::attend_scratch(*a, 0, splits);
}

extern "C" const char* hfl_attend_cuda(const hfl_attend* a) { return hfl::attend_in_turn(*a, hfl::AttendTurn()); }
