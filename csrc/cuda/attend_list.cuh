// Decode attention over a list of blocks, one query a row, 128 channels of 16 bits: what a block of 8 warps does.
// attend_list.cu says how the work is cut.
//
// A warp has the words of 16 keys in registers at once, and their values in shared memory: keys are the rows of q.k,
// channels those of p.v, and queries the 8 columns of both. Of keys lane (g, c), lane = 4 g + c, has of rows g and
// g + 8 every fourth piece of 16 bytes; of values it reads, of rows 2c, 2c + 1, 2c + 8 and 2c + 9, pieces g and g + 8,
// and which channel is which row of p.v follows from that. Pieces of a row of values are permuted, so that lanes that
// read at a time meet other banks.
#pragma once
#include "append_row.cuh"
#include "choose.cuh"
#include "divide.cuh"
#include "numbers.cuh"
#include "ptx.cuh"
#include "step.cuh"

namespace hfl {

struct ListTask {
  hfl_attend a;
  hfl_pick pick;  // of a choice, whose scores are as score_order.cuh says
  int chooses;    // blocks of a thread that chooses, 0: the list stands
  int* appended;  // [B * Hkv], whether the token is stored; nullptr: nobody waits for it
  int* scored;    // [B * Hkv], tiles of scores that are there; so many are waited for before any is looked at
  int awaited;
  int group, problems, slabs;  // query heads of a KV head; rows and KV heads; slabs of each
  Divisor splits, each, kv_heads;  // parts of its slabs, slabs of a block
  int before;                      // rows of the grid before those of the parts, where the parts wait for tokens
  bool ahead;                      // the second slab of a warp is read as early as the first one
  bool followed;                   // by another kernel of the step
  hfl_append append;
  Heads heads;
  Turn turn;
};

struct ChooseTask {
  hfl_pick a;
  Divisor heads;
  int tiles, each;
  PickTurn turn;
};

constexpr int LIST_DIM = 128, LIST_WARPS = CHOOSERS / 32, LIST_ROWS = 8, LIST_SLAB = 16;
constexpr int LIST_OUT = LIST_DIM + 4;                 // floats of a row's result and, behind it, its state
constexpr int LIST_VALUES = LIST_SLAB * LIST_DIM * 2;  // bytes
constexpr int MOST_SHARE = 256, MOST_PARTS = 128;      // slabs of a part; parts of a list
constexpr int RECENT = 8;                              // last tokens that the kernel before may have stored

struct ListShared {
  uint4 queries[LIST_DIM / 32][32];
  int list[MOST_SHARE + 1];
  int arrived, limit;
  float2 states[LIST_WARPS][LIST_ROWS];

  // Behind it each warp has room for the values of a slab and then for its results, or all have room for a choice, or
  // for bounds of keys.
  __host__ __device__ static constexpr int warp_bytes(int rows) {
    return rows * LIST_OUT * 4 > LIST_VALUES ? rows * LIST_OUT * 4 : LIST_VALUES;
  }
  __host__ __device__ static constexpr int start() {
    return static_cast<int>((sizeof(ListShared) + 127) / 128 * 128);
  }
  // Where there is room for second slabs, it is behind that.
  __host__ __device__ static constexpr int bytes(int rows) { return start() + LIST_WARPS * warp_bytes(rows); }
};
static_assert(sizeof(ChooseRoom) <= LIST_WARPS * LIST_VALUES && CHOOSERS * 16 * 4 <= LIST_WARPS * LIST_VALUES &&
                  LIST_ROWS * MOST_PARTS * 4 <= LIST_WARPS * LIST_VALUES,
              "room");

__device__ __forceinline__ uint32_t pack(float low, float high, __half) { return pack_f16(low, high); }
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) { return pack_bf16(low, high); }

// Float16 weights are scaled up, so that those of keys that count little stay within its normal numbers.
__device__ __forceinline__ constexpr float lift(__half) { return 10.0f; }
__device__ __forceinline__ constexpr float lift(__nv_bfloat16) { return 0.0f; }

// One warp's slabs.
template <typename T_>
struct ListWarp {
  using T = T_;
  static constexpr float LIFT = lift(T());
  const T *k, *v;         // rows of the head
  static constexpr int AHEAD = 2 * LIST_VALUES;  // bytes of a slab that is read ahead of its turn: values, then keys
  unsigned char* values;  // of the slab, in shared memory
  int lane;
  int limit = -1;     // keys before this one are stored, and seen
  uint4 low[4], high[4];  // keys: of rows g and g + 8
  float out[8][4];        // channels 8 (g + 8 (i / 4)) + 2 (i % 4) and one more, of queries 2c and 2c + 1
  float top[2], total[2];

  __device__ ListWarp(const ListTask& p, int b, int head, unsigned char* values_, int lane_)
      : values(values_), lane(lane_) {
    k = static_cast<const T*>(p.a.k.data) + b * p.a.k.b + head * p.a.k.h;
    v = static_cast<const T*>(p.a.v.data) + b * p.a.v.b + head * p.a.v.h;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    top[0] = top[1] = NOTHING, total[0] = total[1] = 0.0f;
  }

  // The step's token, by a block of its own.
  __device__ static void store(const ListTask& p, int b, int head, int, void* room) {
    append_row<T>(p.append, p.heads.of(head), b, head, room);
  }

  // Whether all keys of a slab are there, and none is the step's own.
  __device__ bool whole(int at) const { return at >= 0 && at + LIST_SLAB <= limit; }

  // A query's 8 channels as operands; from which channel on.
  __device__ static uint4 operands(const uint4& x) { return x; }
  __device__ static int channel(int word, int c) { return word * 32 + c * 8; }
  __device__ void prepare(const uint4 (&)[4][32]) {}

  // Begin to read such a slab.
  __device__ __forceinline__ void load(int at) { load_keys(at), copy_values(at); }
  // Likewise of the slab that comes then, to room of its own; and go on to it.
  __device__ __forceinline__ unsigned char* room_ahead(int rows) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return values + LIST_WARPS * ListShared::warp_bytes(rows) + warp * (AHEAD - ListShared::warp_bytes(rows));
  }
  __device__ __forceinline__ void load_ahead(int at, int rows) {
    unsigned char* to = room_ahead(rows);
    const T *from_k = k + static_cast<int64_t>(at) * LIST_DIM + lane * 8, *from_v = v + (from_k - k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      copy_async(to + offset(i), from_v + i * 2 * LIST_DIM, true);
      copy_async(to + LIST_VALUES + ahead(i * 2 + (lane >> 4), lane & 15), from_k + i * 2 * LIST_DIM, true);
    }
    copy_commit();
  }
  __device__ __forceinline__ void take_ahead(const unsigned char* from) {
    copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = lane >> 2, piece = (lane & 3) + 4 * j;
      low[j] = *reinterpret_cast<const uint4*>(from + LIST_VALUES + ahead(row, piece));
      high[j] = *reinterpret_cast<const uint4*>(from + LIST_VALUES + ahead(row + 8, piece));
    }
  }
  __device__ __forceinline__ void load_keys(int at) {
    const T* from = k + static_cast<int64_t>(at + (lane >> 2)) * LIST_DIM + (lane & 3) * 8;
    load_row(low, from), load_row(high, from + 8 * LIST_DIM);
  }
  __device__ __forceinline__ void copy_values(int at) {
    const T* from = v + static_cast<int64_t>(at) * LIST_DIM + lane * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) copy_async(place(i), from + i * 2 * LIST_DIM, true);
    copy_commit();
  }
  // The slab of the query's token, which comes from where it is fresh: what is seen of it, and zeros as values. Keys
  // that nobody sees are any.
  __device__ void load_last(const ListTask& p, int at) {
    const int problem = static_cast<int>(blockIdx.y), b = p.kv_heads.divide(problem);
    const int head = problem - b * p.kv_heads.by;
    const int fresh = p.heads.of(head), own = limit < p.a.stored ? limit : -1;  // the token's row
    const auto row_of = [&](const T* rows, const void* all, int64_t b_stride, int64_t h_stride, int row) {
      const T* token = static_cast<const T*>(all) + b * b_stride + fresh * h_stride;
      return row == own ? token : rows + static_cast<int64_t>(min(row, p.a.stored - 1)) * LIST_DIM;
    };
    const hfl_append& a = p.append;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int row = at + i * 2 + (lane >> 4);
      const bool seen = row < limit || row == own;
      copy_async(place(i), row_of(v, a.fresh_v, a.fv_b, a.fv_h, row) + lane % 16 * 8, seen);
    }
    copy_commit();
    load_row(low, row_of(k, a.fresh_k, a.fk_b, a.fk_h, at + (lane >> 2)) + (lane & 3) * 8);
    load_row(high, row_of(k, a.fresh_k, a.fk_b, a.fk_h, at + 8 + (lane >> 2)) + (lane & 3) * 8);
  }

  // What has been begun. `next`: the slab where to go on, of which all keys are there, -1: none; `early`: it was
  // read ahead.
  __device__ __forceinline__ void attend(const ListTask& p, const uint4 (&queries)[4][32], int at, int next,
                                         bool early) {
    float sums[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 q = queries[j][lane];
      multiply(sums[0], make_uint4(low[j].x, high[j].x, low[j].y, high[j].y), q.x, q.y, T());
      multiply(sums[1], make_uint4(low[j].z, high[j].z, low[j].w, high[j].w), q.z, q.w, T());
    }
    if (early) {
      take_ahead(room_ahead(p.group));
    } else if (next >= 0) {
      load_keys(next);
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = (sums[0][i] + sums[1][i]) * (p.a.scale * LOG2E);
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
      x[j] = power_of_two(x[j] - base + LIFT), x[2 + j] = power_of_two(x[2 + j] - base + LIFT);
      top[j] = higher, total[j] = total[j] * down + x[j] + x[2 + j];
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i][j] *= down, out[i][2 + j] *= down;
    }
    const uint32_t first = transpose(pack(x[0], x[1], T())), second = transpose(pack(x[2], x[3], T()));
    copy_wait<0>();
    __syncwarp();
    add_values<0>(first, second), add_values<1>(first, second);
    __syncwarp();  // the values are read
    if (early) {
      values = room_ahead(p.group);
    } else if (next >= 0) {
      copy_values(next);
    }
  }

  // Leave the results in shared memory: [rows, LIST_OUT], where the first values were.
  __device__ void leave(float2* states, int rows, unsigned char* room) {
    const int g = lane >> 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) total[j] += __shfl_xor_sync(0xffffffffu, total[j], step);
      const int row = 2 * (lane & 3) + j;
      if (row >= rows) continue;
      if (g == 0) states[row] = make_float2(top[j], total[j]);
      float* to = reinterpret_cast<float*>(room) + row * LIST_OUT + g * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        *reinterpret_cast<float4*>(to + i / 4 * 64 + i % 4 * 2) =
            make_float4(out[i][j], out[i][2 + j], out[i + 1][j], out[i + 1][2 + j]);
      }
    }
  }

 private:
  __device__ __forceinline__ static void load_row(uint4 (&to)[4], const T* from) {
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = __ldcg(reinterpret_cast<const uint4*>(from + j * 32));
  }
  // Where the lane's i-th piece goes: piece lane % 16 of row 2 i + lane / 16.
  __device__ __forceinline__ unsigned char* place(int i) const { return values + offset(i); }
  __device__ __forceinline__ int offset(int i) const {
    return (i * 2 + (lane >> 4)) * (LIST_DIM * 2) + ((lane & 15) ^ ((i & 3) << 1)) * 16;
  }
  // Where a piece of a row of keys is, so that lanes that read at a time meet other banks.
  __device__ __forceinline__ static int ahead(int row, int piece) {
    return row * (LIST_DIM * 2) + (piece ^ ((row & 1) << 2)) * 16;
  }
  template <int HALF>
  __device__ __forceinline__ void add_values(uint32_t first, uint32_t second) {
    const int g = lane >> 2, c = lane & 3;
    const unsigned char* from = values + 2 * c * (LIST_DIM * 2) + (g ^ (c << 1)) * 16 + HALF * 128;
    uint4 rows[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      rows[r] = *reinterpret_cast<const uint4*>(from + (r / 2 * 8 + r % 2) * (LIST_DIM * 2));
    }
    add(out[4 * HALF], rows[0].x, rows[1].x, rows[2].x, rows[3].x, first, second);
    add(out[4 * HALF + 1], rows[0].y, rows[1].y, rows[2].y, rows[3].y, first, second);
    add(out[4 * HALF + 2], rows[0].z, rows[1].z, rows[2].z, rows[3].z, first, second);
    add(out[4 * HALF + 3], rows[0].w, rows[1].w, rows[2].w, rows[3].w, first, second);
  }
  // Two channels of four keys.
  __device__ __forceinline__ static void add(float (&to)[4], uint32_t w, uint32_t x, uint32_t y, uint32_t z,
                                             uint32_t first, uint32_t second) {
    const uint4 pairs = make_uint4(__byte_perm(w, x, 0x5410), __byte_perm(w, x, 0x7632), __byte_perm(y, z, 0x5410),
                                   __byte_perm(y, z, 0x7632));
    multiply(to, pairs, first, second, T());
  }
};

}  // namespace hfl
