// What the kernels of ops.score_antidiagonal share: which tile of the product is computed when, and how its logits
// become sums; and how its factors come to shared memory where they have not been put side by side before.
//
// The logits of a head are one product over an inner axis of stride * D: chunk i of D channels of tile r of queries is
// the query at place r * stride + stride - 1 - i, chunk i of tile c of keys is key c * stride + i. A stage holds 64
// channels of 128 tiles of queries (a strip) and of some tiles of keys, a row of 128 bytes each, whose 16-byte pieces
// are permuted by the row's number, so that neither ldmatrix nor wgmma meets a bank twice.
#pragma once
#include <math.h>

#include <type_traits>

#include "../hf_longctx.h"
#include "ptx.cuh"

namespace hfl {
namespace antidiagonal {

constexpr int ROWS = 128, DEEP = 64, LINE = DEEP * 2;  // tiles of a strip; channels of a stage, and their bytes
constexpr int MOST_STRIDE = 32, TOGETHER = 16;         // strips that walk along the keys together, for the L2

// A call, and its scratch; of some blocks of queries at a time.
struct Call {
  hfl_antidiagonal a;
  int32_t tiles, columns, key_blocks;  // tiles of a block, of the keys; M
  bool lies;                           // factors may be read where they lie
  int32_t* apart;                      // -1: they are, since every block has all of its queries, in their order
  int32_t* last;                       // [B or 1], position of the last query
  int32_t* source;                     // [B or 1, N * block], which query stands at a place of its block, -1: none
  int32_t* tile;                       // [B or 1, N * tiles], which tile of the text each is, -1: it has no query
  int32_t* reach;                      // [B or 1, N * tiles / ROWS], the last of a strip's
  float* sums;                         // [B, Hq, rows, M], log2 of the sum over a block's keys
  char* queries;                       // [B, Hq, rows, stride * D], tiles side by side; NULL: they are not
  char* keys;                          // [B, Hkv, padded, stride * D]
  float* query_sizes;                  // [B, Hq, rows], what 8 bits are multiplied with
  float* key_sizes;                    // [B, Hkv, padded]
  int32_t padded;                      // tiles of keys that there is room for
  int32_t first, rows;                 // tiles of queries of this part: from where on, how many
  int32_t strips, together, widths;    // of the part; `widths` parts of the keys for each strip
  int32_t works;
  int32_t* seen;  // [works / 2 + 1], how many pairs of works see a key, and these
};

// Strips of all queries of a row.
__host__ __device__ __forceinline__ int strips_of(const Call& call) {
  return (call.a.blocks * call.tiles - 1) / ROWS + 1;
}

// One strip of a head against one part of the keys.
struct Work {
  int32_t b, head, strip, column;  // `column`: first tile of keys

  __device__ Work(const Call& call, int index, int columns) {
    const int group = call.a.q_heads / call.a.kv_heads, units = group * call.strips;
    const int side = call.together * call.widths, of_head = side * ((units - 1) / call.together + 1);
    const int pair = index / of_head, rest = index % of_head;
    const int unit = rest / side * call.together + rest % side % call.together;
    b = pair / call.a.kv_heads;
    head = pair % call.a.kv_heads * group + unit % group;
    strip = unit < units ? unit / group : call.strips;  // one that does not exist
    column = rest % side / call.together * columns;
  }

  // Tile of the text of row `row` of the strip, -1 for none.
  __device__ int tile(const Call& call, int row) const {
    const int at = strip * ROWS + row;
    const int64_t own = call.a.q_pos_b ? b : 0;
    return at < call.rows ? call.tile[own * call.a.blocks * call.tiles + call.first + at] : -1;
  }
  // The last of the strip's tiles.
  __device__ int reach(const Call& call) const {
    const int64_t own = call.a.q_pos_b ? b : 0;
    return strip < call.strips ? call.reach[own * strips_of(call) + call.first / ROWS + strip] : -1;
  }
  // How many tiles of keys, from `column` on, a row sees; at most 0: none.
  __device__ int seen(const Call& call, int tile) const {
    const int end = call.a.causal ? min(tile + 1, call.columns) : tile < 0 ? 0 : call.columns;
    return end - column;
  }
};

// A thread's part of copying stages: of every row that is its own modulo THREADS / 8, the same 16-byte piece.
template <int COLUMNS, int THREADS>
struct Loader {
  static constexpr int STEP = THREADS / 8, BYTES = (ROWS + COLUMNS) * LINE;
  static_assert(STEP % 8 == 0, "a thread's pieces are permuted alike");
  const char* q;
  const char* k;
  const int32_t* sources;  // [ROWS, stride], in shared memory, from the thread's first row on
  int32_t from, last, i, channel, place;

  __device__ Loader(const Call& call, const Work& work, const int32_t* sources, int thread)
      : sources(sources + thread / 8 * call.a.stride) {
    const int64_t b = work.b, head = work.head, kv_head = work.head / (call.a.q_heads / call.a.kv_heads);
    q = static_cast<const char*>(call.a.q) + (b * call.a.q_b + head * call.a.q_h) * 2;
    k = static_cast<const char*>(call.a.k) + (b * call.a.k_b + kv_head * call.a.k_h) * 2;
    from = (work.column + thread / 8) * call.a.stride;
    last = call.a.stored - 1;
    if (call.a.causal) last = min(last, call.last[call.a.q_pos_b ? b : 0]);
    i = 0, channel = thread % 8 * 8;
    wrap(call.a.dim);
    place = thread / 8 * LINE + (thread % 8 ^ thread / 8 % 8) * 16;
  }
  __device__ void wrap(int dim) {
    while (channel >= dim) channel -= dim, ++i;
  }
  // Copies the next stage; the caller commits.
  __device__ void copy(const Call& call, char* to) {
    const int stride = call.a.stride, q_t = static_cast<int>(call.a.q_t), k_t = static_cast<int>(call.a.k_t);
    const int32_t* source = sources + stride - 1 - i;
    const bool inner = i < stride;  // else the axis ends within the stage
#pragma unroll
    for (int j = 0; j < ROWS / STEP; ++j) {
      const int32_t at = inner ? source[j * STEP * stride] : -1;
      copy_async(to + place + j * STEP * LINE, at < 0 ? q : q + (int64_t{at} * q_t + channel) * 2, at >= 0);
    }
    to += ROWS * LINE;
    int32_t key = from + i;
#pragma unroll
    for (int j = 0; j < COLUMNS / STEP; ++j) {
      const bool there = inner && key <= last;
      copy_async(to + place + j * STEP * LINE, there ? k + (int64_t{key} * k_t + channel) * 2 : k, there);
      key += STEP * stride;
    }
    channel += DEEP;
    wrap(call.a.dim);
  }
};

// Which query stands where, of a strip: `to` [ROWS, stride].
__device__ __forceinline__ void read_sources(const Call& call, const Work& work, int32_t* to, int thread, int threads) {
  const int stride = call.a.stride, from = work.strip * ROWS, count = min(ROWS, call.rows - from) * stride;
  const int64_t own = call.a.q_pos_b ? work.b : 0;
  const int32_t* source = call.source + own * call.a.blocks * call.a.block +
                          (static_cast<int64_t>(call.first) + from) * stride;
  for (int i = thread; i < ROWS * stride; i += threads) to[i] = i < count ? source[i] : -1;
}

template <int STEP>
__device__ __forceinline__ float most_of(float x) {
  for (int step = 1; step <= STEP; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <int STEP>
__device__ __forceinline__ float sum_of(float x) {
  for (int step = 1; step <= STEP; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sums of products become logits where they are; those of whole numbers too, or there would be twice as many registers.
__device__ __forceinline__ float sum_in(float place) { return place; }
__device__ __forceinline__ float sum_in(int32_t place) { return static_cast<float>(place); }
__device__ __forceinline__ float logit_in(float place) { return place; }
__device__ __forceinline__ float logit_in(int32_t place) { return __int_as_float(place); }
__device__ __forceinline__ void put(float& place, float logit) { place = logit; }
__device__ __forceinline__ void put(int32_t& place, float logit) { place = __float_as_int(logit); }

// Of four numbers in each of the four lanes of a row, lane c gets the sum of those at c.
__device__ __forceinline__ float sum_of_own(const float (&x)[4], int c) {
  const bool odd = c & 1, far = c & 2;
  const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1);
  const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  return (far ? high : low) + __shfl_xor_sync(0xffffffffu, far ? low : high, 2);
}

// Logits in units of log 2 of 16 rows and 8 * NT tiles of keys, as mma leaves them (lane 4g + c: rows g and g + 8,
// columns 2c and 2c + 1 of each eight), to log2 sums over blocks of TILES. `seen`: columns that each row sees; `room`:
// blocks that exist; `to`: where a row's first block goes, NULL: the row does not exist. NaN comes out of NaN and of
// +inf. What is less than 2^-126 of the row's largest here is nothing.
template <int TILES, int NT, typename A>
__device__ __forceinline__ void write_sums(A (&x)[NT][4], const int (&seen)[2], float* const (&to)[2], int room,
                                           int lane) {
  constexpr int BLOCKS = NT * 8 / TILES, EACH = TILES / 8;  // steps of eight columns in a block; TILES 4: half of one
  const int c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int left = seen[half] - 2 * c;
    float most = -INFINITY;
    if (__any_sync(0xffffffffu, seen[half] < NT * 8)) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n * 8 >= left) put(x[n][2 * half], -INFINITY);
        if (n * 8 + 1 >= left) put(x[n][2 * half + 1], -INFINITY);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) most = fmaxf(most, fmaxf(logit_in(x[n][2 * half]), logit_in(x[n][2 * half + 1])));
    most = most_of<2>(most);
    const float base = most == -INFINITY ? 0.0f : most;
    const auto of_step = [&](int n) {
      return power_of_two(logit_in(x[n][2 * half]) - base) + power_of_two(logit_in(x[n][2 * half + 1]) - base);
    };
    const auto of_block = [&](int block) {
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < EACH; ++n) sum += of_step(block * EACH + n);
      return sum;
    };
    const auto write = [&](int block, float sum, bool writes) {
      if (writes && to[half] && block < room) to[half][block] = base + __log2f(sum);
    };
    if constexpr (TILES == 4) {
#pragma unroll
      for (int n = 0; n < NT; n += 2) {  // lanes 2i and 2i + 1 have parts of one block of each step
        const float first = of_step(n), next = of_step(n + 1);
        const float sum = (c & 1 ? next : first) + __shfl_xor_sync(0xffffffffu, c & 1 ? first : next, 1);
        write(2 * (n + (c & 1)) + c / 2, sum, true);
      }
    } else if constexpr (BLOCKS % 4 == 0) {
#pragma unroll
      for (int block = 0; block < BLOCKS; block += 4) {
        const float four[4] = {of_block(block), of_block(block + 1), of_block(block + 2), of_block(block + 3)};
        write(block + c, sum_of_own(four, c), true);
      }
    } else {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) write(block, sum_of<2>(of_block(block)), c == block);
    }
  }
}

// The number of the thread, read anew, so that what follows from it takes no registers before.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The same of products, for a call's size of blocks. EIGHT: of what was divided by `query_sizes` and `key_sizes`.
template <bool EIGHT, int NT, typename A>
__device__ __forceinline__ void write_sums(const Call& call, const Work& work, A (&x)[NT][4], int row, int column,
                                           int lane) {
  const float scale = call.a.scale / static_cast<float>(call.a.stride) * LOG2E;
  float factor[2] = {scale, scale};
  int seen[2];
  float* to[2];
  const int first = (work.column + column) / call.tiles, room = call.key_blocks - first;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + lane / 4 + 8 * half, at = work.strip * ROWS + own;
    seen[half] = work.seen(call, work.tile(call, own)) - column;
    const int64_t line = (static_cast<int64_t>(work.b) * call.a.q_heads + work.head) * call.rows + at;
    to[half] = at < call.rows ? call.sums + line * call.key_blocks + first : nullptr;
    if (EIGHT && at < call.rows) factor[half] *= call.query_sizes[line];
  }
  const int64_t pair = static_cast<int64_t>(work.b) * call.a.kv_heads + work.head / (call.a.q_heads / call.a.kv_heads);
  const float* sizes = EIGHT ? call.key_sizes + pair * call.padded + work.column + column + lane % 4 * 2 : nullptr;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const float2 size = EIGHT ? *reinterpret_cast<const float2*>(sizes + n * 8) : make_float2(1.0f, 1.0f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      put(x[n][2 * half], sum_in(x[n][2 * half]) * (EIGHT ? factor[half] * size.x : factor[half]));
      put(x[n][2 * half + 1], sum_in(x[n][2 * half + 1]) * (EIGHT ? factor[half] * size.y : factor[half]));
    }
  }
  switch (call.tiles) {
    case 4: return write_sums<4, NT>(x, seen, to, room, lane);
    case 8: return write_sums<8, NT>(x, seen, to, room, lane);
    case 16: return write_sums<16, NT>(x, seen, to, room, lane);
    case 32: return write_sums<32, NT>(x, seen, to, room, lane);
    default: return write_sums<64, NT>(x, seen, to, room, lane);
  }
}

}  // namespace antidiagonal
}  // namespace hfl
