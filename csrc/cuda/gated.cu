// ops.gated: silu of one tensor times another, in one launch that reads each once.
//
// Shapes: gate, up, out: so many numbers of 16 bits, side by side, a multiple of 8.
// Grid: a block for 2048 numbers. Block: 256 threads, with 8 numbers each. Shared memory: none. Bound by: bytes.
//
// Roundings are those of the definition: of the silu, and of the product.
#include "eight.cuh"
#include "launch.cuh"
#include "silu.cuh"

namespace hfl {
namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) gated_kernel(const hfl_gated a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 8;
  wait_for_previous(static_cast<int>(threadIdx.x));
  if (at >= a.count) return;
  const Raw first = load(a.gate, at, a.dtype), second = load(a.up, at, a.dtype);
  Eight x = unpack(first, a.dtype);
  const Eight up = unpack(second, a.dtype);
#pragma unroll
  for (int i = 0; i < 8; ++i) x.x[i] = __fmul_rn(silu(x.x[i], a.dtype), up.x[i]);
  store(a.out, at, x, a.dtype);
}

const char* check(const hfl_gated& a) {
  if (a.dtype != HFL_F16 && a.dtype != HFL_BF16) return "gated: expected float16 or bfloat16";
  if (a.count < 8 || a.count % 8) return "gated: expected a multiple of 8 numbers";
  if (a.count / (8 * THREADS) >= INT32_MAX) return "gated: expected fewer than 2^42 numbers";
  for (const void* x : {a.gate, a.up, static_cast<const void*>(a.out)}) {
    if (reinterpret_cast<uintptr_t>(x) % 16) return "gated: expected tensors that begin at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_gated_cuda(const hfl_gated* a) {
  const char* message = hfl::check(*a);
  if (message) return message;
  const int64_t each = 8 * hfl::THREADS;
  hfl_gated task = *a;
  void* arguments[] = {&task};
  const void* kernel = reinterpret_cast<const void*>(&hfl::gated_kernel);
  const dim3 grid(static_cast<unsigned>((a->count + each - 1) / each));
  const cudaError_t error = hfl::launch(kernel, grid, hfl::THREADS, 0, a->stream, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
