// linear.w4a8_linears_of: one row of 16-bit channels, or a gate and what it is multiplied with, to 8 bits and times weights.
//
// Paper: QoQ, arXiv:2405.04532, section 5.
// Shapes: x (and y) [1, K], K at most 8192 or 16384; the rest is that of linear.cu.
// Grid, block and products: those of linear_early.cuh. Every block makes the 8 bits of the whole row, as quantize.cu would,
//   while its first codes are on their way; a warp makes those that it multiplies, and waits once for the others, for the
//   largest. So there is no kernel between two linears that would have to wait for the first and be waited for.
// sm_90 and later. Shared memory: that of linear_rows.cuh. Bound by: bytes of the weight.
#include "linear_early.cuh"
#include "linear_one.h"
#include "quantize_row.cuh"

namespace hfl {
namespace {

// The row in registers: every thread has 8 values at a time of columns that its own warp multiplies, so that no warp
// waits for another but for how large the largest is.
template <Form F, int PIECES, int KIND, int DTYPE>
struct OneRow {
  using R = RowsRoom<F, 1, false>;
  static constexpr int EACH = R::CHUNK / 8, CHUNKS = 32 / EACH;  // threads of a chunk; chunks of a warp at a time
  const LinearTask& p;
  const hfl_quantize& from;
  uint4 x[PIECES];

  __device__ __forceinline__ int slot(int i) const {
    return i * CHUNKS + static_cast<int>(threadIdx.x) % 32 / EACH;
  }
  __device__ __forceinline__ int channel(int i) const {
    const int thread = static_cast<int>(threadIdx.x);
    return (slot(i) * R::WARPS + thread / 32) * R::CHUNK + thread % EACH * 8;
  }
  __device__ __forceinline__ uint4 load(const void* of, int i) const {
    if (channel(i) >= from.columns) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(of) + channel(i));
  }

  __device__ __forceinline__ void read() {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) x[i] = load(from.x, i);
    if constexpr (KIND == HFL_OF_GATE) multiply();
  }
  __device__ __forceinline__ void multiply() {
    constexpr int AT_ONCE = PIECES < 2 ? PIECES : 2;  // on their way before one is waited for
#pragma unroll
    for (int first = 0; first < PIECES; first += AT_ONCE) {
      uint4 other[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) other[i] = load(from.y, first + i);
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        uint4& to = x[first + i];
        Eight gate = unpack(Raw{to, {}}, DTYPE);
#pragma unroll
        for (int j = 0; j < 8; ++j) gate.x[j] = silu_near(gate.x[j], DTYPE);
        to = make_uint4(product<DTYPE>(packed<DTYPE>(gate.x[0], gate.x[1]), other[i].x),
                        product<DTYPE>(packed<DTYPE>(gate.x[2], gate.x[3]), other[i].y),
                        product<DTYPE>(packed<DTYPE>(gate.x[4], gate.x[5]), other[i].z),
                        product<DTYPE>(packed<DTYPE>(gate.x[6], gate.x[7]), other[i].w));
      }
    }
  }

  // Of what this warp has, as bits; those of no number are above all others.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      most = larger<DTYPE>(larger<DTYPE>(most, x[i].x), x[i].y);
      most = larger<DTYPE>(larger<DTYPE>(most, x[i].z), x[i].w);
    }
    return most_of_warp(max(most & 0xffffu, most >> 16));
  }

  // To where this warp looks for them, with zeros behind the last column; the sum of what it has.
  __device__ __forceinline__ int write(float up, uint32_t tokens) const {
    const int slots = rows_slots<F, 1, false>(p.chunks);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      uint2 words = make_uint2(0, 0);
      if (up != 0.0f) {
        const Eight y = unpack(Raw{x[i], {}}, DTYPE);
        uint32_t values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = __float_as_uint(__fadd_rn(__fmul_rn(y.x[j], up), ROUNDS));
        words = make_uint2(low_bytes(values), low_bytes(values + 4));
        sum = __dp4a(static_cast<int>(words.x), 0x01010101, sum);
        sum = __dp4a(static_cast<int>(words.y), 0x01010101, sum);
      }
      const uint32_t to = tokens + slot(i) * R::CHUNK + static_cast<int>(threadIdx.x) % EACH * 8;
      if (slot(i) < slots) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(words.x), "r"(words.y) : "memory");
    }
    return sum_of_warp(sum);
  }
};

// What each warp found; and what belongs to the token, which is complete once all warps were waited for.
constexpr int PARTS = 16;  // warps of a block
struct OneParts {
  uint32_t most[PARTS];
  int sums[PARTS];
};
template <class R>
struct OneToken {
  const LinearTask& p;
  const OneParts& parts;
  float scale;  // until it is complete, the largest
  int sum;

  __device__ __forceinline__ void complete(bool first) {
    if (!first) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    sum = sum_of_warp(lane < PARTS ? parts.sums[lane] : 0);
    scale = Steps(scale).scale;
  }
  __device__ __forceinline__ OfToken operator()(int) const { return {scale, __int2float_rn(sum), p.bias * sum}; }
};

// Meanwhile: what there is to do while the row is on its way.
template <Form F, int PIECES, int KIND, int DTYPE, class Meanwhile>
__device__ __forceinline__ float make_codes(const LinearTask& p, const hfl_quantize& from, OneParts& parts,
                                            uint32_t tokens, Meanwhile&& meanwhile) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  OneRow<F, PIECES, KIND, DTYPE> row{p, from, {}};
  row.read();
  meanwhile();
  const uint32_t own = row.largest();
  if (lane == 0) parts.most[warp] = own;
  __syncthreads();
  const uint32_t all = most_of_warp(parts.most[lane % PARTS]);
  const float most = DTYPE == HFL_BF16 ? unpack_bf16(all).x : unpack_f16(all).x;
  const int sum = row.write(Steps(most).up, tokens);
  if (lane == 0) parts.sums[warp] = sum;
  return most;
}

template <Form F, int PIECES, int KIND>
__global__ void __launch_bounds__(RowsRoom<F, 1, false>::THREADS, 2) linear_one_kernel(
    const __grid_constant__ LinearTask p, const __grid_constant__ hfl_quantize from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using R = RowsRoom<F, 1, false>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ OneParts parts;
  RowsResults<R, 1> results{p};
  if (KIND != HFL_OF_GATE) results.begin();  // before the codes, behind which it would come late
  EarlyBlock<F> block(p, shared_address(shared));
  RowsCursor<R> ahead(p, block.warp, block.lane);
#pragma unroll 1
  for (int i = 0; i < R::STAGES; ++i) {
    if (ahead.there()) {
      block.copy_codes(i, ahead);
      ahead.next();
    }
    copy_commit();
  }
  block.clear_sums();
  let_next_begin();  // behind this block's own codes
  wait_for_last();
  const auto meanwhile = [&] {
    if (KIND != HFL_OF_GATE) results.find_bias();
  };
  const float most = from.dtype == HFL_BF16
                         ? make_codes<F, PIECES, KIND, HFL_BF16>(p, from, parts, block.tokens, meanwhile)
                         : make_codes<F, PIECES, KIND, HFL_F16>(p, from, parts, block.tokens, meanwhile);
  OneToken<R> token{p, parts, most, 0};
  if constexpr (KIND == HFL_OF_GATE) {  // anew, as there was no register to keep it in
    results.begin(), results.find_bias();
    RowsCursor<R> again(p, block.warp, block.lane, R::STAGES);
    multiply_units(p, block, again, results, token);
  } else {
    multiply_units(p, block, ahead, results, token);
  }
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
