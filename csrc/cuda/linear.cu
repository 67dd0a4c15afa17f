// linear.w4a8_linear: products of int8 tokens and weights of 4 or 8 bits, exact in integers, and their scales.
//
// Paper: QoQ, arXiv:2405.04532; one multiplication for four codes as in LiquidGEMM, arXiv:2509.01229.
// Shapes: tokens [M, K], weight [N, K] in stored order, out [M, N]; K a multiple of 32 up to 65536.
// Codes are operand a, tokens operand b: so a fragment of codes is as it was stored, and few tokens fill what they use.
//   Integers in registers are unsigned, too large by 128 where there are two levels or 8 bits; the sum of the token's
//   values, times that, goes off in the end.
// Few tokens (`few`): linear_rows.cuh. More on other architectures: linear_few.cuh, 64 at a time. Bound by: bytes of the
//   weight, but for a matrix of Llama-3-8B as much by kernels that wait for each other.
// More on sm_90a: up to 256 linear_wide.cuh and linear_pair.cuh, else linear_many.cuh. Bound by: tensor cores; 1,220
//   TOP/s with 8192 tokens on an H200; of few tokens as much by kernels that wait for each other.
#include <algorithm>
#include <initializer_list>

#include "linear_early.cuh"
#include "linear_few.cuh"
#include "linear_many.cuh"
#include "linear_one.h"
#include "linear_pair.cuh"
#include "linear_plan.h"
#include "linear_rows.cuh"
#include "linear_wide.cuh"
#include "tensor_map.cuh"

namespace hfl {
namespace {

enum class Kind { ROWS, FEW, SHARED, PAIR, ALONE, MANY };

struct Kernel {
  const void* function;
  int tokens, threads, bytes;  // of a tile, or at most; of a block
  Kind kind;
  int rows;  // of a tile
};

constexpr int SHARED = 113 * 1024;  // of a block of which two fit on a multiprocessor

int chunks_of(const hfl_linear& a) { return (a.columns + 127) / 128 * (a.bits / 4); }

template <Form F, int MT, bool STREAM>
Kernel rows(const hfl_linear& a, int tokens) {
  using R = RowsRoom<F, MT, STREAM>;
  const int bytes = rows_bytes<F, MT, STREAM>(chunks_of(a), std::min(a.tokens, tokens));
  const void* function;
  if constexpr (MT == 1 && !STREAM) {
    function = reinterpret_cast<const void*>(&linear_early_kernel<F>);
  } else {
    function = reinterpret_cast<const void*>(&linear_rows_kernel<F, MT, STREAM>);
  }
  return {function, 8 * MT, R::THREADS, bytes, Kind::ROWS, R::ROWS};
}
template <Form F, int MT>
Kernel rows(const hfl_linear& a, int shared_bytes) {
  const Kernel kept = rows<F, MT, false>(a, 8 * MT);
  return kept.bytes <= std::min(SHARED, shared_bytes) ? kept : rows<F, MT, true>(a, 8 * MT);
}
template <Form F, int MT>
Kernel few() {
  using R = FewRoom<F, MT>;
  return {reinterpret_cast<const void*>(&linear_few_kernel<F, MT>), 8 * MT, R::THREADS, R::BYTES, Kind::FEW, TILE_ROWS};
}
template <Form F, int T>
Kernel many() {
  using R = ManyRoom<F, T>;
  return {reinterpret_cast<const void*>(&linear_many_kernel<R>), T, R::THREADS, R::BYTES, Kind::MANY, TILE_ROWS};
}
template <Form F, int T, int RG, bool SUMS>
Kernel wide() {
  using R = WideRoom<F, T, RG, SUMS>;
  return {reinterpret_cast<const void*>(&linear_wide_kernel<R>), T, R::THREADS, R::BYTES,
          SUMS ? Kind::SHARED : Kind::ALONE, R::ROWS};
}

template <Form F, int T>
Kernel pair() {
  using R = PairRoom<F, T>;
  return {reinterpret_cast<const void*>(&linear_pair_kernel<R>), R::T, R::THREADS, R::BYTES, Kind::PAIR, R::ROWS};
}

// The first that a device has shared memory for.
template <Form F>
Kernel few(const hfl_linear& a, int shared_bytes) {
  if (a.tokens > 32 && few<F, 8>().bytes <= shared_bytes) return few<F, 8>();
  if (a.tokens > 16 && few<F, 4>().bytes <= shared_bytes) return few<F, 4>();
  if (a.tokens > 8) {
    const Kernel found = rows<F, 2>(a, shared_bytes);
    if (found.bytes <= shared_bytes) return found;
  }
  return rows<F, 1>(a, shared_bytes);
}
template <Form F>
Kernel many(const ManyPlan& plan) {
  if (plan.shares && plan.panels == 4) return plan.tokens == 16 ? pair<F, 16>() : pair<F, 64>();
  if (plan.tokens == 16) return plan.shares ? wide<F, 16, 1, true>() : wide<F, 16, 4, false>();
  if (plan.shares) {
    if (plan.tokens == 128) return wide<F, 128, 2, true>();
    return plan.panels == 1 ? wide<F, 64, 1, true>() : wide<F, 64, 2, true>();
  }
  if (plan.panels) return plan.tokens == 64 ? wide<F, 64, 4, false>() : wide<F, 128, 4, false>();
  return plan.tokens == 128 ? many<F, 128>() : many<F, 256>();
}

struct Device {
  int processors = 0, shared_bytes = 0;
  cudaError_t error;
  Device() {
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
  }
};

ManyPlan plan_of(const hfl_linear& a, int processors) {
  return plan_many(a.tokens, (a.rows + PANEL - 1) / PANEL, (a.columns + 127) / 128, processors);
}

template <Form F>
Kernel of_form(const hfl_linear& a, const Device& device) {
  if (a.of) {
    Kernel kernel = rows<F, 1, false>(a, 1);
    kernel.function = linear_one(F, a.columns, a.of->kind);
    return kernel;
  }
  if (a.tokens > a.few) {
    const Kernel kernel = many<F>(plan_of(a, device.processors));
    cudaFuncAttributes found;
    if (cudaFuncGetAttributes(&found, kernel.function) == cudaSuccess && found.sharedSizeBytes) return kernel;
  }
  return few<F>(a, device.shared_bytes);
}

// The kernel that takes the call: of many tokens only where the device runs it.
Kernel choose(const hfl_linear& a, const Device& device) {
  if (a.bits == 8) return of_form<Form::BYTES>(a, device);
  if (a.group == 0) return of_form<Form::CHANNEL>(a, device);
  return a.group == 128 ? of_form<Form::GROUP>(a, device) : of_form<Form::FINE>(a, device);
}

// All weights that one launch takes; how many units they have.
int add_parts(LinearTask& p, const hfl_linear& a, int rows) {
  int units = 0, i = 0;
  for (const hfl_linear* w = &a; w && i < MOST_PARTS; w = w->next, ++i) {
    p.parts[i] = {w->codes, w->groups, w->scale, w->shift, w->bias, w->out, w->rows, (w->rows + rows - 1) / rows};
    units += p.parts[i].units;
  }
  return units;
}

LinearTask task_of(const hfl_linear& a, const Kernel& kernel, int processors) {
  LinearTask p = {};
  const bool many = kernel.kind >= Kind::SHARED;
  const ManyPlan plan = plan_of(a, processors);
  p.a = a, p.panels = (a.rows + PANEL - 1) / PANEL;
  p.chunks = chunks_of(a);
  p.groups = a.group ? 128 / a.group : 0;
  p.box = std::min(a.tokens, kernel.tokens);
  p.bias = a.group || a.bits == 8 ? 128 : 0;
  p.tokens = many ? a.tokens : std::min(a.tokens, kernel.tokens);
  p.row_tiles = (a.rows + kernel.rows - 1) / kernel.rows;
  p.token_tiles = (p.tokens + kernel.tokens - 1) / kernel.tokens;
  const int tiles = p.row_tiles * p.token_tiles;
  p.steps = many ? (a.columns + 127) / 128 : (p.chunks + 1) / 2;
  p.split_tiles = many ? plan.split_tiles : kernel.kind == Kind::FEW ? tiles : 0;
  p.whole_tiles = tiles - p.split_tiles;
  p.shares = kernel.kind == Kind::SHARED
                 ? plan.shares
                 : static_cast<int>(std::min<int64_t>(static_cast<int64_t>(p.split_tiles) * p.steps, processors));
  if (kernel.kind == Kind::ROWS) p.whole_tiles = add_parts(p, a, kernel.rows);
  const int counters = (p.split_tiles + 31) / 32 * 32;
  p.counters = a.scratch, p.partial = a.scratch + counters;
  return p;
}

int64_t scratch_of(const LinearTask& p, const Kernel& kernel) {
  const int64_t counters = (p.split_tiles + 31) / 32 * 32;
  return counters + static_cast<int64_t>(p.split_tiles) * kernel.tokens * TILE_ROWS;
}

bool alike(const hfl_linear& a, const hfl_linear& b) {
  return a.tokens == b.tokens && a.columns == b.columns && a.bits == b.bits && a.group == b.group &&
         a.dtype == b.dtype && a.few == b.few && a.values == b.values && !a.shift == !b.shift;
}

const char* check(const hfl_linear& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "w4a8_linear: expected float16 or bfloat16";
  if (a.tokens < 1 || a.rows < 1 || a.columns < 1) return "w4a8_linear: expected no empty axis";
  if (a.columns % 32 || a.columns > 65536) return "w4a8_linear: expected a multiple of 32 columns, at most 65536";
  if (a.bits != 4 && a.bits != 8) return "w4a8_linear: expected 4 or 8 bits";
  if (a.group != 0 && a.group != 32 && a.group != 64 && a.group != 128) {
    return "w4a8_linear: expected groups of 32, 64 or 128 columns, or none";
  }
  if (a.group && (a.bits == 8 || !a.groups || a.columns % a.group)) {
    return "w4a8_linear: expected groups that divide the columns, of 4 bits";
  }
  if (a.shift && (a.group || a.bits == 8)) return "w4a8_linear: expected a shift only of 4 bits without groups";
  if (a.rows > (1 << 24) || a.tokens > (1 << 24)) return "w4a8_linear: expected at most 2^24 rows and tokens";
  if (a.of && (a.tokens != 1 || a.of->tokens != 1 || a.of->columns != a.columns || a.of->dtype != a.dtype)) {
    return "w4a8_linears_of: expected one row of as many columns, in one dtype";
  }
  if (a.of && a.of->kind != HFL_OF_ROWS && a.of->kind != HFL_OF_GATE) return "w4a8_linears_of: expected rows or a gate";
  if (a.next && !alike(a, *a.next)) return "w4a8_linear: expected weights of one form, for the same tokens";
  for (const void* x : {static_cast<const void*>(a.values), static_cast<const void*>(a.codes),
                        static_cast<const void*>(a.groups), static_cast<const void*>(a.out)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "w4a8_linear: expected tensors that begin at multiples of 16 bytes";
  }
  return nullptr;
}

// A tensor map of tokens [M, K]; what lies outside is zero. False where the driver does not make one.
bool map_tokens(CUtensorMap& map, const hfl_linear& a, int tokens) {
  const auto encode = tensor_map_maker();
  const cuuint64_t sizes[2] = {cuuint64_t(a.columns), cuuint64_t(a.tokens)}, strides[1] = {cuuint64_t(a.columns)};
  const cuuint32_t box[2] = {128, cuuint32_t(tokens)}, steps[2] = {1, 1};
  return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(a.values), sizes, strides, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int blocks_of(const LinearTask& p, const Kernel& kernel, int processors) {
  if (kernel.kind == Kind::SHARED) return std::max(p.whole_tiles, processors / p.shares) * p.shares;
  if (kernel.kind == Kind::PAIR) return processors / 2 * 2;
  if (kernel.kind == Kind::ALONE) return std::min(p.panels, processors / p.token_tiles) * p.token_tiles;
  return std::max(p.shares, std::min(p.whole_tiles, processors));
}

const char* run(const hfl_linear& a, const Device& device) {
  const Kernel kernel = choose(a, device);
  if (!kernel.function || kernel.bytes > device.shared_bytes) return "w4a8_linears_of: expected fewer columns";
  LinearTask p = task_of(a, kernel, device.processors);
  if (static_cast<int64_t>(p.row_tiles) * p.token_tiles * p.steps > INT32_MAX / 2) {
    return "w4a8_linear: expected fewer than 2^30 steps of 128 rows and columns";
  }
  CUtensorMap map;
  if (kernel.kind >= Kind::SHARED && !map_tokens(map, a, kernel.kind == Kind::MANY ? kernel.tokens : p.box)) {
    return "w4a8_linear: the driver makes no map of the tokens";
  }
  if (p.split_tiles && !a.scratch) return "w4a8_linear: expected scratch memory";
  cudaError_t error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes);
  if (error == cudaSuccess) error = keep_shared(kernel.function);
  const int blocks = blocks_of(p, kernel, device.processors);
  hfl_quantize of = {};
  if (a.of) of = *a.of;
  void* arguments[] = {&p, &map};  // a kernel of few tokens has one parameter
  if (a.of) arguments[1] = &of;
  for (; error == cudaSuccess && p.tokens_from < a.tokens; p.tokens_from += p.tokens) {
    if (kernel.kind < Kind::SHARED) p.tokens = std::min(kernel.tokens, a.tokens - p.tokens_from);
    error = launch(kernel.function, dim3(static_cast<unsigned>(blocks)), kernel.threads,
                   static_cast<size_t>(kernel.bytes), a.stream, arguments, a.ahead || p.tokens_from,
                   kernel.kind == Kind::SHARED ? static_cast<unsigned>(p.shares) : kernel.kind == Kind::PAIR ? 2 : 1);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hfl

extern "C" int64_t hfl_linear_scratch(const hfl_linear* a) {
  const hfl::Device device;
  int64_t most = 0;
  for (; a && device.error == cudaSuccess; a = a->next) {
    if (hfl::check(*a)) return 0;
    const hfl::Kernel kernel = hfl::choose(*a, device);
    most = std::max(most, hfl::scratch_of(hfl::task_of(*a, kernel, device.processors), kernel));
  }
  return most;
}

extern "C" const char* hfl_linear_cuda(const hfl_linear* a) {
  for (const hfl_linear* w = a; w; w = w->next) {
    if (const char* message = hfl::check(*w)) return message;
  }
  const hfl::Device device;
  if (device.error != cudaSuccess) return cudaGetErrorString(device.error);
  while (a) {
    const int taken = hfl::choose(*a, device).kind == hfl::Kind::ROWS ? hfl::MOST_PARTS : 1;
    if (const char* message = hfl::run(*a, device)) return message;
    for (int i = 0; i < taken && a; ++i) a = a->next;
  }
  return nullptr;
}
