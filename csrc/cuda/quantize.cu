// linear.quantize_tokens, quantize_norm and quantize_gated: rows to int8, with the scale and the sum of each.
//
// Paper: QoQ, arXiv:2405.04532, section 5.
// Shapes: x (and y) [M, K] with rows apart, K a multiple of 8 up to 32768; values [M, K], scale and sums [M].
// Grid: a block for a row. Block: up to 1024 threads, each with 8 channels once or up to four times; they stay in
//   registers. Shared memory: what each warp adds up. Bound by: bytes; of few rows, loads and barriers that wait for
//   each other.
#include <array>

#include "quantize_row.cuh"

namespace hfl {
namespace {

constexpr int MOST_CHANNELS = 32768, MANY = 2048;
constexpr int ASKED = 256;              // rows, up to which they are asked for early
constexpr int WIDE = 2, BESIDE = 512;   // rows from which linear_wide.cuh follows; threads of a block beside its own
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int BLOCKS = 4;  // of BESIDE threads on a multiprocessor
#else
constexpr int BLOCKS = 3;
#endif
constexpr int most_beside(int kind) { return kind == HFL_OF_ROWS ? 4 : kind == HFL_OF_NORM ? 1 : 0; }  // pieces

// THREADS: at most; of fewer, registers are so few that a block fits beside one of linear_wide.cuh in each quarter of a
// multiprocessor. That one is then set up while this one runs.
template <int PIECES, int KIND, int DTYPE, int THREADS = MOST_THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == BESIDE ? BLOCKS : 1) quantize_kernel(
    const __grid_constant__ hfl_quantize a) {
  const int64_t row = blockIdx.x;
  let_next_begin();
  Row<PIECES, DTYPE> x(a);
  if (a.tokens <= ASKED) {
    x.ask(a.x, row * a.x_row);
    if (KIND == HFL_OF_GATE) x.ask(a.y, row * a.y_row);
    if (KIND == HFL_OF_NORM && a.weight_dtype != HFL_F32) x.ask(a.weight, 0);
  }
  wait_for_last();
  x.read(row);
  if (KIND == HFL_OF_GATE) x.multiply(row);
  if (KIND == HFL_OF_NORM) x.normalize(row);
  const Steps steps(x.largest());
  int8_t* to = a.values + row * a.columns;
  const int own = x.write(steps.up, [&](int channel, uint2 eight) { *reinterpret_cast<uint2*>(to + channel) = eight; });
  if (threadIdx.x == 0) a.scale[row] = steps.scale;
  const int sum = sum_of_block(own);
  if (threadIdx.x == 0) a.sums[row] = sum;
}

// With 8 channels a thread once, twice, four times; and that with most pieces for which there are registers beside another
// kernel.
template <int KIND, int DTYPE>
std::array<const void*, 4> kernels() {
  const void* beside = nullptr;
  if constexpr (KIND != HFL_OF_GATE) {
    beside = reinterpret_cast<const void*>(&quantize_kernel<most_beside(KIND), KIND, DTYPE, BESIDE>);
  }
  return {reinterpret_cast<const void*>(&quantize_kernel<1, KIND, DTYPE>),
          reinterpret_cast<const void*>(&quantize_kernel<2, KIND, DTYPE>),
          reinterpret_cast<const void*>(&quantize_kernel<4, KIND, DTYPE>), beside};
}
template <int DTYPE>
std::array<const void*, 4> kernels_of(int kind) {
  if (kind == HFL_OF_ROWS) return kernels<HFL_OF_ROWS, DTYPE>();
  return kind == HFL_OF_NORM ? kernels<HFL_OF_NORM, DTYPE>() : kernels<HFL_OF_GATE, DTYPE>();
}

const char* check(const hfl_quantize& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "quantize_tokens: expected float16 or bfloat16";
  if (a.kind < HFL_OF_ROWS || a.kind > HFL_OF_GATE) return "quantize_tokens: expected rows, a norm or a gate";
  if (a.tokens < 1 || a.columns < 8 || a.columns % 8 || a.columns > MOST_CHANNELS) {
    return "quantize_tokens: expected rows, of a multiple of 8 channels up to 32768";
  }
  if (a.kind == HFL_OF_NORM && a.weight_dtype != a.dtype && (a.weight_dtype != HFL_F32 || a.early)) {
    return "quantize_tokens: expected a weight of the dtype of the rows";
  }
  const bool gate = a.kind == HFL_OF_GATE;
  const bool norm = a.kind == HFL_OF_NORM;
  for (const void* x : {a.x, gate ? a.y : nullptr, norm ? a.weight : nullptr, static_cast<const void*>(a.normed)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "quantize_tokens: expected tensors at multiples of 16 bytes";
  }
  if (reinterpret_cast<uintptr_t>(a.values) % 8) return "quantize_tokens: expected values at a multiple of 8 bytes";
  if (a.x_row % 8 || (gate && a.y_row % 8)) return "quantize_tokens: expected rows at multiples of 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_quantize_cuda(const hfl_quantize* a) {
  if (const char* message = hfl::check(*a)) return message;
  const int warps = (a->columns / 8 + hfl::WARP - 1) / hfl::WARP;
  const int pieces = hfl::most_beside(a->kind);
  const bool beside = a->tokens >= hfl::WIDE && a->tokens < hfl::MANY && warps <= pieces * hfl::BESIDE / hfl::WARP;
  const int most = (beside ? hfl::BESIDE : hfl::MOST_THREADS) / hfl::WARP;
  const auto kernels =
      a->dtype == HFL_BF16 ? hfl::kernels_of<HFL_BF16>(a->kind) : hfl::kernels_of<HFL_F16>(a->kind);
  // Of few rows, more threads are done sooner; of many, smaller blocks are more rows at a time. A norm of which a thread
  // has more than 8 channels in norm.cu has as many here.
  int which = a->tokens >= hfl::MANY && warps >= 4 && (a->kind != HFL_OF_NORM || warps <= most) ? 2 : 0;
  while (warps > most << which) ++which;
  const void* kernel = kernels[static_cast<size_t>(beside && 1 << which == pieces ? 3 : which)];
  const int threads = (warps + (1 << which) - 1) / (1 << which) * hfl::WARP;
  hfl_quantize copy = *a;
  void* arguments[] = {&copy};
  cudaError_t error = hfl::keep_shared(kernel);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = hfl::launch(kernel, dim3(static_cast<unsigned>(a->tokens)), threads, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
