// Decode attention: the block, which merges its warps, and the last block of a unit, which merges the blocks.
#pragma once
#include "attend_warp.cuh"
#include "launch.cuh"

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
// four channels. A batch of results is asked for at once, so that all of them are on their way together.
template <int BATCH, bool OTHERS>
__device__ __forceinline__ float2 merge(float4& sum, const float2* states, const float* outs, int64_t out_stride,
                                        int parts) {
  float top = NOTHING, total = 0.0f;
  sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int first = 0; first < parts; first += BATCH) {
    float4 x[BATCH];
    float2 state[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int part = min(first + i, parts - 1);  // beyond the last: read again, counted as nothing
      const float4* at = reinterpret_cast<const float4*>(outs + part * out_stride);
      x[i] = OTHERS ? __ldcg(at) : *at;
      state[i] = OTHERS ? __ldcg(states + part * 16) : states[part * 16];
      if (first + i >= parts) state[i].x = NOTHING;
    }
    float higher = top;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) higher = fmaxf(higher, state[i].x);
    const float base = higher == NOTHING ? 0.0f : higher, down = power_of_two(top - base);
    total *= down, sum.x *= down, sum.y *= down, sum.z *= down, sum.w *= down;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const float weight = power_of_two(state[i].x - base);
      total += weight * state[i].y;
      sum.x += weight * x[i].x, sum.y += weight * x[i].y, sum.z += weight * x[i].z, sum.w += weight * x[i].w;
    }
    top = higher;
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
    const float2 state = merge<R::WARPS, false>(sum, states + row, outs + row * D + channel, 16 * D, R::WARPS);
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
  __syncthreads();
  if (threadIdx.x == 0) {  // a fence holds for what the barrier has made visible to this thread, so one is enough
    __threadfence();
    *arrived = atomicAdd(counter, 1);
    __threadfence();
  }
  __syncthreads();
  if (*arrived != blocks - 1) return false;
  if (threadIdx.x == 0) *counter = 0;
  return true;
}

template <int D, Format F>
__device__ void merge_blocks(const AttendTask& p, const Unit& unit, unsigned char* shared, const Scratch<D>& scratch,
                             int blocks) {
  using R = Room<D, F>;
  const int* places = reinterpret_cast<const int*>(shared + R::PLACES);
  for (int i = threadIdx.x; i < unit.rows() * (D / 4); i += R::WARPS * 32) {
    const int row = i / (D / 4), channel = i % (D / 4) * 4;
    float4 sum;
    const float2 state =
        merge<MERGED, true>(sum, scratch.states + row, scratch.outs + row * D + channel, 16 * D, blocks);
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
  wait_for_previous();

  const int place = unit.position(p, lane & 15);
  const int high = __reduce_max_sync(0xffffffffu, place);
  const int low = __reduce_min_sync(0xffffffffu, place < 0 ? INT_MAX : place);
  const Keys keys(p, unit, high < 0 ? 0 : low, high);
  const int each = slabs_of_block(keys.count, p.splits, R::WARPS);
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
