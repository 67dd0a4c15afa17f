// Decode attention: the block, which merges its warps, and the last block of a unit, which merges the blocks.
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

// Where blocks leave results for the last one: [problems, units, splits, 16, D], and as many states without D.
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

// Positions, slopes and operands of a unit's queries, for all warps.
template <int D, Format F>
__device__ void prepare_queries(const AttendTask& p, const Unit& unit, unsigned char* shared, int place) {
  using R = Room<D, F>;
  const int thread = threadIdx.x;
  if (thread < 16) {
    reinterpret_cast<int*>(shared + R::PLACES)[thread] = place;
    reinterpret_cast<float*>(shared + R::SLOPES)[thread] =
        p.a.slopes && thread < unit.rows() ? p.a.slopes[unit.head(p, thread)] : 0.0f;
  }
  for (int v = thread / 32; v < p.variants; v += R::WARPS) {
    Queries<D, F>::prepare(p, unit, v, reinterpret_cast<uint4*>(shared + R::QUERIES + v * R::QUERY),
                           reinterpret_cast<float2*>(shared + R::FACTORS) + v * 16, thread % 32);
  }
}

// Merge what the warps left: into the output if the unit has but this block, else into scratch.
template <int D, Format F>
__device__ void merge_warps(const AttendTask& p, const Unit& unit, unsigned char* shared, const Scratch<D>& scratch,
                            bool alone) {
  using R = Room<D, F>;
  const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
  const float* outs = reinterpret_cast<const float*>(shared);
  const float2* states = reinterpret_cast<const float2*>(shared + R::STATES);
  for (int i = threadIdx.x; i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float4 sum;
    const float2 state = merge<false>(sum, states + row, 16, outs + row * D + channel, 16 * D, R::WARPS);
    if (alone) {
      finish<D, F>(p, unit, row, channel, places[row], sum, state);
    } else {
      const int at = static_cast<int>(blockIdx.y) * 16 + row;
      *reinterpret_cast<float4*>(scratch.outs + static_cast<int64_t>(at) * D + channel) = sum;
      if (channel == 0) scratch.states[at] = state;
    }
  }
}

// True in all threads of the last of `blocks` blocks to come here; the counter is zero again.
__device__ __forceinline__ bool last_to_arrive(int* counter, int blocks, int* arrived) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *arrived = atomicAdd(counter, 1);
  __syncthreads();
  if (*arrived != blocks - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

template <int D, Format F>
__device__ void merge_blocks(const AttendTask& p, const Unit& unit, unsigned char* shared, const Scratch<D>& scratch,
                             int blocks) {
  using R = Room<D, F>;
  const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
  float2* states = reinterpret_cast<float2*>(shared);
  for (int i = threadIdx.x; i < blocks * 16; i += R::WARPS * 32) {
    if (i % 16 < unit.rows()) states[i] = __ldcg(scratch.states + i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float4 sum;
    const float2 state = merge<true>(sum, states + row, 16, scratch.outs + row * D + channel, 16 * D, blocks);
    finish<D, F>(p, unit, row, channel, places[row], sum, state);
  }
}

template <int D, Format F>
__global__ __launch_bounds__(Room<D, F>::WARPS * 32, 3) void attend_kernel(const __grid_constant__ AttendTask p) {
  using R = Room<D, F>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int index = blockIdx.x, split = blockIdx.y, problem = blockIdx.z;
  const Unit unit(p, index, problem);

  const int place = unit.position(p, lane & 15);
  const int high = __reduce_max_sync(0xffffffffu, place);
  const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
  const Keys keys(p, unit, high < 0 ? 0 : low, high);
  const int each = max((keys.count + p.splits - 1) / p.splits, R::WARPS);
  const int blocks = max((keys.count + each - 1) / each, 1);  // that have something to do
  if (split >= blocks) return;

  {
    const int first = split * each + warp, end = min(keys.count, (split + 1) * each);
    Warp<D, F> mine(p, unit, keys, shared, warp, lane);
    mine.begin(first, end);
    prepare_queries<D, F>(p, unit, shared, place);  // while the first keys are on their way
    __syncthreads();
    mine.walk(first, end);
    __syncthreads();  // the rings are free
    mine.leave(reinterpret_cast<float*>(shared) + warp * 16 * D,
               reinterpret_cast<float2*>(shared + R::STATES) + warp * 16);
  }
  __syncthreads();
  const Scratch<D> scratch(p, problem, index);
  merge_warps<D, F>(p, unit, shared, scratch, blocks == 1);
  if (blocks == 1) return;
  int* arrived = reinterpret_cast<int*>(shared + R::FACTORS);
  if (last_to_arrive(p.a.counters + problem * p.units + index, blocks, arrived)) {
    merge_blocks<D, F>(p, unit, shared, scratch, blocks);
  }
}

}  // namespace hfl
