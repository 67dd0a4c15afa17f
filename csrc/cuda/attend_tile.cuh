// A slab: 16 keys of one KV head, or 32 where they are packed, and their values, in shared memory in one of four
// formats; how a warp copies it there and turns it into operands of mma.m16n8k16. lane = 4 g + c.
//
// Keys are the 16 rows of q.k, channels those of p.v; queries are the 8 columns of both.
// Which channel stands at which place of the inner axis of q.k does not matter as long as q and k agree, nor the order
// of the output's channels, nor which key of a slab is which row. Where keys are packed both matrices come out of
// shared memory as ldmatrix gives them, and scales of a lane's four keys lie side by side:
//   q.k:  lane (g, c) holds keys token(i, g); of every 16 bytes the c-th four. Else of every 64 those from 16 c on.
//   p.v:  lane (g, c) holds keys token(i, 2c) and token(i, 2c+1); of every 16 bytes the g-th two.
//
// Packed keys are multiplied as bytes, by mma.m16n8k32 of integers, with queries as numbers of 16 bits in two digits.
// Two payloads of 4 bits, 16 x + y, are such a byte as they lie, and 16 y is another: with queries a for x and b for y,
// 16 (a x + b y) = a (16 x + y) + (b - a / 16) (16 y). Values, of which many are summed up, become float16 and are
// centred, so that sums stay small: payload - CENTRE, and their zeros are less by CENTRE. Scale and zero come in
// afterwards, in float32 (the reference rounds (payload - zero) * scale to the call's dtype before the products; here
// that rounding is missing): k's on the products, v's scale on the weights.
#pragma once
#include "ptx.cuh"

namespace hfl {

enum class Format { bf16, f16, int8, int4 };

template <int D, Format F>
struct Slab {
  static constexpr int BITS = F == Format::int4 ? 4 : F == Format::int8 ? 8 : 16;
  static constexpr bool PACKED = BITS < 16;
  static constexpr int KEYS = PACKED ? 32 : 16, TILES = KEYS / 16;
  static constexpr int ROW = D * BITS / 8;   // bytes
  static constexpr int CHUNKS = ROW / 16;    // of 16 bytes
  static constexpr int BYTES = KEYS * ROW;   // of the keys, and again of the values
  static constexpr bool LINES = ROW % 128 == 0;
  static constexpr int CENTRE = BITS == 4 ? 8 : 128;

  static constexpr int STEPS = (CHUNKS + 1) / 2;  // inner steps of q.k where keys are packed
  static constexpr int EACH = 16 / BITS;          // channels in two bytes
  static constexpr bool POWER = (CHUNKS & (CHUNKS - 1)) == 0;
  static_assert(KEYS * CHUNKS % 32 == 0, "all lanes copy alike");

  // The key of a slab in row g of its eight rows i.
  __host__ __device__ static constexpr int token(int i, int g) { return PACKED ? 4 * g + i : 8 * i + g; }

  // The 16-byte chunks of a slab are permuted so that the lanes that read at a time meet different banks.
  __device__ static int packed_chunk(int row, int chunk) {
    return (row * CHUNKS + chunk) ^ (CHUNKS == 3 ? (row >> 3) & 3 : (row >> 2) & 7);
  }
  __device__ static int key_chunk(int row, int chunk) {
    const int at = row * CHUNKS + chunk;
    return PACKED ? packed_chunk(row, chunk) : LINES ? at ^ ((row & 1) << 2) : at;
  }
  __device__ static int value_chunk(int row, int chunk) {
    const int at = row * CHUNKS + chunk;
    return PACKED ? packed_chunk(row, chunk) : LINES ? at ^ (row & 7) : at ^ ((row >> 1) & 3);
  }
  // Where the chunk goes that a lane copies i-th to a slab at `slab`, a multiple of 128 or, of packed rows, 1024 bytes:
  // what does not depend on i but for bits that a constant turns over.
  template <bool OF_VALUES>
  __device__ static uint32_t copied_place(uint32_t slab, int i, int lane) {
    constexpr bool APART = PACKED || OF_VALUES;  // eight rows lie apart, else two
    constexpr int ROWS = PACKED ? 4 : 1, MASK = APART ? 7 : 1, FACTOR = APART ? 1 : 4;
    if constexpr (POWER && (PACKED || LINES)) {
      const int own = lane ^ (lane / (ROWS * CHUNKS) & MASK) * FACTOR, by = (i * 32 / (ROWS * CHUNKS) & MASK) * FACTOR;
      return ((slab + own * 16) ^ (by * 16)) + i * 512;
    } else {
      const int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
      return slab + (OF_VALUES ? value_chunk(row, chunk) : key_chunk(row, chunk)) * 16;
    }
  }
  // Likewise where a chunk of packed rows lies: of row own_row + row, number own_chunk + chunk, which have no bits in
  // common, nor have own_row * CHUNKS and the others.
  __device__ static uint32_t read_place(uint32_t slab, int own_row, int own_chunk, int row, int chunk) {
    if constexpr (POWER) {
      return (slab + packed_chunk(own_row, own_chunk) * 16) ^ ((row * CHUNKS + chunk) * 16);
    } else {
      return slab + packed_chunk(own_row + row, own_chunk + chunk) * 16;
    }
  }

  // Channels of queries that lane c multiplies with its word i of packed rows begin here: four of 8 bits, eight of 4;
  // or eight with inner steps 2i and 2i + 1.
  __device__ static int channel(int i, int c) { return F == Format::int8 ? i * 16 + c * 4 : i * 32 + c * 8; }
  // The channel in row `row` (0 .. 7) of eight rows i (0 .. D/8 - 1) of the output.
  __device__ static int out_channel(int i, int row) {
    return PACKED ? (i / EACH * 8 + row) * EACH + i % EACH : i * 8 + row;
  }

  // One lane's part of copying a slab's keys, its values or both; `column` of the first KEYS lanes is where each key
  // lies, -1: zeros.
  template <bool OF_KEYS, bool OF_VALUES>
  __device__ static void copy(unsigned char* keys, const unsigned char* k, uint32_t k_stride, unsigned char* values,
                              const unsigned char* v, uint32_t v_stride, int column, int lane) {
#pragma unroll 4
    for (int i = 0; i < KEYS * CHUNKS / 32; ++i) {
      const int at = i * 32 + lane, row = at / CHUNKS, chunk = at % CHUNKS;
      const int from = __shfl_sync(0xffffffffu, column, row);
      const uint64_t safe = static_cast<uint64_t>(from < 0 ? 0 : from);
      if (OF_KEYS) copy_async(keys + key_chunk(row, chunk) * 16, k + safe * k_stride + chunk * 16, from >= 0);
      if (OF_VALUES) copy_async(values + value_chunk(row, chunk) * 16, v + safe * v_stride + chunk * 16, from >= 0);
    }
  }

  // Where rows follow on each other: the first `there` of them; ALL: all are there. `from` is the lane's first chunk.
  template <bool ALL, bool OF_VALUES>
  __device__ static void copy_rows(uint32_t to, const unsigned char* from, int there, int lane) {
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / 32; ++i) {
      copy_async(copied_place<OF_VALUES>(to, i, lane), from + i * 512, ALL || (i * 32 + lane) / CHUNKS < there);
    }
  }

  // Operand of 16 packed keys in inner step j.
  __device__ static void packed_keys(uint32_t (&w)[4], uint32_t slab, int tile, int j, int lane) {
    // the last chunk twice where they are odd, with zeros in place of queries
    const int second = 2 * j + 1 < CHUNKS ? lane >> 4 : 0;
    load_matrices(w, read_place(slab, token(lane >> 3 & 1, lane & 7), second, 2 * tile, 2 * j));
  }

  // Words of unit j of key `row`, not packed.
  __device__ static uint4 key_words(const unsigned char* keys, int row, int j, int c) {
    return *reinterpret_cast<const uint4*>(keys + key_chunk(row, j * 4 + c) * 16);
  }

  __device__ static void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (F == Format::bf16) {
      mma_bf16(c, a, b0, b1);
    } else {
      mma_f16(c, a, b0, b1);
    }
  }

  // out[D, 8] += values[16 keys, D], transposed, p[16, 8]
  __device__ static void add_values(float (&out)[D / 16][4], uint32_t p0, uint32_t p1, const unsigned char* values,
                                    int lane) {
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t v[4];
      load_transposed(v, values + value_chunk(lane & 15, 2 * j + (lane >> 4)) * 16);
      multiply(out[j], make_uint4(v[0], v[2], v[1], v[3]), p0, p1);
    }
  }

  // The same of 32 packed values.
  __device__ static void add_packed(float (&out)[D / 16][4], const uint32_t (&p)[4], uint32_t values, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      uint32_t w[4];
      load_transposed(w, read_place(values, token(lane >> 3, lane & 7), 0, 0, chunk));
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int e = 0; e < EACH; e += 2) {
          const uint32_t x = w[2 * tile], y = w[2 * tile + 1];
          const uint4 v = make_uint4(value_operand(x, e), value_operand(x, e + 1), value_operand(y, e),
                                     value_operand(y, e + 1));
          mma_f16(out[(chunk * EACH + e) / 2], v, p[2 * tile], p[2 * tile + 1]);
        }
      }
    }
  }

 private:
  // Channel e of two keys that have half a word each.
  __device__ static uint32_t value_operand(uint32_t x, int e) {
    if constexpr (F == Format::int4) {
      const uint32_t low = e < 2 ? x : x >> 8;
      // 0x6400 | u is 1024 + u
      if (e % 2 == 0) return subtract_f16(masked<0x000f000fu, 0x64006400u>(low), 0x64086408u);
      return multiply_add_f16(masked<0x00f000f0u, 0x64006400u>(low), 0x2c002c00u, 0xd480d480u);  // 1/16, -72
    } else {
      return subtract_f16(__byte_perm(x, 0x64646464u, e % 2 ? 0x4341 : 0x4240), 0x64806480u);
    }
  }
};

}  // namespace hfl
