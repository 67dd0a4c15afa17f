// Decode attention: queries, from global memory to operands in shared memory.
#pragma once
#include "attend.cuh"

namespace hfl {

// Operands of a unit's queries in one variant: 16 bytes for each lane and pair of inner steps, the eight channels of
// query g that the lane multiplies in those.
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
        copy_async(shared + R::QUERIES + v * R::QUERY + i * 16, from + at + S::channel(i / 32 * 2, i % 4),
                   row < unit.rows());
      }
    }
    copy_commit();
  }

  // Once they are there, where keys are packed: in float16, times a power of two for each query that brings its largest
  // number to 2^14, so that every number of either dtype that matters is exact. `factors`: what makes products with
  // payloads * 2^-24 those that they stand for, and what is to take off them for each unit of zero. By a warp.
  __device__ static void scale(const AttendTask& p, unsigned char* shared, int variant, int lane) {
    uint4* words = reinterpret_cast<uint4*>(shared + R::QUERIES + variant * R::QUERY) + lane;
    float most = 0.0f, sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < D / 32; ++i) {
      float x[8];
      unpack(x, words[i * 32], p.a.dtype);
#pragma unroll
      for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(x[j]));
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const int exponent = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -110), 117);
    const float down = __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
#pragma unroll 4
    for (int i = 0; i < D / 32; ++i) {
      float x[8];
      unpack(x, words[i * 32], p.a.dtype);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = __half2float(__float2half_rn(x[j] * down));
        sum += x[j];
      }
      if constexpr (F == Format::int4) {  // every second pair of payloads is 16 times what it says
        constexpr float less = 1.0f / 16.0f;
        words[i * 32] = make_uint4(pack_f16(x[0], x[4]), pack_f16(x[1] * less, x[5] * less), pack_f16(x[2], x[6]),
                                   pack_f16(x[3] * less, x[7] * less));
      } else {
        words[i * 32] =
            make_uint4(pack_f16(x[0], x[1]), pack_f16(x[2], x[3]), pack_f16(x[4], x[5]), pack_f16(x[6], x[7]));
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) {
      const uint32_t up = static_cast<uint32_t>(127 + 24 - 14 + exponent) << 23;
      reinterpret_cast<float2*>(shared + R::FACTORS)[variant * ROWS + lane / 4] =
          make_float2(__uint_as_float(up), sum * 0x1p-24f);
    }
  }

 private:
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
