// The products of ops.delta_linear: signs that stay bits until the registers, and digits of x, both through shared
// memory.
#pragma once
#include "delta_rows.cuh"

namespace hfl {

constexpr int DELTA_THREADS = 256, OUTPUTS = 128, STAGES = 4;  // OUTPUTS: of an item
constexpr int MOST_TILES = 3, MOST_PIECE = 8;                  // columns in eights, rows of a piece
constexpr int BITS_BYTES = OUTPUTS * CHUNK / 8;
constexpr int OWN = OUTPUTS * MOST_PIECE / DELTA_THREADS;  // results of a thread

__host__ __device__ constexpr int tiles_of(int rows) { return (rows * DIGITS + 7) / 8; }
__host__ __device__ constexpr int stage_bytes(int piece) { return BITS_BYTES + tiles_of(piece) * 8 * CHUNK; }
constexpr int delta_shared(int piece) {
  return STAGES * stage_bytes(piece) + 2 * OUTPUTS * (tiles_of(piece) * 8 + 1) * 4;
}

// c[16, 8] += a[16, 32] b[32, 8]: a of bytes 0 to 255, b of bytes -128 to 127
__device__ __forceinline__ void mma_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes of shared memory, or what was there before: where no column is, nobody asks for the product.
__device__ __forceinline__ void load_if(uint4& x, uint32_t at, bool there) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
               : "r"(at), "r"(static_cast<int>(there)));
}
__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}

// A step of a block: some inputs of a plane of an item, which is OUTPUTS outputs of a piece.
struct DeltaStep {
  int item, plane, chunk;  // plane P: the piece has no slot
  int slot, first, rows;   // first: place of the piece in the order of rows

  __device__ __forceinline__ void begin(const hfl_delta& a, const DeltaRows& of, int tiles, int item_) {
    item = item_, chunk = 0, plane = -1;
    const int piece = item / tiles;
    first = of.starts[piece], rows = of.starts[piece + 1] - first;
    next_plane(a, of);
  }
  __device__ __forceinline__ void next_plane(const hfl_delta& a, const DeltaRows& of) {
    chunk = 0;
    const int64_t row = of.order[first];
    do {
      slot = ++plane < a.planes ? a.slots_of_rows[row * a.planes + plane] : -1;
    } while (slot < 0 && plane < a.planes);
  }
  __device__ __forceinline__ bool has_bits(const hfl_delta& a) const { return slot >= 0 && slot < a.slots; }
};

// To the next step; false behind the last one of `end` items. A piece without a slot has one step, without bits.
__device__ __forceinline__ bool advance(DeltaStep& s, const hfl_delta& a, const DeltaRows& of, int tiles, int chunks,
                                        int end) {
  if (s.plane < a.planes) {
    if (s.has_bits(a) && ++s.chunk < chunks) return true;
    s.next_plane(a, of);
    if (s.plane < a.planes) return true;
  }
  if (s.item + 1 < end) {
    s.begin(a, of, tiles, s.item + 1);
    return true;
  }
  s.item = end;
  return false;
}

// Begin the copies of a step: 128 bytes of bits of each output, whose chunks of 16 are permuted within eight outputs,
// and 1024 of digits of each column, whose halves of 32 are exchanged in every other column.
__device__ __forceinline__ void fetch(const DeltaStep& s, const hfl_delta& a, const DeltaRows& of, int tiles,
                                      uint32_t stage) {
  if (!s.has_bits(a)) return;
  const int thread = static_cast<int>(threadIdx.x), words = a.inputs / WORD, out = s.item % tiles * OUTPUTS;
#pragma unroll
  for (int i = 0; i < BITS_BYTES / 16 / DELTA_THREADS; ++i) {
    const int row = (thread + i * DELTA_THREADS) / 8, part = (thread + i * DELTA_THREADS) % 8;
    const int word = s.chunk * (CHUNK / WORD) + part * 4;
    const bool there = out + row < a.outputs && word < words;
    const int64_t at = (static_cast<int64_t>(s.slot) * a.outputs + out + row) * words + word;
    copy_async(stage + static_cast<uint32_t>(row * 128 + ((part ^ (row & 7)) << 4)), a.bits + (there ? at : 0), there);
  }
  for (int i = thread; i < s.rows * DIGITS * (CHUNK / 16); i += DELTA_THREADS) {
    const int column = i / (CHUNK / 16), part = i % (CHUNK / 16), digit = column % DIGITS;
    const int64_t row = of.order[s.first + column / DIGITS];
    const uint8_t* from = of.digits + (row * DIGITS + digit) * of.padded + s.chunk * CHUNK + part * 16;
    copy_async(stage + static_cast<uint32_t>(BITS_BYTES + column * CHUNK + ((part ^ (column & 1)) << 4)), from, true);
  }
}

// Sums of a warp: 32 outputs x TILES * 8 columns, of what bits at the four places of a half byte are worth.
using Sums = int[2][MOST_TILES][4][4];

template <int TILES>
__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][t][p][i] = 0;
}

// Sum of digits where the bit is set. At place p it is worth 16 << p.
__device__ __forceinline__ int gathered(const int (&sums)[4][4], int i) {
  return (sums[0][i] * 8 + sums[1][i] * 4 + sums[2][i] * 2 + sums[3][i]) >> 7;
}

// A block of 128 inputs. A lane's word holds 32 of one output; byte by byte a mask leaves one bit, which is 4 of them.
template <int TILES>
__device__ __forceinline__ void multiply(Sums& sums, uint4 (&digits)[MOST_TILES][2], uint32_t bits, uint32_t columns,
                                         int unit, int used) {
  const int lane = lane_of_thread(), row = lane / 4;
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const uint32_t at = columns + static_cast<uint32_t>((t * 8 + row) * CHUNK + (unit * 4 + lane % 4) * WORD);
    const uint32_t odd = static_cast<uint32_t>(row & 1) << 4;
    load_if(digits[t][0], at + odd, t * 8 + row < used);
    load_if(digits[t][1], at + (odd ^ 16), t * 8 + row < used);
  }
  const uint32_t part = static_cast<uint32_t>(((unit ^ row) << 4) + lane % 4 * 4);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t at = bits + static_cast<uint32_t>((m * 16 + row) * 128) + part;
    const uint32_t upper = load_word(at), lower = load_word(at + 8 * 128);
    const uint32_t upper_low = upper * 16, lower_low = lower * 16;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t mask = 0x10101010u << p, a[4] = {upper & mask, lower & mask, upper_low & mask, lower_low & mask};
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const uint4 both = digits[t][p / 2];  // inputs of the upper half bytes, and of the lower ones
        mma_bytes(sums[m][t][p], a, p % 2 ? both.z : both.x, p % 2 ? both.w : both.y);
      }
    }
  }
}

// With a scale for each group of inputs: what a block has added, times its scale.
template <int TILES>
__device__ __forceinline__ void scale_block(float (&scaled)[2][MOST_TILES][4], Sums& sums, const hfl_delta& a,
                                            const DeltaRows& of, const DeltaStep& s, int out, int block, int used) {
  const int lane = lane_of_thread(), blocks = a.inputs / BLOCK;
  if (block >= blocks) return;  // nothing was added
  float minus[MOST_TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = t * 8 + lane % 4 * 2 + i;
      const int64_t row = of.order[s.first + (column < used ? column / DIGITS : 0)];
      minus[t][i] = of.sums[(row * DIGITS + column % DIGITS) * (of.padded / BLOCK) + block];
    }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(out + m * 16 + half * 8 + lane / 4, a.outputs - 1), group = block / (blocks / a.groups);
      const float scale =
          a.scales[(static_cast<int64_t>(s.slot) * a.scale_rows + (a.scale_rows > 1 ? row : 0)) * a.groups + group];
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 2 + i;
          const float twice = static_cast<float>(2 * gathered(sums[m][t], at));
          scaled[m][t][at] = fmaf(scale, twice - minus[t][i], scaled[m][t][at]);
        }
    }
  clear<TILES>(sums);
}

}  // namespace hfl
