// Decode attention: the block, which merges its warps, and the last block of a unit, which merges the blocks.
#pragma once
#include "attend_warp.cuh"

namespace hfl {

// Four channels of one row of the output: what is left is to divide, with the share of the sink logit.
template <int D, Format F>
__device__ void finish(const AttendTask& p, const Unit& unit, int row, int channel, int place, float4 sum, float2 state) {
  const hfl_attend& a = p.a;
  const int head = unit.head(p, row);
  float top = state.x, total = state.y, factor = 1.0f;
  if (a.sink_logits) {
    const float logit = a.sink_logits[head] * LOG2E, higher = fmaxf(top, logit);
    factor = power_of_two(top - higher);
    total = total * factor + power_of_two(logit - higher + Warp<D, F>::LIFT);
  }
  factor = place < 0 || state.y == 0.0f ? 0.0f : factor / total;
  uint2 packed;
  if (factor == 0.0f) {
    packed = make_uint2(0, 0);
  } else if (a.dtype == HFL_BF16) {
    packed = make_uint2(pack_bf16(sum.x * factor, sum.y * factor), pack_bf16(sum.z * factor, sum.w * factor));
  } else {
    packed = make_uint2(pack_f16(sum.x * factor, sum.y * factor), pack_f16(sum.z * factor, sum.w * factor));
  }
  uint16_t* to = static_cast<uint16_t*>(a.out) + unit.batch * a.out_b + head * a.out_h + unit.query(row) * a.out_t;
  *reinterpret_cast<uint2*>(to + channel) = packed;
}

// The weighted sum of `parts` results of one row, in shared memory or from other blocks: largest logit and total, and
// four channels.
template <bool OTHERS>
__device__ __forceinline__ float2 merge(float4& sum, const float2* states, int state_stride, const float* outs,
                                        int64_t out_stride, int parts) {
  float top = NOTHING, total = 0.0f;
  for (int i = 0; i < parts; ++i) top = fmaxf(top, states[i * state_stride].x);
  sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float base = top == NOTHING ? 0.0f : top;
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
    const float4* at = reinterpret_cast<const float4*>(outs + i * out_stride);
    const float4 x = OTHERS ? __ldcg(at) : *at;
    const float2 state = states[i * state_stride];
    const float weight = power_of_two(state.x - base);
    total += weight * state.y;
    sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
  }
  return make_float2(top, total);
}

// Where blocks leave results for the last one: [problems, units, splits, 16, D] and states [problems, units, splits, 16].
template <int D>
struct Scratch {
  float* outs;
  float2* states;
  __device__ Scratch(const AttendTask& p, int problem, int index) {
    const int64_t all = static_cast<int64_t>(p.a.batch) * p.a.kv_heads * p.units * p.splits * 16;
    const int64_t mine = (static_cast<int64_t>(problem) * p.units + index) * p.splits * 16;
    outs = static_cast<float*>(p.a.scratch) + mine * D;
    states = reinterpret_cast<float2*>(static_cast<float*>(p.a.scratch) + all * D) + mine;
  }
};

template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_kernel(const __grid_constant__ AttendTask p) {
  using R = Room<D, F>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int index = blockIdx.x, split = blockIdx.y, problem = blockIdx.z;
  const Unit unit(p, index, problem);

  const int place = unit.position(p, lane & 15);
  const int high = __reduce_max_sync(0xffffffffu, place);
  const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
  const Keys keys(p, unit, high < 0 ? 0 : low, high);
  const int each = max((keys.count + p.splits - 1) / p.splits, R::WARPS);
  const int blocks = max((keys.count + each - 1) / each, 1);  // that have something to do
  if (split >= blocks) return;

  int* places = reinterpret_cast<int*>(shared + R::PLACES);
  if (thread < 16) {
    places[thread] = place;
    reinterpret_cast<float*>(shared + R::SLOPES)[thread] =
        p.a.slopes && thread < unit.rows() ? p.a.slopes[unit.head(p, thread)] : 0.0f;
  }
  for (int v = warp; v < p.variants; v += R::WARPS) {
    Queries<D, F>::prepare(p, unit, v, reinterpret_cast<uint4*>(shared + R::QUERIES + v * R::QUERY),
                           reinterpret_cast<float2*>(shared + R::FACTORS) + v * 16, lane);
  }
  __syncthreads();
  float* outs = reinterpret_cast<float*>(shared);
  float2* states = reinterpret_cast<float2*>(shared + R::STATES);
  {
    Warp<D, F> mine(p, unit, keys, shared, warp, lane);
    mine.walk(split * each + warp, min(keys.count, (split + 1) * each));
    __syncthreads();  // the rings are free
    mine.leave(outs + warp * 16 * D, states + warp * 16);
  }
  __syncthreads();

  const Scratch<D> scratch(p, problem, index);
  for (int i = thread; i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float4 sum;
    const float2 state = merge<false>(sum, states + row, 16, outs + row * D + channel, 16 * D, R::WARPS);
    if (blocks == 1) {
      finish<D, F>(p, unit, row, channel, places[row], sum, state);
    } else {
      *reinterpret_cast<float4*>(scratch.outs + (static_cast<int64_t>(split) * 16 + row) * D + channel) = sum;
      if (channel == 0) scratch.states[split * 16 + row] = state;
    }
  }
  if (blocks == 1) return;

  int* arrived = reinterpret_cast<int*>(shared + R::FACTORS);
  __threadfence();
  __syncthreads();
  if (thread == 0) *arrived = atomicAdd(p.a.counters + problem * p.units + index, 1);
  __syncthreads();
  if (*arrived != blocks - 1) return;
  __threadfence();
  if (thread == 0) p.a.counters[problem * p.units + index] = 0;
  states = reinterpret_cast<float2*>(shared);
  for (int i = thread; i < blocks * 16; i += R::WARPS * 32) {
    if (i % 16 < unit.rows()) states[i] = __ldcg(scratch.states + i);
  }
  __syncthreads();
  for (int i = thread; i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float4 sum;
    const float2 state = merge<true>(sum, states + row, 16, scratch.outs + row * D + channel, 16 * D, blocks);
    finish<D, F>(p, unit, row, channel, places[row], sum, state);
  }
}

}  // namespace hfl
