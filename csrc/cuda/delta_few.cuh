// ops.delta_linear for few rows: one launch, in which every warp goes its own way. delta_linear.cu says what it does.
//
// Grid: a block for each multiprocessor, which has a run of items, 32 outputs of a piece of at most 2 rows each.
// Block: up to 512 threads. All of them sort the rows, and cut those of the block's pieces into digits, which stay in
//   shared memory; then each warp takes one item after the other, with copies of its bits two chunks of 512 inputs
//   ahead. Where there are fewer items than warps, several share the inputs of an item.
// Shared memory: 6 KiB of bits and 1 KiB of sums for each warp; 3 bytes for each input of up to 8 rows.
// On an H200 the bits of 16 tenants come in at 2.1 TB/s, half of what it copies.
#pragma once
#include "delta_few_rows.cuh"

namespace hfl {

#ifdef __CUDACC__

// A warp's sums: 32 outputs x 8 columns, of what bits at the four places of a half byte are worth.
using FewSums = int[2][4][4];

// A block of 128 inputs, the `unit`-th of a chunk. digits: of this lane's column and word.
__device__ __forceinline__ void multiply_few(FewSums& sums, uint4 (&digits)[2], uint32_t bits, uint32_t column,
                                             int unit, uint32_t odd, bool used) {
  const int lane = lane_of_thread(), row = lane / 4;
  load_if(digits[0], column + odd, used);
  load_if(digits[1], column + (odd ^ 16), used);
  const uint32_t part = static_cast<uint32_t>((unit ^ (row >> 1)) << 4 | lane % 4 * 4);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t at = bits + static_cast<uint32_t>((m * 16 + row) * 64) + part;
    const uint32_t upper = load_word(at), lower = load_word(at + 8 * 64);
    const uint32_t upper_low = upper * 16, lower_low = lower * 16;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t mask = 0x10101010u << p,
                     word[4] = {upper & mask, lower & mask, upper_low & mask, lower_low & mask};
      const uint4 both = digits[p / 2];
      mma_bytes(sums[m][p], word, p % 2 ? both.z : both.x, p % 2 ? both.w : both.y);
    }
  }
}

// What a warp works on: the chunks of a plane of an item, or of a part of them.
struct FewStep {
  int task, item, plane, slot, chunk, end;  // task: in the block's run; end: behind the last chunk
  int first, rows;                          // first: place of the piece in the order of rows

  __device__ __forceinline__ void begin(const FewTask& p, const FewBoard& board, int task_, int from, int split,
                                        int chunks) {
    task = task_, item = from + task / split, plane = -1;
    const int piece = item / p.tiles, part = task % split;
    first = board.starts[piece], rows = board.starts[piece + 1] - first;
    chunk = chunks * part / split, end = chunks * (part + 1) / split;
    next_plane(p, board);
  }
  __device__ __forceinline__ void next_plane(const FewTask& p, const FewBoard& board) {
    do {
      slot =
          ++plane < p.a.planes ? p.a.slots_of_rows[static_cast<int64_t>(board.order[first]) * p.a.planes + plane] : -1;
    } while (slot < 0 && plane < p.a.planes);
  }
  __device__ __forceinline__ bool has_bits(const hfl_delta& a) const { return slot >= 0 && slot < a.slots; }

  // False behind the last of `tasks`. Steps of several planes are whole items: chunk 0 comes after the last one.
  __device__ __forceinline__ bool advance(const FewTask& p, const FewBoard& board, int tasks, int warps, int from,
                                          int split, int chunks) {
    if (plane < p.a.planes) {
      if (has_bits(p.a) && ++chunk < end) return true;
      if (p.a.planes > 1) chunk = 0;
      next_plane(p, board);
      if (plane < p.a.planes) return true;
    }
    if (task + warps < tasks) {
      begin(p, board, task + warps, from, split, chunks);
      return true;
    }
    task = tasks;
    return false;
  }
};

// A chunk of 32 outputs: 64 bytes each, whose parts of 16 are permuted within eight outputs.
__device__ __forceinline__ void fetch_few(const FewStep& s, const FewTask& p, uint32_t stage) {
  if (!s.has_bits(p.a)) return;
  const int lane = lane_of_thread(), words = p.a.inputs / WORD, out = s.item % p.tiles * FEW_OUTPUTS;
  const int word = s.chunk * (FEW_CHUNK / WORD) + lane % 4 * 4;
  const int32_t* from = p.a.bits + (static_cast<int64_t>(s.slot) * p.a.outputs + out) * words + word;
#pragma unroll
  for (int i = 0; i < FEW_OUTPUTS / 8; ++i) {
    const int row = lane / 4 + i * 8;
    const bool there = out + row < p.a.outputs && word < words;
    copy_async(stage + static_cast<uint32_t>(row * 64 + ((lane % 4 ^ (row >> 1 & 3)) << 4)),
               there ? from + static_cast<int64_t>(row) * words : p.a.bits, there);
  }
}

// Adds what a warp, or `parts` of them, have of a plane to a lane's results, of output `lane` and up to two rows.
template <bool GROUPED>
__device__ __forceinline__ void add_plane(float (&own)[FEW_PIECE], const float* sums, int parts, const FewTask& p,
                                          const FewBoard& board, const FewStep& s, int local) {
  const int output = min(s.item % p.tiles * FEW_OUTPUTS + lane_of_thread(), p.a.outputs - 1);
  float scale = 1.0f;
  if (!GROUPED) scale = p.a.scales[static_cast<int64_t>(s.slot) * p.a.scale_rows + (p.a.scale_rows > 1 ? output : 0)];
#pragma unroll
  for (int i = 0; i < FEW_PIECE; ++i) {
    if (i >= s.rows) break;
    float sum = 0.0f;
#pragma unroll
    for (int d = DIGITS - 1; d >= 0; --d) {
      float digit = 0.0f;
      for (int part = 0; part < parts; ++part) {
        digit += sums[part * (FEW_SUMS / 4) + lane_of_thread() * FEW_WIDTH + i * DIGITS + d];
      }
      sum = fmaf(sum, 256.0f, GROUPED ? digit : digit - static_cast<float>(board.totals[local + i][d]));
    }
    own[i] = fmaf(sum * board.units[local + i], scale, own[i]);
  }
}

// Rows of an item, as they are in memory.
__device__ __forceinline__ void write_item(float (&own)[FEW_PIECE], const FewTask& p, const FewBoard& board,
                                           const FewStep& s) {
  const int output = s.item % p.tiles * FEW_OUTPUTS + lane_of_thread();
#pragma unroll
  for (int i = 0; i < FEW_PIECE; ++i) {
    if (i < s.rows && output < p.a.outputs) {
      const int64_t row = board.order[s.first + i];
      const uint16_t base = static_cast<const uint16_t*>(p.a.base)[row * p.a.base_r + output];
      const uint16_t sum = from_float(own[i] + to_float(base, p.a.dtype), p.a.dtype);
      static_cast<uint16_t*>(p.a.out)[row * p.a.outputs + output] = s.plane < p.a.planes ? sum : base;
    }
    own[i] = 0.0f;
  }
}

// With a scale for each group of inputs: what a block has added, times its scale.
__device__ __forceinline__ void scale_few(float (&scaled)[2][4], FewSums& sums, const FewTask& p, const FewStep& s,
                                          int block, const float* minus) {
  const hfl_delta& a = p.a;
  const int lane = lane_of_thread(), blocks = a.inputs / BLOCK, of_column = p.padded / BLOCK;
  if (block >= blocks) return;  // nothing was added
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int out = min(s.item % p.tiles * FEW_OUTPUTS + m * 16 + i / 2 * 8 + lane / 4, a.outputs - 1);
      const int64_t line = static_cast<int64_t>(s.slot) * a.scale_rows + (a.scale_rows > 1 ? out : 0);
      const float scale = a.scales[line * a.groups + block / (blocks / a.groups)];
      const int column = min(lane % 4 * 2 + i % 2, s.rows * DIGITS - 1);
      const float twice = static_cast<float>(2 * gathered(sums[m], i));
      scaled[m][i] = fmaf(scale, twice - minus[column * of_column + block], scaled[m][i]);
    }
#pragma unroll
  for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
}

// A warp's share of some items. All warps of the block come through here.
template <bool GROUPED>
struct FewWarp {
  const FewTask& p;
  const FewBoard& board;
  uint32_t stages, columns;  // this warp's bits; the digits of all
  float* sums_of_warp;       // and of the next warps
  const float* block_sums;
  int warp, warps, from, tasks, split, chunks, first_row;
  FewStep now, ahead;
  bool more;

  __device__ __forceinline__ bool go_on(FewStep& s) { return s.advance(p, board, tasks, warps, from, split, chunks); }
  __device__ __forceinline__ void fetch(int stage) {
    if (more) fetch_few(ahead, p, stages + static_cast<uint32_t>(stage * FEW_STAGE)), more = go_on(ahead);
    copy_commit();
  }
  __device__ __forceinline__ void begin() {
    more = warp < tasks, now.task = tasks;
    if (more) now.begin(p, board, warp, from, split, chunks), ahead = now;
    for (int i = 0; i < FEW_STAGES - 1; ++i) fetch(i);
  }

  __device__ __forceinline__ void run() {
    FewSums sums = {};
    float scaled[2][2][4] = {}, own[FEW_PIECE] = {};
    uint4 digits[2] = {};
    FewStep done = now;
#pragma unroll 1
    for (int step = 0; now.task < tasks; step = step + 1 == FEW_STAGES ? 0 : step + 1) {
      copy_wait<FEW_STAGES - 2>();
      __syncwarp();
      fetch(step ? step - 1 : FEW_STAGES - 1);
      if (now.has_bits(p.a)) multiply(sums, scaled, digits, stages + static_cast<uint32_t>(step * FEW_STAGE));
      done = now;
      go_on(now);
      if (split > 1 || (now.task == done.task && now.plane == done.plane)) continue;
      if (done.has_bits(p.a)) {
        leave(sums, scaled);
        __syncwarp();
        add_plane<GROUPED>(own, sums_of_warp, GROUPED ? 2 : 1, p, board, done, done.first - first_row);
        __syncwarp();
      } else if (done.plane < p.a.planes) {
        own[0] = own[1] = __int_as_float(0x7fffffff);  // there is no such slot
      }
      if (now.task != done.task) write_item(own, p, board, done);
    }
    if (split == 1) return;
    if (warp < tasks) leave(sums, scaled);
    __syncthreads();
    if (warp >= tasks || warp % split) return;
    if (done.has_bits(p.a)) {
      add_plane<GROUPED>(own, sums_of_warp, split, p, board, done, done.first - first_row);
    } else if (done.plane < p.a.planes) {
      own[0] = own[1] = __int_as_float(0x7fffffff);
    }
    write_item(own, p, board, done);
  }

 private:
  __device__ __forceinline__ void multiply(FewSums& sums, float (&scaled)[2][2][4], uint4 (&digits)[2], uint32_t bits) {
    const int lane = lane_of_thread(), first = (now.first - first_row) * DIGITS, column = first + lane / 4;
    const bool used = lane / 4 < now.rows * DIGITS;
    const uint32_t odd = static_cast<uint32_t>(column & 1) << 4;
    const uint32_t at = columns + static_cast<uint32_t>(column * p.padded + now.chunk * FEW_CHUNK + lane % 4 * WORD);
#pragma unroll
    for (int unit = 0; unit < FEW_CHUNK / BLOCK; ++unit) {
      multiply_few(sums, digits, bits, at + static_cast<uint32_t>(unit * BLOCK), unit, odd, used);
      if (!GROUPED) continue;
      const float* minus = block_sums + first * (p.padded / BLOCK);
      const int block = now.chunk * (FEW_CHUNK / BLOCK) + unit;
      if (now.chunk % 2) scale_few(scaled[1], sums, p, now, block, minus);
      if (now.chunk % 2 == 0) scale_few(scaled[0], sums, p, now, block, minus);
    }
  }

  // What this warp has of a plane, where others read it; then there is nothing.
  __device__ __forceinline__ void leave(FewSums& sums, float (&scaled)[2][2][4]) {
    float* to = sums_of_warp + lane_of_thread() / 4 * FEW_WIDTH + lane_of_thread() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (m * 16 + i / 2 * 8) * FEW_WIDTH + i % 2;
        if (lane_of_thread() % 4 < FEW_PIECE * DIGITS / 2) {
          to[at] = GROUPED ? scaled[0][m][i] : static_cast<float>(2 * gathered(sums[m], i));
          if (GROUPED) to[at + FEW_SUMS / 4] = scaled[1][m][i];
        }
        scaled[0][m][i] = scaled[1][m][i] = 0.0f;
      }
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
  }
};

template <bool GROUPED>
__global__ void __launch_bounds__(FEW_WARPS * 32, 1) delta_few_kernel(const FewTask p) {
  extern __shared__ __align__(128) unsigned char few_shared[];
  __shared__ FewBoard board;
  wait_for_previous(p.room);
  sort_few(p.a, board);
  constexpr int SUMS = (GROUPED ? 2 : 1) * FEW_SUMS;
  const int warps = static_cast<int>(blockDim.x) / 32, warp = warp_of_thread(),
            chunks = (p.a.inputs - 1) / FEW_CHUNK + 1;
  const int items = board.pieces * p.tiles, blocks = static_cast<int>(gridDim.x), each = (items - 1) / blocks + 1;
  const auto border = [&](int block) { return static_cast<int>(static_cast<int64_t>(items) * block / blocks); };
  const int last = border(static_cast<int>(blockIdx.x) + 1);
  const int split = GROUPED || p.a.planes > 1 ? 1 : max(1, min(warps / each, min(8, chunks)));
  unsigned char* all_sums = few_shared + warps * FEW_STAGES * FEW_STAGE;
  uint8_t* digits = all_sums + warps * SUMS;
  float* block_sums = GROUPED ? reinterpret_cast<float*>(digits + p.room * DIGITS * p.padded) : nullptr;
  for (int from = border(static_cast<int>(blockIdx.x)), to; from < last; from = to) {
    int piece = from / p.tiles;
    const int row = board.starts[piece];
    do ++piece;
    while (piece < board.pieces && piece * p.tiles < last && board.starts[piece + 1] - row <= p.room);
    to = min(last, piece * p.tiles);
    FewWarp<GROUPED> work = {p,
                             board,
                             shared_address(few_shared) + static_cast<uint32_t>(warp * FEW_STAGES * FEW_STAGE),
                             shared_address(digits),
                             reinterpret_cast<float*>(all_sums + warp * SUMS),
                             block_sums,
                             warp,
                             warps,
                             from,
                             (to - from) * split,
                             split,
                             chunks,
                             row,
                             {},
                             {},
                             false};
    work.begin();
    cut_rows(p, board, row, board.starts[piece] - row, digits, block_sums);
    __syncthreads();
    work.run();
    copy_wait<0>();
    __syncthreads();
  }
}

#endif

}  // namespace hfl
