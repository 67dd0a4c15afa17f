// ops.score_antidiagonal on every device: tiles of 128 x 128 logits with mma.m16n8k16.
//
// Grid: one tile each. Block: 256 threads, two on a multiprocessor; a warp has 32 x 64 of the logits.
// Shared memory: two stages of 32 KiB, and a strip's table of queries, 512 bytes times the stride.
#pragma once
#include "antidiagonal_tile.cuh"

namespace hfl {
namespace antidiagonal {

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
  uint4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "r"(shared_address(row))
               : "memory");
  return r;
}

template <typename T>
struct Warps {
  static constexpr int THREADS = 256, STAGES = 2, COLUMNS = 128, SLABS = 2, NT = 8;
  using Copies = Loader<COLUMNS, THREADS>;
  static size_t bytes(int stride) { return STAGES * Copies::BYTES + sizeof(int32_t) * ROWS * stride; }

  // Adds the products of a stage.
  __device__ static void multiply(const char* stage, int row, int column, float (&x)[SLABS][NT][4], int lane) {
    const char* queries = stage + (row + lane % 16) * LINE;
    const char* keys = stage + (ROWS + column + lane / 16 * 8 + lane % 8) * LINE;
#pragma unroll 2  // all four would take too many registers for two blocks
    for (int s = 0; s < DEEP / 16; ++s) {
      uint4 a[SLABS];
#pragma unroll
      for (int m = 0; m < SLABS; ++m) {
        a[m] = load_matrices(queries + m * 16 * LINE + ((2 * s + lane / 16) ^ (lane % 8)) * 16);
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        const uint4 b = load_matrices(keys + n * 8 * LINE + ((2 * s + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
        for (int m = 0; m < SLABS; ++m) {
          if constexpr (std::is_same<T, __half>::value) {
            mma_f16(x[m][n], a[m], b.x, b.y), mma_f16(x[m][n + 1], a[m], b.z, b.w);
          } else {
            mma_bf16(x[m][n], a[m], b.x, b.y), mma_bf16(x[m][n + 1], a[m], b.z, b.w);
          }
        }
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(Warps<T>::THREADS, 2) mma_kernel(const Call call) {
  using W = Warps<T>;
  extern __shared__ __align__(128) char stages[];
  int32_t* sources = reinterpret_cast<int32_t*>(stages + W::STAGES * W::Copies::BYTES);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const Work work(call, blockIdx.x, W::COLUMNS);
  const bool any = thread < ROWS && work.seen(call, work.tile(call, thread)) > 0;
  if (!__syncthreads_or(any)) return;
  read_sources(call, work, sources, thread, W::THREADS);
  __syncthreads();
  typename W::Copies copies(call, work, sources, thread);
  const int steps = (call.a.stride * call.a.dim - 1) / DEEP + 1, row = warp / 2 * 32, column = warp % 2 * 64;
  float x[W::SLABS][W::NT][4] = {};
  copies.copy(call, stages);
  copy_commit();
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other
    if (step + 1 < steps) copies.copy(call, stages + (step + 1) % 2 * W::Copies::BYTES);
    copy_commit();
    W::multiply(stages + step % 2 * W::Copies::BYTES, row, column, x, lane);
  }
  const int again = thread_anew(), top = again / 64 * 32, left = again / 32 % 2 * 64;
#pragma unroll
  for (int m = 0; m < W::SLABS; ++m) write_sums<false>(call, work, x[m], top + 16 * m, left, again % 32);
}

}  // namespace antidiagonal
}  // namespace hfl
