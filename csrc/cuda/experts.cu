// experts.w4a8_experts: products of sorted int8 tokens, each with the quantized weight of its expert; exact in integers.
//
// Paper: QoQ, arXiv:2405.04532, for a mixture of experts.
// Shapes: tokens [S, K], E weights [N, K] in stored order, out [S, N]; K a multiple of 32 up to 65536. Where the tokens
//   of each expert end is read on the device: the host need not wait for it, and a graph may be captured.
// Few tokens for each expert: experts_rows.cuh. Bound by: bytes of the weights of experts that have any.
// More on sm_90a: experts_many.cuh. Bound by: tensor cores. More elsewhere: experts_rows.cuh again, 16 at a time.
#include <algorithm>
#include <initializer_list>

#include "experts_many.cuh"
#include "experts_rows.cuh"
#include "tensor_map.cuh"

namespace hfl {
namespace {

// Tokens of an expert, on the average, up to which 8 or 16 are the fastest on an H200, and 64 of many.
constexpr int FEW = 4, MORE = 8, MANY = 96;

struct Kernel {
  const void* function;
  int tokens, rows, threads, bytes;  // of a tile; of a block
  bool many;
};

struct Device {
  int processors = 0;
  cudaError_t error;
  Device() {
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
};

template <Form F, int MT>
Kernel rows() {
  using R = ExpertsRoom<F, MT>;
  return {reinterpret_cast<const void*>(&experts_rows_kernel<F, MT>), R::TOKENS, R::ROWS, R::THREADS, R::BYTES,
          false};
}
template <Form F, int T>
Kernel many() {
  using R = ManyRoom<F, T, true>;
  return {reinterpret_cast<const void*>(&experts_many_kernel<R>), T, TILE_ROWS, R::THREADS, R::BYTES, true};
}

template <Form F>
Kernel of_form(const hfl_experts& a) {
  const auto more_than = [&](int each) { return a.tokens > int64_t{each} * a.experts; };
  if (more_than(MORE)) {
    const Kernel kernel = more_than(MANY) ? many<F, 128>() : many<F, 64>();
    cudaFuncAttributes found;  // in code for other architectures the kernel is empty
    if (cudaFuncGetAttributes(&found, kernel.function) == cudaSuccess && found.sharedSizeBytes) return kernel;
  }
  return more_than(FEW) && a.most > 8 ? rows<F, 2>() : rows<F, 1>();
}

Kernel choose(const hfl_experts& a) {
  if (a.bits == 8) return of_form<Form::BYTES>(a);
  if (a.group == 0) return of_form<Form::CHANNEL>(a);
  return a.group == 128 ? of_form<Form::GROUP>(a) : of_form<Form::FINE>(a);
}

bool aligned(std::initializer_list<const void*> all) {
  return std::all_of(all.begin(), all.end(), [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; });
}

const char* check(const hfl_experts& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "w4a8_experts: expected float16 or bfloat16";
  if (a.tokens < 1 || a.rows < 1 || a.columns < 1) return "w4a8_experts: expected no empty axis";
  if (a.experts < 1 || a.experts > HFL_MOST_EXPERTS) return "w4a8_experts: expected 1 to 512 experts";
  if (a.columns % 32 || a.columns > 65536) return "w4a8_experts: expected a multiple of 32 columns, at most 65536";
  if (a.bits != 4 && a.bits != 8) return "w4a8_experts: expected 4 or 8 bits";
  if (a.group != 0 && a.group != 32 && a.group != 64 && a.group != 128) {
    return "w4a8_experts: expected groups of 32, 64 or 128 columns, or none";
  }
  if (a.group && (a.bits == 8 || !a.groups || a.columns % a.group)) {
    return "w4a8_experts: expected groups that divide the columns, of 4 bits";
  }
  if (a.rows > (1 << 24) || a.tokens > (1 << 24)) return "w4a8_experts: expected at most 2^24 rows and tokens";
  if (a.times < 0 || (a.times && a.tokens % a.times)) return "w4a8_experts: expected rows in multiples of `times`";
  if (!a.shift != (a.group || a.bits == 8)) return "w4a8_experts: expected a shift where 4 bits have no groups";
  if (!aligned({a.values, a.codes, a.groups, a.out})) {
    return "w4a8_experts: expected tensors that begin at multiples of 16 bytes";
  }
  return nullptr;
}

// A tensor map of tokens [S, K]; what lies outside is zero. False where the driver does not make one.
bool map_tokens(CUtensorMap& map, const hfl_experts& a, int tokens) {
  const auto encode = tensor_map_maker();
  const cuuint64_t sizes[2] = {cuuint64_t(a.columns), cuuint64_t(a.tokens)}, strides[1] = {cuuint64_t(a.columns)};
  const cuuint32_t box[2] = {128, cuuint32_t(tokens)}, steps[2] = {1, 1};
  return encode && encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(a.values), sizes, strides, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

const char* run(const hfl_experts& a, const Device& device) {
  const Kernel kernel = choose(a);
  if (kernel.many && a.times) return "w4a8_experts: expected tokens in the order of rows";
  ExpertsTask task = {};
  task.a = a, task.panels = (a.rows + PANEL - 1) / PANEL;
  task.chunks = (a.columns + 127) / 128 * (a.bits / 4);
  task.groups = a.group ? 128 / a.group : 0;
  task.bias = a.group || a.bits == 8 ? 128 : 0;
  task.units = (a.rows + kernel.rows - 1) / kernel.rows;
  const int64_t tiles = int64_t{std::min(a.tokens, a.experts)} + a.tokens / kernel.tokens;  // no more than these
  const int64_t units = tiles * task.units;
  if (units > INT32_MAX / 2) return "w4a8_experts: expected fewer than 2^30 tiles";
  CUtensorMap map;
  if (kernel.many && !map_tokens(map, a, kernel.tokens)) return "w4a8_experts: the driver makes no map of the tokens";
  cudaError_t error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.bytes);
  if (error == cudaSuccess) error = keep_shared(kernel.function);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t blocks = kernel.many ? units : std::min<int64_t>(units, 2 * device.processors);
  void* arguments[] = {&task, &map};  // a kernel of few tokens has one parameter
  error = launch(kernel.function, dim3(static_cast<unsigned>(blocks)), kernel.threads,
                 static_cast<size_t>(kernel.bytes), a.stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hfl

extern "C" int32_t hfl_experts_in_order(const hfl_experts* a) {
  return !hfl::check(*a) && hfl::choose(*a).many;
}

extern "C" const char* hfl_experts_cuda(const hfl_experts* a) {
  if (const char* message = hfl::check(*a)) return message;
  const hfl::Device device;
  return device.error == cudaSuccess ? hfl::run(*a, device) : cudaGetErrorString(device.error);
}
