// Decode attention: results of warps, and of blocks, become one.
#pragma once
#include "attend_warp.cuh"

namespace hfl {

// Four channels of one row of the output: what is left is to divide, with the share of the sink logit.
template <int D, Format F>
__device__ void finish(const AttendTask& p, const Unit& unit, int row, int channel, int place, float4 sum,
                       float2 state) {
  const hfl_attend& a = p.a;
  const int head = unit.head(p, row);
  float top = state.x, total = state.y, factor = 1.0f;
  if (a.sink_logits) {
    const float logit = a.sink_logits[head] * LOG2E, higher = fmaxf(top, logit);
    factor = power_of_two(top - higher);
    total = total * factor + power_of_two(logit - higher + Warp<D, F>::LIFT), top = higher;
  }
  uint16_t* to = static_cast<uint16_t*>(a.out) + unit.batch * a.out_b + head * a.out_h + unit.query(p, row) * a.out_t;
  const bool nothing = place < 0 || state.y == 0.0f;
  factor = nothing ? 0.0f : __fdividef(factor, total);
  uint2 packed;
  if (factor == 0.0f) {
    packed = make_uint2(0, 0);
  } else if (a.dtype == HFL_BF16) {
    packed = make_uint2(pack_bf16(sum.x * factor, sum.y * factor), pack_bf16(sum.z * factor, sum.w * factor));
  } else {
    packed = make_uint2(pack_f16(sum.x * factor, sum.y * factor), pack_f16(sum.z * factor, sum.w * factor));
  }
  *reinterpret_cast<uint2*>(to + channel) = packed;
}

__device__ __forceinline__ void add(float4& sum, float weight, const float4& x) {
  sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

// Where blocks leave results for the last one: [problems, units, splits, ROWS, D], and as many states without D.
template <int D>
struct Scratch {
  float* outs;
  float2* states;
  __device__ Scratch(const AttendTask& p, int problem, int index) {
    const int64_t all = static_cast<int64_t>(p.a.batch) * p.a.kv_heads * p.units * p.splits * ROWS;
    const int64_t mine = (static_cast<int64_t>(problem) * p.units + index) * p.splits * ROWS;
    outs = static_cast<float*>(p.a.scratch) + mine * D;
    states = reinterpret_cast<float2*>(static_cast<float*>(p.a.scratch) + all * D) + mine;
  }
};

// Leave a warp's results in shared memory: out [ROWS, OUT], and largest logit and total.
template <int D, Format F>
__device__ void leave(const Warp<D, F>& warp, float* outs, float2* states) {
  using S = Slab<D, F>;
  const int g = warp.lane >> 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = (warp.lane & 3) * 2 + j;
    if (row >= warp.unit.rows()) continue;
    if (g == 0) states[row] = make_float2(warp.top(j), warp.total[j]);
    float* to = outs + row * Room<D, F>::OUT;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      if constexpr (!S::PACKED) {
        to[S::out_channel(2 * i, g)] = warp.out[i][j], to[S::out_channel(2 * i + 1, g)] = warp.out[i][2 + j];
      } else if constexpr (F == Format::int8) {
        *reinterpret_cast<float2*>(to + S::out_channel(2 * i, g)) = make_float2(warp.out[i][j], warp.out[i][2 + j]);
      } else if (i % 2 == 0) {  // four channels side by side
        *reinterpret_cast<float4*>(to + S::out_channel(2 * i, g)) =
            make_float4(warp.out[i][j], warp.out[i][2 + j], warp.out[i + 1][j], warp.out[i + 1][2 + j]);
      }
    }
  }
}

// Merge what the warps left: into the output if the unit has but this block, else into scratch.
template <int D, Format F>
__device__ void merge_warps(const AttendTask& p, const Unit& unit, const unsigned char* shared,
                            const Scratch<D>& scratch, int split, bool alone) {
  using R = Room<D, F>;
  const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
  const float* outs = reinterpret_cast<const float*>(shared);
  const float2* states = reinterpret_cast<const float2*>(shared + R::STATES);
  for (int i = static_cast<int>(threadIdx.x); i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float2 state = make_float2(NOTHING, 0.0f);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < R::WARPS; ++w) state.x = fmaxf(state.x, states[w * ROWS + row].x);
    const float base = state.x == NOTHING ? 0.0f : state.x;
#pragma unroll
    for (int w = 0; w < R::WARPS; ++w) {
      const float2 own = states[w * ROWS + row];
      const float weight = power_of_two(own.x - base);
      state.y += weight * own.y;
      add(sum, weight, *reinterpret_cast<const float4*>(outs + (w * ROWS + row) * R::OUT + channel));
    }
    if (alone) {
      finish<D, F>(p, unit, row, channel, places[row], sum, state);
    } else {
      const int at = split * ROWS + row;
      *reinterpret_cast<float4*>(scratch.outs + static_cast<int64_t>(at) * D + channel) = sum;
      if (channel == 0) scratch.states[at] = state;
    }
  }
}

// True in all threads of the last of `blocks` blocks to come here; the counter is zero again.
__device__ __forceinline__ bool last_to_arrive(int* counter, int blocks, int* arrived) {
  __syncthreads();
  // What this thread releases and acquires, the barriers hand on from and to the others.
  if (threadIdx.x == 0) *arrived = add_in_order(counter, 1);
  __syncthreads();
  if (*arrived != blocks - 1) return false;
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

// What each block's results count in a row: to `weights`. Returns the row's largest logit and total. By a warp.
__device__ __forceinline__ float2 weigh_blocks(float* weights, const float2* states, int blocks, int lane) {
  float2 own[MOST_SPLITS / 32];
  float top = NOTHING, total = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / 32; ++i) {
    own[i] = make_float2(NOTHING, 0.0f);
    if (i * 32 + lane < blocks) own[i] = __ldcg(states + (i * 32 + lane) * ROWS);
    top = fmaxf(top, own[i].x);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float base = top == NOTHING ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / 32; ++i) {
    const float weight = power_of_two(own[i].x - base);
    if (i * 32 + lane < blocks) weights[i * 32 + lane] = weight;
    total += weight * own[i].y;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  return make_float2(top, total);
}

// Merge what the blocks left, in their order. It comes through shared memory, so that all of it that has room there is
// on its way at once; a thread reads only what it has copied.
template <int D, Format F>
__device__ void merge_blocks(const AttendTask& p, const Unit& unit, unsigned char* shared, const Scratch<D>& scratch,
                             int blocks) {
  using R = Room<D, F>;
  constexpr int THREADS = R::WARPS * 32, OWN = (ROWS * (D / 4) + THREADS - 1) / THREADS;
  const int thread = static_cast<int>(threadIdx.x), all = unit.rows() * (D / 4);
  const int batch = min(blocks, (R::RING - R::PARTS) / 16 / all);
  float* weights = reinterpret_cast<float*>(shared);
  float4* parts = reinterpret_cast<float4*>(shared + R::PARTS);
  float2* states = reinterpret_cast<float2*>(shared + R::STATES);
  float4 sums[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) sums[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < blocks; first += batch) {
    const int count = min(batch, blocks - first);
    for (int i = thread; i < all; i += THREADS) {
#pragma unroll 4
      for (int part = 0; part < count; ++part) {
        copy_async(parts + part * all + i, scratch.outs + static_cast<int64_t>(first + part) * ROWS * D + i * 4, true);
      }
    }
    copy_commit();
    if (first == 0) {
      for (int row = thread / 32; row < unit.rows(); row += R::WARPS) {
        const float2 state = weigh_blocks(weights + row * MOST_SPLITS, scratch.states + row, blocks, thread % 32);
        if (thread % 32 == 0) states[row] = state;
      }
      __syncthreads();
    }
    copy_wait<0>();
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
      const int i = thread + k * THREADS;
      if (i >= all) break;
      const float* own = weights + i / (D / 4) * MOST_SPLITS + first;
#pragma unroll 4
      for (int part = 0; part < count; ++part) add(sums[k], own[part], parts[part * all + i]);
    }
  }
  const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int i = thread + k * THREADS, row = i / (D / 4);
    if (i < all) finish<D, F>(p, unit, row, i % (D / 4) * 4, places[row], sums[k], states[row]);
  }
}

}  // namespace hfl
