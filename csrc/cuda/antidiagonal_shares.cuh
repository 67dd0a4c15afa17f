// Sums of antidiagonals to scores: of each tile of queries the share of every block of keys, and of a block of queries
// the sums of its tiles' shares.
#pragma once
#include "antidiagonal_pack.cuh"

namespace hfl {
namespace antidiagonal {
namespace {

constexpr int SHARE_THREADS = 256, FEW_TILES = SHARE_THREADS / 32, MOST_TILES = 64;

// A block of queries: which of its tiles have any, and how many blocks of keys one of them sees.
struct Shares {
  const int32_t* tile;
  const float* sums;
  float* to;
  int tiles, seen;

  __device__ explicit Shares(const Call& call) : tiles(call.tiles) {
    const int64_t head = static_cast<int64_t>(blockIdx.z) * call.a.q_heads + blockIdx.y;
    const int64_t n = call.first / tiles + static_cast<int64_t>(blockIdx.x);
    const int64_t own = call.a.q_pos_b ? blockIdx.z : 0;
    tile = call.tile + (own * call.a.blocks + n) * tiles;
    sums = call.sums + (head * call.rows + static_cast<int64_t>(blockIdx.x) * tiles) * call.key_blocks;
    to = call.a.scores + (head * call.a.blocks + n) * call.key_blocks;
    int reach = -1;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < tiles; i += 32) reach = max(reach, tile[i]);
    reach = __reduce_max_sync(0xffffffffu, reach);
    seen = reach < 0 ? 0 : call.key_blocks;
    if (call.a.causal && reach >= 0) seen = min(reach / tiles + 1, call.key_blocks);
  }
};

// The sums of a block's tiles to its scores.
__global__ void __launch_bounds__(SHARE_THREADS) shares_kernel(const Call call) {
  __shared__ float whole[MOST_TILES];
  wait_for_previous(0);
  const Shares of(call);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int row = warp; row < of.tiles; row += SHARE_THREADS / 32) {
    const float* line = of.sums + static_cast<int64_t>(row) * call.key_blocks;
    if (of.tile[row] < 0) continue;
    float most = -INFINITY, sum = 0.0f;
    for (int m = lane; m < of.seen; m += 32) most = fmaxf(most, line[m]);
    most = most_of<16>(most);
    const float base = most == -INFINITY ? 0.0f : most;
    for (int m = lane; m < of.seen; m += 32) sum += power_of_two(line[m] - base);
    sum = sum_of<16>(sum);
    if (lane == 0) whole[row] = base + __log2f(sum);
  }
  __syncthreads();
  for (int m = thread; m < call.key_blocks; m += SHARE_THREADS) {
    float score = 0.0f;
    for (int row = 0; m < of.seen && row < of.tiles; ++row) {
      const float* line = of.sums + static_cast<int64_t>(row) * call.key_blocks;
      if (of.tile[row] >= 0) score += power_of_two(line[m] - whole[row]);
    }
    of.to[m] = score;
  }
}

// The same where a block has as many tiles as there are warps, and no more than 32 * EACH blocks of keys: a warp holds
// a tile's sums in registers, and its shares meet the others' in shared memory.
template <int EACH>
__global__ void __launch_bounds__(SHARE_THREADS) shares_of_few_kernel(const Call call) {
  __shared__ float shares[FEW_TILES][32 * EACH];
  wait_for_previous(0);
  const Shares of(call);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float* line = of.sums + static_cast<int64_t>(warp) * call.key_blocks;
  const bool there = of.tile[warp] >= 0;
  float x[EACH], most = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) x[i] = there && i * 32 + lane < of.seen ? line[i * 32 + lane] : -INFINITY;
#pragma unroll
  for (int i = 0; i < EACH; ++i) most = fmaxf(most, x[i]);
  most = most_of<16>(most);
  const float base = most == -INFINITY ? 0.0f : most;
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum += x[i] = power_of_two(x[i] - base);
  sum = sum_of<16>(sum);
  const float share = there ? __fdiv_rn(1.0f, sum) : 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) shares[warp][i * 32 + lane] = x[i] * share;
  __syncthreads();
  for (int m = thread; m < call.key_blocks; m += SHARE_THREADS) {
    float score = 0.0f;
#pragma unroll
    for (int row = 0; row < FEW_TILES; ++row) score += shares[row][m];
    of.to[m] = m < of.seen ? score : 0.0f;
  }
}

cudaError_t add_up(const Call& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.rows / call.tiles), static_cast<unsigned>(call.a.q_heads),
                  static_cast<unsigned>(call.a.batch));
  if (call.tiles != FEW_TILES || call.key_blocks > 1024) {
    return follow(shares_kernel, grid, SHARE_THREADS, call, stream);
  }
  if (call.key_blocks <= 256) return follow(shares_of_few_kernel<8>, grid, SHARE_THREADS, call, stream);
  return follow(shares_of_few_kernel<32>, grid, SHARE_THREADS, call, stream);
}

}  // namespace
}  // namespace antidiagonal
}  // namespace hfl
