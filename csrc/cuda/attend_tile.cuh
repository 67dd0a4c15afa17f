// A slab: 16 keys of one KV head, or 32 where they are packed, and their values, in shared memory in one of four
// formats; how a warp copies it there and turns it into operands of mma.m16n8k16. lane = 4 g + c.
//
// Keys are the 16 rows of q.k, channels those of p.v; queries are the 8 columns of both.
// Which channel stands at which place of the inner axis of q.k does not matter as long as q and k agree, nor the order
// of the output's channels: so each lane reads whole words of packed rows, and no bytes change lanes.
//   q.k:  lane (g, c) holds keys g and g+8; of every 4 UNIT_K channels those from c * UNIT_K on.
//   p.v:  lane (g, c) holds keys 2c, 2c+1, 2c+8, 2c+9; of every 8 UNIT_V channels those from g * UNIT_V on.
//
// Packed keys are operands as they are: a payload u, alone in 16 bits, is the subnormal float16 u * 2^-24, which mma
// takes exactly; queries undo the power of two. Values, of which many are summed up, are centred, so that sums stay
// small: payload - CENTRE, and their zeros are less by CENTRE. Scale and zero come in afterwards, in float32 (the
// reference rounds (payload - zero) * scale to the call's dtype before the products; here that rounding is missing):
// k's on the products, v's scale on the weights.
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

  static constexpr int UNIT_K = F == Format::int4 ? (D % 128 == 0 ? 32 : D == 64 ? 16 : 8)
                                : F == Format::int8 && D != 96 ? 16 : 8;
  static constexpr int WORDS_K = UNIT_K * BITS / 32;
  static constexpr int UNIT_V = D == 64 ? 8 : D == 96 ? 4 : F == Format::int4 && D == 256 ? 32 : 16;
  static constexpr int WORDS_V = (UNIT_V * BITS + 31) / 32;
  static_assert(D % (4 * UNIT_K) == 0 && D % (8 * UNIT_V) == 0 && WORDS_K <= 4, "units tile a row");
  static_assert(KEYS * CHUNKS % 32 == 0, "all lanes copy alike");

  // The 16-byte chunks of a slab are permuted so that the lanes that read at a time meet different banks.
  __device__ static int key_chunk(int row, int chunk) {
    const int at = row * CHUNKS + chunk;
    return LINES ? at ^ ((row & 1) << 2) : at;
  }
  __device__ static int value_chunk(int row, int chunk) {
    const int at = row * CHUNKS + chunk;
    if (PACKED) return D == 96 ? at : at ^ (row & 6);
    return LINES ? at ^ (row & 7) : at ^ ((row >> 1) & 3);
  }

  // The four channels that lane c holds for inner step s (0 .. D/16 - 1) begin here; int4 takes every second of eight.
  __device__ static int channel(int s, int c) {
    constexpr int steps = UNIT_K / 4;
    const int unit = (s / steps * 4 + c) * UNIT_K;
    return F == Format::int4 ? unit + (s % steps) / 2 * 8 : unit + s % steps * 4;
  }
  // The channel in row `row` (0 .. 7) of eight rows i (0 .. D/8 - 1) of the output.
  __device__ static int out_channel(int i, int row) {
    return PACKED ? (i / UNIT_V * 8 + row) * UNIT_V + i % UNIT_V : i * 8 + row;
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

  // Words of unit j of key `row`.
  __device__ static void key_words(uint32_t (&w)[WORDS_K], const unsigned char* keys, int row, int j, int c) {
    constexpr int size = UNIT_K * BITS / 8;
    const int byte = (j * 4 + c) * size;
    read<size>(w, keys + key_chunk(row, byte / 16) * 16 + byte % 16);
  }

  // The operand of inner step e of a unit, of 8 keys.
  __device__ static void key_operand(uint32_t& low, uint32_t& high, const uint32_t (&w)[WORDS_K], int e) {
    if constexpr (F == Format::int4) {
      const uint32_t x = w[e / 2] >> (e % 2 * 8);
      low = x & 0x000f000fu, high = x & 0x00f000f0u;  // the second pair is 16 times what it says
    } else if constexpr (F == Format::int8) {
      low = __byte_perm(w[e], 0, 0x4140), high = __byte_perm(w[e], 0, 0x4342);
    } else {
      low = w[2 * e], high = w[2 * e + 1];
    }
  }

  __device__ static void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (F == Format::bf16) {
      mma_bf16(c, a, b0, b1);
    } else {
      mma_f16(c, a, b0, b1);
    }
  }

  // out[D, 8] += values[16 keys from `first` on, D], transposed, p[16, 8]
  __device__ static void add_values(float (&out)[D / 16][4], uint32_t p0, uint32_t p1, const unsigned char* values,
                                    int first, int lane) {
    if constexpr (!PACKED) {
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t v[4];
        load_transposed(v, values + value_chunk(first + (lane & 15), 2 * j + (lane >> 4)) * 16);
        multiply(out[j], make_uint4(v[0], v[2], v[1], v[3]), p0, p1);
      }
    } else {
      constexpr int size = UNIT_V * BITS / 8, each = 32 / BITS;  // bytes of a unit; channels of a word
      const int g = lane >> 2, key = first + (lane & 3) * 2;
#pragma unroll
      for (int unit = 0; unit < D / 8 / UNIT_V; ++unit) {
        const int byte = (unit * 8 + g) * size;
        uint32_t w[4][WORDS_V];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = key + (r & 1) + (r >> 1) * 8;
          read<size>(w[r], values + value_chunk(row, byte / 16) * 16 + byte % 16);
        }
#pragma unroll
        for (int e = 0; e < UNIT_V; e += 2) {
          uint32_t v[2][2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = (e + i % 2) / each, from = i / 2 * 2;
            v[i / 2][i % 2] = value_operand(w[from][at], w[from + 1][at], (e + i % 2) % each);
          }
          mma_f16(out[(unit * UNIT_V + e) / 2], make_uint4(v[0][0], v[0][1], v[1][0], v[1][1]), p0, p1);
        }
      }
    }
  }

 private:
  template <int SIZE, int N>
  __device__ static void read(uint32_t (&w)[N], const unsigned char* at) {
    if constexpr (SIZE == 16) {
      const uint4 x = *reinterpret_cast<const uint4*>(at);
      w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    } else if constexpr (SIZE == 8) {
      const uint2 x = *reinterpret_cast<const uint2*>(at);
      w[0] = x.x, w[1] = x.y;
    } else if constexpr (SIZE == 4) {
      w[0] = *reinterpret_cast<const uint32_t*>(at);
    } else {
      static_assert(SIZE == 2 && N == 1, "a word or less");
      w[0] = *reinterpret_cast<const uint16_t*>(at);
    }
  }

  // Channel e of a word of one key and of the next.
  __device__ static uint32_t value_operand(uint32_t x, uint32_t y, int e) {
    if constexpr (F == Format::int4) {
      const uint32_t both = __byte_perm(x, y, e < 4 ? 0x5410 : 0x7632) >> (e % 4 / 2 * 8);
      // 0x6400 | u is 1024 + u
      if (e % 2 == 0) return subtract_f16(masked<0x000f000fu, 0x64006400u>(both), 0x64086408u);
      return multiply_add_f16(masked<0x00f000f0u, 0x64006400u>(both), 0x2c002c00u, 0xd480d480u);  // 1/16, -72
    } else {
      const uint32_t both = __byte_perm(x, y, e < 2 ? 0x5140 : 0x7362);
      return subtract_f16(__byte_perm(both, 0x64646464u, e % 2 ? 0x4342 : 0x4140), 0x64806480u);
    }
  }
};

}  // namespace hfl
