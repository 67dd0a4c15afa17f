// linear.w4a8_linears_of: one row of 16-bit channels, or a gate and what it is multiplied with, to 8 bits and times weights.
//
// Paper: QoQ, arXiv:2405.04532, section 5.
// Shapes: x (and y) [1, K], K at most 8192 or 16384; the rest is that of linear.cu.
// Grid, block and products: those of linear_rows.cuh. Every block makes the 8 bits of the whole row, as quantize.cu would,
//   while its first codes are on their way, and leaves them in shared memory where its warps look for them; so that there
//   is no kernel between two linears that would have to wait for the first and be waited for by the second.
// sm_90 and later. Shared memory: that of linear_rows.cuh. Bound by: bytes of the weight.
#include "linear_one.h"
#include "linear_rows.cuh"
#include "quantize_row.cuh"

namespace hfl {
namespace {

template <Form F, int PIECES, int KIND>
struct OneBlock {
  using R = RowsRoom<F, 1, false>;
  const LinearTask& p;
  uint32_t base;

  // Where eight values go: to the warp that has their columns.
  __device__ __forceinline__ uint32_t place_of(int channel) const {
    const int chunk = channel / R::CHUNK, at = channel % R::CHUNK;
    const int slots = rows_slots<F, 1, false>(p.chunks);
    return base + R::BYTES + (chunk % R::WARPS * slots + chunk / R::WARPS) * R::CHUNK + at;
  }

  template <int DTYPE>
  __device__ __forceinline__ OfToken make(const hfl_quantize& from) const {
    Row<PIECES, DTYPE> x(from);
    x.read(0);
    if (KIND == HFL_OF_GATE) x.multiply(0);
    let_next_begin();  // its codes would come before what was just read
    const Steps steps(x.largest());
    const int own = x.write(steps.up, [&](int channel, uint2 eight) { store_two(place_of(channel), eight); });
    const int sum = of_block(own, Sum(), 0);
    return {steps.scale, __int2float_rn(sum), p.bias * sum};
  }

  // Of columns behind the last, which there are codes for.
  __device__ __forceinline__ void clear_rest() const {
    const int channel = p.a.columns + static_cast<int>(threadIdx.x) * 8;
    if (channel < p.chunks * R::CHUNK) store_two(place_of(channel), make_uint2(0, 0));
  }

  static __device__ __forceinline__ void store_two(uint32_t at, uint2 x) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
  }
};

template <Form F, int PIECES, int KIND>
__global__ void __launch_bounds__(RowsRoom<F, 1, false>::THREADS, 2) linear_one_kernel(
    const __grid_constant__ LinearTask p, const __grid_constant__ hfl_quantize from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using R = RowsRoom<F, 1, false>;
  extern __shared__ __align__(128) unsigned char shared[];
  RowsBlock<F, 1, false> block(p, shared_address(shared));
  RowsCursor<R> first(p, block.warp, block.lane);
#pragma unroll 1
  for (int i = 0; i < R::STAGES; ++i) {
    if (first.there()) {
      block.copy_codes(i, first);
      first.next();
    }
    copy_commit();
  }
  block.clear_sums();
  wait_for_last();
  const OneBlock<F, PIECES, KIND> one{p, shared_address(shared)};
  one.clear_rest();
  const OfToken tokens[1] = {from.dtype == HFL_BF16 ? one.template make<HFL_BF16>(from)
                                                    : one.template make<HFL_F16>(from)};
  __syncthreads();
  RowsCursor<R> ahead(p, block.warp, block.lane);  // anew: there was no register to keep it in
#pragma unroll 1
  for (int i = 0; i < R::STAGES && ahead.there(); ++i) ahead.next();
  multiply_units(p, block, ahead, tokens);
#endif
}

template <Form F>
const void* kernel_of(int pieces, int kind) {
  if (kind == HFL_OF_GATE) return reinterpret_cast<const void*>(&linear_one_kernel<F, 4, HFL_OF_GATE>);
  return pieces == 1 ? reinterpret_cast<const void*>(&linear_one_kernel<F, 1, HFL_OF_ROWS>)
                     : reinterpret_cast<const void*>(&linear_one_kernel<F, 4, HFL_OF_ROWS>);
}

}  // namespace

const void* linear_one(Form form, int columns, int kind) {
  const int pieces = (columns + 8 * 512 - 1) / (8 * 512);
  if (pieces > 4) return nullptr;
  switch (form) {
    case Form::CHANNEL: return kernel_of<Form::CHANNEL>(pieces, kind);
    case Form::GROUP: return kernel_of<Form::GROUP>(pieces, kind);
    case Form::FINE: return kernel_of<Form::FINE>(pieces, kind);
    default: return kernel_of<Form::BYTES>(pieces, kind);
  }
}

}  // namespace hfl
