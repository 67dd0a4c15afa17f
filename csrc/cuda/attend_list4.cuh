// As ListWarp, over keys and values of 4 bits: a slab's words are in registers, keys and values alike.
//
// Of keys lane (g, c) has of rows g and g + 8 the piece c of 16 bytes, 32 channels. Of values it has of rows 2c,
// 2c + 1, 2c + 8 and 2c + 9 bytes 8 g to 8 g + 7, and each byte is two rows of p.v. Payloads become bfloat16, which
// holds them exactly; scale and zero of keys come in on the products, those of values on the weights.
#pragma once
#include "attend_list.cuh"

namespace hfl {

struct ListWarp4 {
  using T = __nv_bfloat16;
  static constexpr float LIFT = 0.0f;
  static constexpr int AHEAD = 0;
  const unsigned char *k, *v;  // rows of the head
  const __half *k_sides, *v_sides;
  int64_t k_zeros, v_zeros;    // from scales to zeros, in elements
  unsigned char* values;       // room for results
  int lane;
  int limit = -1;  // keys before this one are stored, and seen
  uint4 low, high;    // keys: of rows g and g + 8
  uint2 rows[4];      // values
  __half k_side[4], v_side[4];  // scales of rows g and g + 8, then zeros
  float out[8][4];    // channels 16 g + 2 i and one more, of queries 2c and 2c + 1
  float top[2], total[2], shift[2], sums[2];

  __device__ ListWarp4(const ListTask& p, int b, int head, unsigned char* values_, int lane_)
      : values(values_), lane(lane_) {
    const hfl_rows &x = p.a.k, &y = p.a.v;
    k = static_cast<const unsigned char*>(x.data) + b * x.b + head * x.h;
    v = static_cast<const unsigned char*>(y.data) + b * y.b + head * y.h;
    k_sides = static_cast<const __half*>(x.scale) + b * x.scale_b + head * x.scale_h;
    v_sides = static_cast<const __half*>(y.scale) + b * y.scale_b + head * y.scale_h;
    k_zeros = static_cast<const __half*>(x.zero) - static_cast<const __half*>(x.scale);
    v_zeros = static_cast<const __half*>(y.zero) - static_cast<const __half*>(y.scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    top[0] = top[1] = NOTHING, total[0] = total[1] = shift[0] = shift[1] = 0.0f;
  }

  __device__ void load_ahead(int, int) {}
  __device__ static void store(const ListTask& p, int b, int head, int problem, void* room) {
    append_token<CHOOSERS>(p.append, p.heads.of(head), b, head, p.appended ? p.appended + problem : nullptr, 1,
                           static_cast<float*>(room));
  }

  __device__ bool whole(int at) const { return at >= 0 && at + LIST_SLAB <= limit; }

  // A query's 8 channels as operands: those of a word of keys, in the order in which its halves come out.
  __device__ static uint4 operands(const uint4& x) {
    return make_uint4(__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
                      __byte_perm(x.y, x.w, 0x7632));
  }
  __device__ static int channel(int word, int c) { return c * 32 + word * 8; }

  // Sums of the two queries, once they are there.
  __device__ void prepare(const uint4 (&queries)[4][32]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 q = queries[j][lane];
      const float2 a = unpack_bf16(q.x), b = unpack_bf16(q.y), c = unpack_bf16(q.z), d = unpack_bf16(q.w);
      sum += (a.x + a.y) + (b.x + b.y) + ((c.x + c.y) + (d.x + d.y));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int from = (lane & 3) * 8;
    sums[0] = __shfl_sync(0xffffffffu, sum, from), sums[1] = __shfl_sync(0xffffffffu, sum, from + 4);
  }

  __device__ __forceinline__ void load(int at) {
    const int g = lane >> 2, c = lane & 3;
    const unsigned char* from = k + static_cast<int64_t>(at + g) * 64 + c * 16;
    low = __ldcg(reinterpret_cast<const uint4*>(from)), high = __ldcg(reinterpret_cast<const uint4*>(from + 8 * 64));
    const unsigned char* row = v + static_cast<int64_t>(at + 2 * c) * 64 + g * 8;
#pragma unroll
    for (int r = 0; r < 4; ++r) rows[r] = __ldcg(reinterpret_cast<const uint2*>(row + (r / 2 * 8 + r % 2) * 64));
    load_sides(k_side, k_sides + at + g, k_zeros, 8), load_sides(v_side, v_sides + at + g, v_zeros, 8);
  }
  // The slab of the query's token, once it is stored. What nobody sees is any, but for scales and zeros of values.
  __device__ void load_last(const ListTask& p, int at) {
    const int g = lane >> 2, c = lane & 3, last = p.a.stored - 1;
    if (lane == 0 && limit >= at && limit < at + LIST_SLAB && limit <= last) {
      wait_until(p.appended + static_cast<int>(blockIdx.y) - p.before, 1);
    }
    __syncwarp();
    const auto key = [&](int row) { return static_cast<int64_t>(min(at + row, last)); };
    low = __ldcg(reinterpret_cast<const uint4*>(k + key(g) * 64 + c * 16));
    high = __ldcg(reinterpret_cast<const uint4*>(k + key(g + 8) * 64 + c * 16));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      rows[r] = __ldcg(reinterpret_cast<const uint2*>(v + key(2 * c + r / 2 * 8 + r % 2) * 64 + g * 8));
    }
    const int apart = static_cast<int>(key(g + 8) - key(g));
    load_sides(k_side, k_sides + key(g), k_zeros, apart), load_sides(v_side, v_sides + key(g), v_zeros, apart);
    const __half none = __ushort_as_half(0);
    if (at + g > min(limit, last)) v_side[0] = v_side[2] = none;
    if (at + g + 8 > min(limit, last)) v_side[1] = v_side[3] = none;
  }

  __device__ __forceinline__ void attend(const ListTask& p, const uint4 (&queries)[4][32], int at, int next,
                                         bool) {
    float products[2][4] = {};
    const uint32_t x0[4] = {low.x, low.y, low.z, low.w}, x1[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 q = queries[j][lane];
      mma_bf16(products[0], make_uint4(halves(x0[j]), halves(x1[j]), halves(x0[j] >> 4), halves(x1[j] >> 4)), q.x, q.y);
      const uint32_t x = x0[j] >> 8, y = x1[j] >> 8;
      mma_bf16(products[1], make_uint4(halves(x), halves(y), halves(x >> 4), halves(y >> 4)), q.z, q.w);
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = __half2float(k_side[i / 2]), zero = __half2float(k_side[2 + i / 2]);
      x[i] = (products[0][i] + products[1][i] - zero * sums[i & 1]) * (scale * (p.a.scale * LOG2E));
    }
    if (!whole(at)) {
      const int last = min(limit, p.a.stored - 1) - at - (lane >> 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = i / 2 * 8 <= last ? x[i] : NOTHING;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float most = fmaxf(x[j], x[2 + j]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
      const float higher = fmaxf(top[j], most), base = higher == NOTHING ? 0.0f : higher;
      const float down = power_of_two(top[j] - base);
      x[j] = power_of_two(x[j] - base), x[2 + j] = power_of_two(x[2 + j] - base);
      top[j] = higher, total[j] = total[j] * down + x[j] + x[2 + j], shift[j] *= down;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i][j] *= down, out[i][2 + j] *= down;
    }
    const float2 scales = make_float2(__half2float(v_side[0]), __half2float(v_side[1]));
    const uint32_t near = pack_bf16(x[0] * scales.x, x[1] * scales.x);
    const uint32_t far = pack_bf16(x[2] * scales.y, x[3] * scales.y);
    const float2 a = unpack_bf16(near), b = unpack_bf16(far);
    const float zero = __half2float(v_side[2]), zero8 = __half2float(v_side[3]);
    shift[0] += a.x * zero + b.x * zero8, shift[1] += a.y * zero + b.y * zero8;
    const uint32_t first = transpose(near), second = transpose(far);
    add_word<0>(rows[0].x, rows[1].x, rows[2].x, rows[3].x, first, second);
    add_word<4>(rows[0].y, rows[1].y, rows[2].y, rows[3].y, first, second);
    if (next >= 0) load(next);
  }

  __device__ void leave(float2* states, int count, unsigned char*) {
    const int g = lane >> 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        total[j] += __shfl_xor_sync(0xffffffffu, total[j], step);
        shift[j] += __shfl_xor_sync(0xffffffffu, shift[j], step);
      }
      const int row = 2 * (lane & 3) + j;
      if (row >= count) continue;
      if (g == 0) states[row] = make_float2(top[j], total[j]);
      float* to = reinterpret_cast<float*>(values) + row * LIST_OUT + g * 16;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        *reinterpret_cast<float4*>(to + i * 2) = make_float4(out[i][j] - shift[j], out[i][2 + j] - shift[j],
                                                             out[i + 1][j] - shift[j], out[i + 1][2 + j] - shift[j]);
      }
    }
  }

 private:
  __device__ __forceinline__ static void load_sides(__half (&to)[4], const __half* from, int64_t zeros, int apart) {
    to[0] = __ldcg(from), to[1] = __ldcg(from + apart);
    to[2] = __ldcg(from + zeros), to[3] = __ldcg(from + zeros + apart);
  }
  // The lowest 4 bits of both halves of a word, as numbers: 0x4300 | u is 128 + u.
  __device__ __forceinline__ static uint32_t halves(uint32_t x) {
    return subtract_bf16(masked<0x000f000fu, 0x43004300u>(x), 0x43004300u);
  }
  template <int FIRST>
  __device__ __forceinline__ void add_word(uint32_t w, uint32_t x, uint32_t y, uint32_t z, uint32_t first,
                                           uint32_t second) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // bytes of two keys, then of the two others
      const uint32_t select = static_cast<uint32_t>(i * 0x0011 + (4 + i) * 0x1100);
      const uint32_t a = __byte_perm(w, x, select), b = __byte_perm(y, z, select);
      mma_bf16(out[FIRST + i], make_uint4(halves(a), halves(a >> 4), halves(b), halves(b >> 4)), first, second);
    }
  }
};

}  // namespace hfl
