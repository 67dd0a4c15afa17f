// The rows of ops.delta_linear where they are few: sorted, and cut into digits in shared memory, by every block itself.
#pragma once
#include "delta_kernel.cuh"

namespace hfl {

constexpr int FEW_ROWS = 32, FEW_WARPS = 16, FEW_STAGES = 3, FEW_OUTPUTS = 32, FEW_PIECE = 2, FEW_LOCAL = 8;
constexpr int FEW_CHUNK = 512, FEW_STAGE = FEW_OUTPUTS * FEW_CHUNK / 8, FEW_WIDTH = FEW_PIECE * DIGITS + 1;
constexpr int FEW_SUMS = FEW_OUTPUTS * FEW_WIDTH * 4;

struct FewTask {
  hfl_delta a;
  int tiles, padded, room;  // of outputs; inputs up to a multiple of 1024; rows that the digits have room for

  int64_t bytes(int warps, int rows) const {
    const int64_t grouped = a.groups > 1, sums = grouped * rows * DIGITS * (padded / BLOCK) * 4;
    return warps * (FEW_STAGES * FEW_STAGE + FEW_SUMS * (1 + grouped)) + int64_t{rows} * DIGITS * padded + sums;
  }
};

#ifdef __CUDACC__

// What all warps of a block know.
struct FewBoard {
  int kinds[FEW_ROWS], order[FEW_ROWS], starts[FEW_ROWS + 1], pieces;
  uint32_t cuts, most[FEW_LOCAL];
  int totals[FEW_LOCAL][DIGITS];
  float units[FEW_LOCAL];
};

static_assert(FEW_ROWS <= 32, "a word says where rows are cut");

// As sort_rows, by all threads of a block.
__device__ __forceinline__ void sort_few(const hfl_delta& a, FewBoard& board) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < a.rows) board.kinds[thread] = a.slots_of_rows[static_cast<int64_t>(thread) * a.planes];
  __syncthreads();
  int place = 0, into = 0;
  if (thread < a.rows) {
    const int kind = board.kinds[thread];
    for (int row = 0; row < a.rows; ++row) {
      const int other = board.kinds[row];
      const bool same = other == kind && row < thread;
      into += same, place += same || other < kind;
    }
    board.order[place] = thread;
  }
  __syncthreads();
  bool cut = false;
  if (thread < a.rows) {
    cut = into % FEW_PIECE == 0;
    const int64_t other = place ? board.order[place - 1] : 0;
    for (int plane = 1; !cut && plane < a.planes; ++plane) {
      cut = a.slots_of_rows[thread * int64_t{a.planes} + plane] != a.slots_of_rows[other * a.planes + plane];
    }
  }
  if (thread == 0) board.cuts = 0;
  __syncthreads();
  if (cut) atomicOr(&board.cuts, 1u << place);
  __syncthreads();
  if (cut) board.starts[__popc(board.cuts & ((1u << place) - 1))] = place;
  if (thread == 0) board.pieces = __popc(board.cuts);
  __syncthreads();
  if (thread == 0) board.starts[board.pieces] = a.rows;
  __syncthreads();
}

// Digits of some rows of the order, whose columns follow each other; block_sums: NULL, or a place for each block of a
// column. A thread takes 32 inputs at a time, and a warp those of one row.
__device__ __forceinline__ void cut_rows(const FewTask& p, FewBoard& board, int first, int count, uint8_t* digits,
                                         float* block_sums) {
  const hfl_delta& a = p.a;
  const int thread = static_cast<int>(threadIdx.x), words = p.padded / WORD, threads = static_cast<int>(blockDim.x);
  if (thread < count) board.most[thread] = 0;
  if (thread < count * DIGITS) board.totals[thread / DIGITS][thread % DIGITS] = 0;
  __syncthreads();
  const auto read = [&](int row, int word, uint4(&raw)[4]) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + board.order[first + row] * a.x_r;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw[j] = word * WORD < a.inputs ? reinterpret_cast<const uint4*>(x)[word * 4 + j] : uint4{};
    }
  };
  for (int i = thread; i < count * words; i += threads) {
    uint4 raw[4];
    read(i / words, i % words, raw);
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) most = largest_of(most, raw[j]);
    most = __reduce_max_sync(0xffffffffu, max(most & 0xffffu, most >> 16));
    if (lane_of_thread() == 0) atomicMax(&board.most[i / words], most);
  }
  __syncthreads();
  for (int i = thread; i < count * words; i += threads) {
    const int row = i / words, word = i % words;
    const RowUnit unit(board.most[row], a.dtype);
    uint4 raw[4];
    read(row, word, raw);
    int sums[DIGITS];
    write_word(raw, a.dtype, unit.factor, digits + row * DIGITS * p.padded + word * WORD, p.padded, row & 1 ? 5 : 2,
               sums);
#pragma unroll
    for (int d = 0; d < DIGITS; ++d) {
      const int sum = __reduce_add_sync(0xffffffffu, sums[d]);
      if (lane_of_thread() == 0) atomicAdd(&board.totals[row][d], sum);
      if (!block_sums) continue;
      sums[d] += __shfl_xor_sync(0xffffffffu, sums[d], 1);
      sums[d] += __shfl_xor_sync(0xffffffffu, sums[d], 2);
      if (word % 4 == 0) block_sums[(row * DIGITS + d) * (p.padded / BLOCK) + word / 4] = static_cast<float>(sums[d]);
    }
    if (word == 0) board.units[row] = unit.unit;
  }
}

#endif

}  // namespace hfl
