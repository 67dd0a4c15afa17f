// w4a8_experts of many tokens for sm_90a: a block for each tile of 128 rows of an expert's weight and T of its tokens,
// which lie one behind the other. The block works as linear_spread.cuh has it.
#pragma once
#include "experts.cuh"
#include "linear_spread.cuh"

namespace hfl {

template <class R>
__global__ void __launch_bounds__(R::THREADS, 1) experts_many_kernel(const __grid_constant__ ExpertsTask task,
                                                                     const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ SpreadBoard<R> board;
  __shared__ ExpertsBoard experts;
  __shared__ LinearTask p;  // as of a weight alone, for the tokens of this tile
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  const hfl_experts& a = task.a;
  const int number = static_cast<int>(blockIdx.x);
  let_next_begin();
  if (threadIdx.x == 0) board.init(), fetch_map(&map);
  wait_for_last();
  if (threadIdx.x < 32) experts.fill(a, R::T, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (number >= task.units * experts.firsts[a.experts]) return;
  if (threadIdx.x == 0) {
    p.row_tiles = task.units, p.token_tiles = experts.firsts[a.experts];
    const ExpertsTile tile = experts.tile(ManyWork(p, number, 0, 0, -1).token_tile, a.experts, R::T);
    const int64_t e = tile.expert, run = e * task.panels * task.chunks;
    p.a.tokens = tile.count, p.a.rows = a.rows, p.a.columns = a.columns, p.a.dtype = a.dtype;
    p.a.token_scale = a.token_scale, p.a.sums = a.sums;
    p.a.codes = a.codes + run * CHUNK_BYTES;
    p.a.groups = a.groups + run * task.groups * (2 * PANEL);
    p.a.scale = a.scale + e * a.rows, p.a.shift = a.shift ? a.shift + e * a.rows : nullptr;
    p.a.bias = nullptr, p.a.out = a.out;
    p.panels = task.panels, p.chunks = task.chunks, p.groups = task.groups, p.bias = task.bias;
    p.steps = task.chunks / R::CHUNKS;
    p.tokens_from = tile.first, p.tokens = tile.count;
  }
  __syncthreads();
  ManyWork work(p, number, 0, p.steps, -1);
  work.token_tile = 0;
  __syncthreads();
  if (warp_of_block() < R::WORKERS / 32) {
    SpreadGroup<R>(p, board, base).run(work);
  } else if (warp_of_block() == R::WORKERS / 32) {
    ManyFeeder<R>(p, map, board, base).run_one(work);
  }
#endif
}

}  // namespace hfl
