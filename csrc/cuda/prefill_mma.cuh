// Prefill attention for every GPU: mma.m16n8k16, cp.async. prefill.cu says what it computes.
#pragma once
#include "prefill.cuh"

namespace hfl {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool FEWER_KEYS = true;  // the compiler needs more registers there; the host allows for the larger tile
#else
constexpr bool FEWER_KEYS = false;
#endif

// Shared memory: a tile of queries, later of results; one of keys and one of values. Rows of D numbers, whose chunks of
// 16 bytes change places within groups of 8 (of 4 for D = 96), so that a column of eight rows touches every bank.
template <int D, int FEWER = 1>
struct PrefillRoom {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, OWN = D == 256 ? 16 : 32;  // OWN: rows of a warp
  static constexpr int ROWS = WARPS * OWN, KEYS = D == 128 && FEWER_KEYS ? 32 : 64 / FEWER, CHUNKS = D / 8;
  static constexpr int QUERIES = 0, KEYS_AT = ROWS * D * 2, VALUES_AT = KEYS_AT + KEYS * D * 2;
  static constexpr int SLAB = 16 * D * 2;  // 16 rows
  static constexpr int BYTES = VALUES_AT + KEYS * D * 2;

  __device__ __forceinline__ static int at(int row, int chunk) {
    return (row * CHUNKS + (chunk ^ (D == 96 ? row >> 1 & 3 : row & 7))) * 16;
  }

  // Where chunk 2 * s further on lies in the same row; from: the address of chunk 0 or 1.
  __device__ __forceinline__ static uint32_t along(uint32_t from, int s) {
    constexpr int PAIRS = D == 96 ? 2 : 4;
    return (from ^ (s % PAIRS * 32)) + s / PAIRS * PAIRS * 32;
  }

  static constexpr int SHARE = D == 96 ? 4 : D == 64 ? 8 : 16;  // threads that copy a row
  static constexpr int STEP = THREADS / SHARE;  // rows from one chunk of a thread to its next

  // COUNT rows, those from `limit` on as zeros.
  template <int COUNT>
  __device__ __forceinline__ static void copy(uint32_t to, const uint16_t* from, int64_t stride, int limit) {
    static_assert(COUNT % STEP == 0 && STEP % 8 == 0, "as many rows for every thread, their chunks in one order");
    const int row = threadIdx.x / SHARE, chunk = threadIdx.x % SHARE;
    from += row * stride + chunk * 8, to += at(row, chunk);
#pragma unroll
    for (int i = 0; i < COUNT / STEP; ++i, from += STEP * stride) {
#pragma unroll
      for (int c = 0; c < CHUNKS / SHARE; ++c) {  // chunks of a group keep their order from group to group
        copy_async(to + (i * STEP * CHUNKS + c * SHARE) * 16, from + c * SHARE * 8, row + i * STEP < limit);
      }
    }
  }
};

// The same number, of which the compiler does not know that: so that it keeps no register for what follows from it.
__device__ __forceinline__ uint32_t unknown(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <int D, bool BF16, int FEWER = 1>
struct PrefillWarp {
  using R = PrefillRoom<D, FEWER>;
  using Keys = Walk<R::ROWS, R::KEYS>;
  static constexpr int MT = R::OWN / 16, NT = R::KEYS / 8, DT = D / 8;

  const PrefillTask& p;
  const Keys& keys;
  unsigned char* shared;
  int row, lane;    // row: the first of this warp
  uint32_t at;      // this lane's address in the first operand of queries; of values, but for `row`
  uint32_t k_at;    // and of keys
  float top[MT][2], total[MT][2], out[MT][DT][4];

  __device__ PrefillWarp(const PrefillTask& p_, const Keys& keys_, unsigned char* shared_)
      : p(p_), keys(keys_), shared(shared_), row(threadIdx.x / 32 * R::OWN), lane(threadIdx.x % 32) {
    at = shared_address(shared) + R::at(lane % 16, lane / 16);
    k_at = shared_address(shared) + R::KEYS_AT + R::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = NOTHING, total[m][h] = 0.0f;
#pragma unroll
      for (int d = 0; d < DT; ++d) out[m][d][0] = out[m][d][1] = out[m][d][2] = out[m][d][3] = 0.0f;
    }
  }

  // Position of the query of row lane / 4 of 16, or 8 further on.
  __device__ __forceinline__ int from(int m, int h) const { return keys.position[row + 16 * m + 8 * h + lane / 4]; }

  __device__ __forceinline__ void products(float (&x)[MT][NT][4]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) x[m][n][0] = x[m][n][1] = x[m][n][2] = x[m][n][3] = 0.0f;
    }
    const uint32_t queries = unknown(at + R::QUERIES + row * D * 2), tile = unknown(k_at);
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint32_t q[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        load_matrices(q[m], R::along(queries, s) + m * R::SLAB);
      }
#pragma unroll
      for (int n = 0; n < NT / 2; ++n) {
        uint32_t k[4];
        load_matrices(k, R::along(tile, s) + n * R::SLAB);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint4 a = make_uint4(q[m][0], q[m][1], q[m][2], q[m][3]);
          multiply(x[m][2 * n], a, k[0], k[1]);
          multiply(x[m][2 * n + 1], a, k[2], k[3]);
        }
      }
    }
  }

  __device__ __forceinline__ bool special() const { return p.a.softcap != 0.0f || p.a.slopes; }

  // The rare parts of a logit, in units of log 2 then.
  __device__ __forceinline__ void adjust(float (&x)[MT][NT][4], const KeyTile& tile) const {
    if (!special()) return;
    const float slope = p.a.slopes ? p.a.slopes[QueryTile(p, R::ROWS).head] : 0.0f;
    const float cap = p.a.softcap, steep = cap == 0.0f ? 0.0f : 2.0f * LOG2E / cap;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float away = static_cast<float>(tile.position + lane % 4 * 2 - from(m, h));
#pragma unroll
        for (int i = 0; i < NT * 2; ++i) {
          float& z = x[m][i / 2][2 * h + i % 2];
          float y = z * p.a.scale;
          if (cap != 0.0f) y = cap * (1.0f - __fdividef(2.0f, power_of_two(steep * y) + 1.0f));
          z = (y + slope * (away + static_cast<float>(i / 2 * 8 + i % 2))) * LOG2E;
        }
      }
    }
  }

  __device__ __forceinline__ void mask(float (&x)[MT][NT][4], const KeyTile& tile) const {
    if (keys.all_see(tile)) return;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const typename Keys::Seen seen = keys.seen(tile, from(m, h), lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < NT * 2; ++i) {
          if (!seen(i / 2 * 8 + i % 2)) x[m][i / 2][2 * h + i % 2] = NOTHING;
        }
      }
    }
  }

  // Logits to weights; what was added up before is brought to the new largest logit.
  __device__ __forceinline__ void weigh(float (&x)[MT][NT][4]) {
    const float factor = special() ? 1.0f : p.a.scale * LOG2E;  // what makes them logits in units of log 2
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = NOTHING;
#pragma unroll
        for (int n = 0; n < NT; ++n) most = fmaxf(most, fmaxf(x[m][n][2 * h], x[m][n][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const float higher = fmaxf(top[m][h], most * factor), base = higher == NOTHING ? 0.0f : higher;
        const float down = power_of_two(top[m][h] - base);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          sum += x[m][n][2 * h] = power_of_two(x[m][n][2 * h] * factor - base);
          sum += x[m][n][2 * h + 1] = power_of_two(x[m][n][2 * h + 1] * factor - base);
        }
        top[m][h] = higher, total[m][h] = total[m][h] * down + sum;
#pragma unroll
        for (int d = 0; d < DT; ++d) out[m][d][2 * h] *= down, out[m][d][2 * h + 1] *= down;
      }
    }
  }

  __device__ __forceinline__ void gather(const float (&x)[MT][NT][4]) {
    const uint32_t tile = unknown(at + R::VALUES_AT);
#pragma unroll
    for (int s = 0; s < R::KEYS / 16; ++s) {
      uint4 weights[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const float(&y)[4] = x[m][2 * s], (&z)[4] = x[m][2 * s + 1];
        weights[m] = make_uint4(pack(y[0], y[1]), pack(y[2], y[3]), pack(z[0], z[1]), pack(z[2], z[3]));
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t v[4];
        load_transposed(v, R::along(tile, d) + s * R::SLAB);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply(out[m][2 * d], weights[m], v[0], v[1]);
          multiply(out[m][2 * d + 1], weights[m], v[2], v[3]);
        }
      }
    }
  }

  // Through the warp's own rows of queries, which nobody reads any more, so that rows are written whole.
  __device__ __forceinline__ void leave() {
    const QueryTile queries(p, R::ROWS);  // once more, so that no register holds it meanwhile
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = total[m][h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float share = share_of(p.a, queries.head, top[m][h], sum, from(m, h));
#pragma unroll
        for (int d = 0; d < DT; ++d) {
          const uint32_t two = share == 0.0f ? 0u : pack(out[m][d][2 * h] * share, out[m][d][2 * h + 1] * share);
          const int to = R::at(row + 16 * m + 8 * h + lane / 4, d) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(shared + R::QUERIES + to) = two;
        }
      }
    }
    __syncwarp();
    uint16_t* to = static_cast<uint16_t*>(p.a.out) + queries.batch * p.a.out_b + queries.place(p.a) * p.a.out_h;
#pragma unroll
    for (int i = 0; i < R::OWN * R::CHUNKS / 32; ++i) {
      const int index = lane + i * 32, r = row + index / R::CHUNKS, chunk = index % R::CHUNKS;
      const int t = queries.first + r;
      if (t < p.a.tokens) {
        *reinterpret_cast<uint4*>(to + t * p.a.out_t + chunk * 8) =
            *reinterpret_cast<const uint4*>(shared + R::QUERIES + R::at(r, chunk));
      }
    }
  }

 protected:
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (BF16) {
      mma_bf16(c, a, b0, b1);
    } else {
      mma_f16(c, a, b0, b1);
    }
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    return BF16 ? pack_bf16(low, high) : pack_f16(low, high);
  }
};

template <int D, bool BF16>
__global__ __launch_bounds__(PrefillRoom<D>::THREADS, 2) void prefill_mma_kernel(
    const __grid_constant__ PrefillTask p) {
  using R = PrefillRoom<D>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Walk<R::ROWS, R::KEYS> keys;
  const hfl_prefill& a = p.a;
  const uint32_t base = shared_address(shared);
  const QueryTile queries(p, R::ROWS);
  keys.template prepare<R::THREADS>(p, queries, threadIdx.x, [] { __syncthreads(); });
  PrefillWarp<D, BF16> warp(p, keys, shared);
  if (keys.count) {
    KeyTile tile = keys.tile(0);
    const uint16_t* q = static_cast<const uint16_t*>(a.q) + queries.batch * a.q_b + queries.place(a) * a.q_h;
    R::template copy<R::ROWS>(base + R::QUERIES, q + queries.first * a.q_t, a.q_t, a.tokens - queries.first);
    R::template copy<R::KEYS>(base + R::KEYS_AT, keys.k + tile.column * a.k.t, a.k.t, tile.limit);
    copy_commit();
#pragma unroll 1
    for (int i = 1; i <= keys.count; ++i) {
      copy_wait<0>();
      __syncthreads();  // keys are here, and values of the tile before have been read
      R::template copy<R::KEYS>(base + R::VALUES_AT, keys.v + tile.column * a.v.t, a.v.t, tile.limit);
      copy_commit();
      float x[PrefillWarp<D, BF16>::MT][PrefillWarp<D, BF16>::NT][4];
      warp.products(x);
      copy_wait<0>();
      __syncthreads();  // values are here, and the keys have been read
      warp.adjust(x, tile);
      warp.mask(x, tile);
      warp.weigh(x);  // before the copy, for want of registers
      if (i < keys.count) {
        tile = keys.tile(i);
        R::template copy<R::KEYS>(base + R::KEYS_AT, keys.k + tile.column * a.k.t, a.k.t, tile.limit);
      }
      copy_commit();
      warp.gather(x);
    }
  }
  warp.leave();
}

}  // namespace hfl
