// Decode attention: queries, from global memory to operands in shared memory.
#pragma once
#include "attend.cuh"

namespace hfl {

// Operands of a unit's queries in one variant: D / 32 parts of 16 bytes for each lane, of eight channels of query g;
// where keys are of 4 bits, an even number of parts.
template <int D, Format F>
struct Queries {
  using S = Slab<D, F>;
  using R = Room<D, F>;

  // Begin to copy them all, as one group; queries beyond the last are zeros. By all threads.
  __device__ static void copy(const AttendTask& p, const Unit& unit, unsigned char* shared) {
    for (int v = 0; v < p.variants; ++v) {
      const uint16_t* from =
          static_cast<const uint16_t*>(v == 0 ? p.a.q : v == 1 ? p.a.q_before : p.a.q_sinks) + unit.batch * p.a.q_b;
      for (int i = static_cast<int>(threadIdx.x); i < D; i += R::WARPS * 32) {
        const int row = i / 4 % ROWS, safe = row < unit.rows() ? row : 0;
        const int64_t at = unit.head(p, safe) * p.a.q_h + unit.query(p, safe) * p.a.q_t;
        unsigned char* to = shared + R::QUERIES + v * R::QUERY + i * 16;
        if constexpr (F == Format::int8) {
          copy_async_8(to, from + at + S::channel(i / 32 * 2, i % 4), row < unit.rows());
          copy_async_8(to + 8, from + at + S::channel(i / 32 * 2 + 1, i % 4), row < unit.rows());
        } else {
          copy_async(to, from + at + S::channel(i / 32, i % 4), row < unit.rows());
        }
      }
    }
    copy_commit();
  }

  // Once they are there, where keys are packed: as whole numbers of up to LARGEST, so that the largest is off by less
  // than 2^-15 of itself, each as two digits to base 256. `factors`: what makes products those that they stand for, and
  // what is to take off them before for each unit of zero. By a warp.
  __device__ static void scale(const AttendTask& p, unsigned char* shared, int variant, int lane) {
    constexpr float MOST = F == Format::int4 ? LARGEST * 16.0f / 17.0f : LARGEST;  // with room for b - a / 16
    uint4* words = reinterpret_cast<uint4*>(shared + R::QUERIES + variant * R::QUERY) + lane;
    float most = 0x1p-100f, wrong = 0.0f;  // smaller numbers count as zeros; NaN if one is not finite
    int sum = 0;
#pragma unroll 4
    for (int i = 0; i < D / 32; ++i) {
      float x[8];
      unpack(x, words[i * 32], p.a.dtype);
#pragma unroll
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(x[j])), wrong += x[j] * 0.0f;
    }
    most = over_channels(most, [](float x, float y) { return fmaxf(x, y); });
    wrong = over_channels(wrong, [](float x, float y) { return x + y; });
    const float up = MOST / most;
#pragma unroll 1
    for (int i = 0; i < D / 32; i += PARTS) {
      float x[PARTS][8];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const bool there = i + part < D / 32;
        unpack(x[part], there ? words[(i + part) * 32] : make_uint4(0, 0, 0, 0), p.a.dtype);
      }
      int digits[2][2][4];  // of the first and the second operand, for each the two words
#pragma unroll
      for (int word = 0; word < 2; ++word) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (F == Format::int4) {
            const int first = __float2int_rn(x[word][2 * j + 1] * up);
            const int second = __float2int_rn(x[word][2 * j] * up - static_cast<float>(first) * 0.0625f);
            sum += 17 * first + 16 * second;
            digits[0][word][j] = first, digits[1][word][j] = second;
          } else {
            digits[0][word][j] = __float2int_rn(x[0][4 * word + j] * up);
            sum += digits[0][word][j];
          }
        }
      }
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        words[(i + part) * 32] = make_uint4(higher(digits[part][0]), higher(digits[part][1]), lower(digits[part][0]),
                                            lower(digits[part][1]));
      }
    }
    sum = over_channels(sum, [](int x, int y) { return x + y; });
    if (lane % 4 == 0) {
      reinterpret_cast<float2*>(shared + R::FACTORS)[variant * ROWS + lane / 4] =
          make_float2(most / (F == Format::int4 ? 16.0f * MOST : MOST) + wrong, static_cast<float>(sum));
    }
  }

 private:
  static constexpr float LARGEST = 127 * 256;
  static constexpr int PARTS = F == Format::int4 ? 2 : 1;  // that make up an inner step

  template <typename T, typename Join>
  __device__ static T over_channels(T x, Join join) {
    x = join(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return join(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  // The higher digits of four numbers, and the lower ones, all from -128 to 127.
  __device__ static uint32_t higher(const int (&x)[4]) {
    return lower({(x[0] + 128) >> 8, (x[1] + 128) >> 8, (x[2] + 128) >> 8, (x[3] + 128) >> 8});
  }
  __device__ static uint32_t lower(const int (&x)[4]) {
    return (x[0] & 0xff) | (x[1] & 0xff) << 8 | (x[2] & 0xff) << 16 | static_cast<uint32_t>(x[3] & 0xff) << 24;
  }
  __device__ static void unpack(float (&x)[8], const uint4& words, int dtype) {
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = dtype == HFL_BF16 ? unpack_bf16(all[i]) : unpack_f16(all[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
};

}  // namespace hfl
