// What ops.delta_linear knows of the rows of x before it reads a bit: their digits, and which rows share their slots.
#pragma once
#include "eight.cuh"
#include "launch.cuh"

namespace hfl {

// A row is 2^-e times whole numbers below 2^22, and each of these three digits of 8 bits: d0 + 2^8 d1 + 2^16 d2, all of
// -128 to 127. bfloat16 is exact down to 2^-14 of the row's largest value, float16 down to 2^-11.
constexpr int DIGITS = 3, WORD = 32, BLOCK = 128, CHUNK = 1024, FRACTION = 22;
constexpr int ROW_THREADS = 512, ROW_WARPS = ROW_THREADS / 32;

// Room for so many values in scratch memory, behind `bytes` bytes of it, which become more.
template <class T>
T* take(void* scratch, int64_t& bytes, int64_t count) {
  T* at = reinterpret_cast<T*>(static_cast<char*>(scratch) + bytes);
  bytes += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
  return at;
}

// Where everything lies in the scratch memory.
struct DeltaRows {
  uint8_t* digits;  // [R, DIGITS, padded K]: the 32 bytes of a word of bits are words 4, 0, 5, 1, 6, 2, 7, 3:
                    // byte i of word j is input 8 i + j
  float* sums;      // [R, DIGITS, padded K / BLOCK], of digits
  float* totals;    // [R, DIGITS]
  float* units;     // [R], worth of a whole number; NaN where an input is not finite
  int32_t* order;   // [R], rows, those with the same slots next to each other
  int32_t* starts;  // [R + 1], where each piece begins in it
  int32_t* pieces;  // [1], how many there are
  int32_t padded;
  int64_t bytes;

  explicit DeltaRows(const hfl_delta& a) : padded((a.inputs + CHUNK - 1) / CHUNK * CHUNK) {
    const int64_t rows = a.rows;
    bytes = 0;
    digits = take<uint8_t>(a.scratch, bytes, rows * DIGITS * padded);
    sums = take<float>(a.scratch, bytes, rows * DIGITS * (padded / BLOCK));
    totals = take<float>(a.scratch, bytes, rows * DIGITS);
    units = take<float>(a.scratch, bytes, rows);
    order = take<int32_t>(a.scratch, bytes, rows);
    starts = take<int32_t>(a.scratch, bytes, rows + 1);
    pieces = take<int32_t>(a.scratch, bytes, 1);
  }
};

#ifdef __CUDACC__

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32; }

// Sum of x over the threads before this one; total: over all.
__device__ __forceinline__ int count_before(int x, int& total) {
  __shared__ int sums[ROW_WARPS];
  int running = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, running, step);
    running += lane_of_thread() >= step ? other : 0;
  }
  __syncthreads();  // nobody still reads the sums of the call before
  if (lane_of_thread() == 31) sums[warp_of_thread()] = running;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < ROW_WARPS; ++warp) {
    before += warp < warp_of_thread() ? sums[warp] : 0;
    total += sums[warp];
  }
  return before + running - x;
}

// The places of some threads' rows among those of their kind; counts: shared, how many there were before.
__device__ __forceinline__ int place_of(int kind, bool there, int* counts) {
  const uint32_t same = __match_any_sync(0xffffffffu, there ? kind : -1);
  const int first = __ffs(same) - 1;
  int before = 0;
  if (there && lane_of_thread() == first) before = atomicAdd(&counts[kind], __popc(same));
  return __shfl_sync(0xffffffffu, before, first) + __popc(same & ((1u << lane_of_thread()) - 1));
}

// act(row, read(row)), a row of each thread in a round, and all threads in every round: some rounds are read at once.
template <typename Read, typename Do>
__device__ __forceinline__ void each_round(int rows, Read read, Do act) {
  constexpr int AT_ONCE = 4;
#pragma unroll 1
  for (int first = 0; first < rows; first += AT_ONCE * ROW_THREADS) {
    decltype(read(0)) x[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) x[i] = read(first + i * ROW_THREADS + static_cast<int>(threadIdx.x));
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (first + i * ROW_THREADS < rows) act(first + i * ROW_THREADS + static_cast<int>(threadIdx.x), x[i]);
    }
  }
}

// Sort rows by their first slot, and cut them into pieces of the same slots and at most `most` rows. One block.
// counts, begins: shared, a place for each slot, before them one for none, behind them one for slots that are not
// there.
template <typename To>
__device__ __forceinline__ void sort_rows(const hfl_delta& a, const To& to, int most, int* counts, int* begins) {
  const int thread = static_cast<int>(threadIdx.x), kinds = a.slots + 2;
  const auto kind = [&](int row) {
    return row < a.rows ? min(max(a.slots_of_rows[static_cast<int64_t>(row) * a.planes], -1), a.slots) + 1 : 0;
  };
  for (int i = thread; i < kinds; i += ROW_THREADS) counts[i] = 0;
  __syncthreads();
  each_round(a.rows, kind, [&](int row, int own) { place_of(own, row < a.rows, counts); });
  __syncthreads();
  int before = 0, total = 0, pieces = 0, more = 0;
  for (int first = 0; first < kinds; first += ROW_THREADS, before += total, pieces += more) {
    const int i = first + thread, count = i < kinds ? counts[i] : 0;
    const int begin = before + count_before(count, total);
    const int own = (count + most - 1) / most, piece = pieces + count_before(own, more);
    if (a.planes == 1) {
      for (int n = 0; n < own; ++n) to.starts[piece + n] = begin + n * most;
    }
    if (i < kinds) begins[i] = begin, counts[i] = begin;
  }
  __syncthreads();
  each_round(a.rows, kind, [&](int row, int own) {
    const int place = place_of(own, row < a.rows, counts);
    if (row < a.rows) to.order[place] = row;
  });
  if (a.planes == 1) {
    if (thread == 0) to.starts[pieces] = a.rows, *to.pieces = pieces;
    return;
  }
  __syncthreads();
  before = 0;
  for (int first = 0; first < a.rows; first += ROW_THREADS, before += total) {
    const int i = first + thread;
    bool cut = false;
    if (i < a.rows) {
      const int64_t row = to.order[i], other = i ? to.order[i - 1] : 0;
      cut = (i - begins[kind(static_cast<int>(row))]) % most == 0;
      for (int plane = 1; !cut && plane < a.planes; ++plane) {
        cut = a.slots_of_rows[row * a.planes + plane] != a.slots_of_rows[other * a.planes + plane];
      }
    }
    const int piece = before + count_before(cut, total);
    if (cut) to.starts[piece] = i;
  }
  if (thread == 0) to.starts[before] = a.rows, *to.pieces = before;
}

// The largest of the threads' numbers, in all of them; and three sums, in the first.
__device__ __forceinline__ uint32_t most_of_block(uint32_t x) {
  __shared__ uint32_t all[ROW_WARPS];
  const uint32_t own = __reduce_max_sync(0xffffffffu, x);
  if (lane_of_thread() == 0) all[warp_of_thread()] = own;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, all[lane_of_thread() % ROW_WARPS]);
}

__device__ __forceinline__ float to_float(uint16_t x, int dtype) {
  return dtype == HFL_BF16 ? unpack_bf16(x).x : unpack_f16(x).x;
}
__device__ __forceinline__ uint16_t from_float(float x, int dtype) {
  return static_cast<uint16_t>(dtype == HFL_BF16 ? pack_bf16(x, 0.0f) : pack_f16(x, 0.0f));
}

// How a row with such a largest value, as bits of its dtype without the sign, becomes whole numbers.
struct RowUnit {
  float factor, unit;  // what a value is multiplied with; worth of 1, NaN where the value is not finite

  __device__ __forceinline__ RowUnit(uint32_t largest, int dtype) {
    const bool finite = largest < (dtype == HFL_BF16 ? 0x7f80u : 0x7c00u);
    const float value = dtype == HFL_BF16 ? unpack_bf16(largest).x : unpack_f16(largest).x;  // < 2^(exponent - 126)
    const int exponent = max(static_cast<int>(__float_as_uint(value) >> 23), FRACTION + 2);
    factor = finite ? __uint_as_float(static_cast<uint32_t>(FRACTION + 253 - exponent) << 23) : 0.0f;
    unit = __uint_as_float(finite ? static_cast<uint32_t>(exponent - FRACTION + 1) << 23 : 0x7fffffffu);
  }
};

// The larger one of both halves of what is largest in 16 bytes, without signs.
__device__ __forceinline__ uint32_t largest_of(uint32_t most, const uint4& raw) {
  return __vmaxu2(most, __vmaxu2(__vmaxu2(raw.x & 0x7fff7fffu, raw.y & 0x7fff7fffu),
                                 __vmaxu2(raw.z & 0x7fff7fffu, raw.w & 0x7fff7fffu)));
}

// The digits of 32 inputs, 8 words of each, and what they add up to. swap: bit d is 1 where the halves of digit d are
// exchanged.
__device__ __forceinline__ void write_word(const uint4 (&raw)[4], int dtype, float factor, uint8_t* to, int64_t apart,
                                           int swap, int (&sums)[DIGITS]) {
  uint32_t words[DIGITS][8] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Eight part = unpack(Raw{raw[i], uint4{}}, dtype);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int low = __float2int_rn(part.x[j] * factor), middle = (low + 128) >> 8, high = (middle + 128) >> 8;
      words[0][j] |= static_cast<uint32_t>(low & 255) << 8 * i;
      words[1][j] |= static_cast<uint32_t>(middle & 255) << 8 * i;
      words[2][j] |= static_cast<uint32_t>(high & 255) << 8 * i;
    }
  }
#pragma unroll
  for (int d = 0; d < DIGITS; ++d) {
    sums[d] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[d] = __dp4a(static_cast<int>(words[d][j]), 0x01010101, sums[d]);
    uint4* at = reinterpret_cast<uint4*>(to + d * apart);
    const int first = swap >> d & 1;
    at[first] = make_uint4(words[d][4], words[d][0], words[d][5], words[d][1]);
    at[first ^ 1] = make_uint4(words[d][6], words[d][2], words[d][7], words[d][3]);
  }
}

// A row to digits. A thread takes 32 inputs at a time.
__device__ __forceinline__ void write_digits(const hfl_delta& a, const DeltaRows& to, int row) {
  __shared__ int totals[DIGITS];
  const int thread = static_cast<int>(threadIdx.x), words = a.inputs / WORD;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.x) + row * a.x_r);
  uint32_t most = 0;
  for (int word = thread; word < words; word += ROW_THREADS) {
#pragma unroll
    for (int i = 0; i < 4; ++i) most = largest_of(most, from[word * 4 + i]);
  }
  if (thread < DIGITS) totals[thread] = 0;
  const RowUnit unit(most_of_block(max(most & 0xffffu, most >> 16)), a.dtype);
  uint8_t* digits = to.digits + static_cast<int64_t>(row) * DIGITS * to.padded;
  float* block_sums = to.sums + static_cast<int64_t>(row) * DIGITS * (to.padded / BLOCK);
  for (int word = thread; word < to.padded / WORD; word += ROW_THREADS) {
    uint4 raw[4] = {};
    if (word < words) {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[i] = from[word * 4 + i];
    }
    int sums[DIGITS];
    write_word(raw, a.dtype, unit.factor, digits + word * WORD, to.padded, 0, sums);
#pragma unroll
    for (int d = 0; d < DIGITS;
         ++d) {  // a block is 4 words, of 4 threads side by side; padded is so that whole warps are here
      sums[d] += __shfl_xor_sync(0xffffffffu, sums[d], 1);
      sums[d] += __shfl_xor_sync(0xffffffffu, sums[d], 2);
      if (word % 4) continue;
      block_sums[d * (to.padded / BLOCK) + word / 4] = static_cast<float>(sums[d]);
      atomicAdd(&totals[d], sums[d]);
    }
  }
  __syncthreads();
  if (thread < DIGITS) to.totals[row * DIGITS + thread] = static_cast<float>(totals[thread]);
  if (thread == 0) to.units[row] = unit.unit;
}

#endif

}  // namespace hfl
