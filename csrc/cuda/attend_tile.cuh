// A slab: 16 keys of one KV head, and their values, in shared memory in one of four formats; how a warp copies it there
// and turns it into operands of mma.m16n8k16. lane = 4 g + c; "tile" is one of the two halves of 8 keys.
//
// Which channel stands at which place of the inner axis of q.k does not matter as long as q and k agree, nor the order
// of the output's channels: so each lane reads whole words of packed rows, and no bytes change lanes.
//   q.k:  lane (g, c) holds key 8 tile + g; of every 4 UNIT_K channels those from c * UNIT_K on.
//   p.v:  lane (g, c) holds keys 2c, 2c+1, 2c+8, 2c+9; of every 8 UNIT_V channels those from g * UNIT_V on.
//
// Packed keys are operands as they are: a payload u, alone in 16 bits, is the subnormal float16 u * 2^-24, which mma
// takes exactly; queries undo the power of two. Values, of which many are summed up, are centred, so that sums stay
// small: payload - CENTRE, and their zeros are less by CENTRE. Scale and zero come in afterwards, in float32 (the reference rounds (payload - zero) * scale to the call's
// dtype before the products; here that rounding is missing): k's on the products, v's scale on the weights.
#pragma once
#include "ptx.cuh"

namespace hfl {

enum class Format { bf16, f16, int8, int4 };

template <int D, Format F>
struct Slab {
  static constexpr int BITS = F == Format::int4 ? 4 : F == Format::int8 ? 8 : 16;
  static constexpr bool PACKED = BITS < 16;
  static constexpr int ROW = D * BITS / 8;   // bytes
  static constexpr int CHUNKS = ROW / 16;    // of 16 bytes
  static constexpr int BYTES = 16 * ROW;     // of the keys, and again of the values
  static constexpr bool LINES = ROW % 128 == 0;
  static constexpr int CENTRE = BITS == 4 ? 8 : 128;

  static constexpr int UNIT_K = F == Format::int4 ? (D % 128 == 0 ? 32 : D == 64 ? 16 : 8)
                                : F == Format::int8 && D != 96 ? 16 : 8;
  static constexpr int WORDS_K = UNIT_K * BITS / 32;
  static constexpr int UNIT_V = D == 64 ? 8 : D == 96 ? 4 : F == Format::int4 && D == 256 ? 32 : 16;
  static constexpr int WORDS_V = (UNIT_V * BITS + 31) / 32;
  static_assert(D % (4 * UNIT_K) == 0 && D % (8 * UNIT_V) == 0 && WORDS_K <= 4, "units tile a row");

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
  // The channel in column `column` (0 .. 7) of output tile i (0 .. D/8 - 1).
  __device__ static int out_channel(int i, int column) {
    return PACKED ? (i / UNIT_V * 8 + column) * UNIT_V + i % UNIT_V : i * 8 + column;
  }

  // One lane's part of copying a slab; `column` of lanes 0 .. 15 is where each key lies, -1: zeros.
  template <bool KEYS>
  __device__ static void copy(unsigned char* to, const unsigned char* rows, uint32_t stride, int column, int lane) {
#pragma unroll 4
    for (int i = 0; i < (16 * CHUNKS + 31) / 32; ++i) {
      const int at = i * 32 + lane, row = at / CHUNKS, chunk = at % CHUNKS;
      const int from = __shfl_sync(0xffffffffu, column, row & 15);
      if (16 * CHUNKS % 32 && at >= 16 * CHUNKS) continue;
      const int place = KEYS ? key_chunk(row, chunk) : value_chunk(row, chunk);
      copy_async(to + place * 16, rows + static_cast<uint64_t>(from < 0 ? 0 : from) * stride + chunk * 16, from >= 0);
    }
  }

  // Words of unit j of key `row`.
  __device__ static void key_words(uint32_t (&w)[WORDS_K], const unsigned char* keys, int row, int j, int c) {
    constexpr int size = UNIT_K * BITS / 8;
    const int byte = (j * 4 + c) * size;
    read<size>(w, keys + key_chunk(row, byte / 16) * 16 + byte % 16);
  }

  // The operand of inner step e of a unit.
  __device__ static void key_operand(uint32_t& b0, uint32_t& b1, const uint32_t (&w)[WORDS_K], int e) {
    if constexpr (F == Format::int4) {
      const uint32_t x = w[e / 2] >> (e % 2 * 8);
      b0 = x & 0x000f000fu, b1 = x & 0x00f000f0u;  // the second pair is 16 times what it says
    } else if constexpr (F == Format::int8) {
      b0 = __byte_perm(w[e], 0, 0x4140), b1 = __byte_perm(w[e], 0, 0x4342);
    } else {
      b0 = w[2 * e], b1 = w[2 * e + 1];
    }
  }

  __device__ static void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (F == Format::bf16) {
      mma_bf16(c, a, b0, b1);
    } else {
      mma_f16(c, a, b0, b1);
    }
  }

  // out[16, D] += p[16, 16 keys] values
  __device__ static void add_values(float (&out)[D / 8][4], const uint4& p, const unsigned char* values, int lane) {
    if constexpr (!PACKED) {
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        load_transposed(b, values + value_chunk(lane & 15, 2 * j + (lane >> 4)) * 16);
        multiply(out[2 * j], p, b[0], b[1]);
        multiply(out[2 * j + 1], p, b[2], b[3]);
      }
    } else {
      constexpr int size = UNIT_V * BITS / 8, each = 32 / BITS;  // bytes of a unit; channels of a word
      const int g = lane >> 2, key = (lane & 3) * 2;
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
        for (int e = 0; e < UNIT_V; ++e) {
          const uint32_t b0 = value_operand(w[0][e / each], w[1][e / each], e % each);
          const uint32_t b1 = value_operand(w[2][e / each], w[3][e / each], e % each);
          mma_f16(out[unit * UNIT_V + e], p, b0, b1);
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
      if (e % 2 == 0) return subtract_f16((both & 0x000f000fu) | 0x64006400u, 0x64086408u);  // 0x6400 | u is 1024 + u
      return multiply_add_f16((both & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);  // 1/16, -72
    } else {
      const uint32_t both = __byte_perm(x, y, e < 2 ? 0x5140 : 0x7362);
      return subtract_f16(__byte_perm(both, 0x64646464u, e % 2 ? 0x4342 : 0x4140), 0x64806480u);
    }
  }
};

}  // namespace hfl
