// Decode attention over a list: results of warps, and of parts, become one.
#pragma once
#include "attend_list.cuh"

namespace hfl {

// What a block leaves for the last one: for each of its rows LIST_DIM sums, and the largest logit and the total.
__device__ __forceinline__ float* scratch_of(const ListTask& p, int problem, int split) {
  return static_cast<float*>(p.a.scratch) + (static_cast<int64_t>(problem) * p.splits.by + split) * p.group * LIST_OUT;
}

__device__ __forceinline__ void add(float2& sum, float weight, const float2& x) {
  sum.x += weight * x.x, sum.y += weight * x.y;
}

// Two channels of a row, of all warps, whose results lie so many bytes apart; state: the largest logit and the total.
template <int WARPS>
__device__ __forceinline__ float2 sum_of_warps(const unsigned char* room, int apart,
                                               const float2 (&states)[WARPS][LIST_ROWS], int row, int channel,
                                               float2& state) {
  state = make_float2(NOTHING, 0.0f);
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) state.x = fmaxf(state.x, states[w][row].x);
  const float base = state.x == NOTHING ? 0.0f : state.x;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float2 own = states[w][row];
    const float weight = power_of_two(own.x - base);
    state.y += weight * own.y;
    const float* outs = reinterpret_cast<const float*>(room + w * apart);
    add(sum, weight, *reinterpret_cast<const float2*>(outs + row * LIST_OUT + channel));
  }
  return sum;
}

// The same to what the block leaves.
__device__ __forceinline__ void merge_warps(const unsigned char* room, const ListShared& shared, int rows, int row,
                                            int channel, float* to) {
  float2 state;
  const float2 sum = sum_of_warps(room, ListShared::warp_bytes(rows), shared.states, row, channel, state);
  *reinterpret_cast<float2*>(to + row * LIST_OUT + channel) = sum;
  if (channel == 0) *reinterpret_cast<float2*>(to + row * LIST_OUT + LIST_DIM) = state;
}

// Two channels of a row of the output: what is left is to divide, with the share of the sink logit.
template <typename W>
__device__ __forceinline__ void finish(const ListTask& p, int b, int head, int row, int channel, const float2& sum,
                                       const float2& state) {
  const int q_head = p.heads.of(head) * p.group + row;
  float total = state.y, factor = 1.0f;
  if (p.a.sink_logits) {
    const float logit = p.a.sink_logits[q_head] * LOG2E, higher = fmaxf(state.x, logit);
    factor = power_of_two(state.x - higher);
    total = total * factor + power_of_two(logit - higher + W::LIFT);
  }
  factor = state.y == 0.0f ? 0.0f : __fdividef(factor, total);
  using T = typename W::T;
  T* to = static_cast<T*>(p.a.out) + b * p.a.out_b + q_head * p.a.out_h + channel;
  const uint32_t both = factor == 0.0f ? 0u : pack(sum.x * factor, sum.y * factor, T());
  *reinterpret_cast<uint32_t*>(to) = both;
}

// What each part counts in a row: to `weights`, and the row's largest logit and total to `state`. By a warp.
__device__ __forceinline__ void weigh_parts(const ListTask& p, const float* from, float* weights, float2& state) {
  const int lane = static_cast<int>(threadIdx.x) % 32, stride = p.group * LIST_OUT;
  float2 own[MOST_PARTS / 32];
  float top = NOTHING, total = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST_PARTS / 32; ++i) {
    const int part = i * 32 + lane;
    own[i] = make_float2(NOTHING, 0.0f);
    if (part < p.splits.by) own[i] = __ldcg(reinterpret_cast<const float2*>(from + part * stride + LIST_DIM));
    top = fmaxf(top, own[i].x);
  }
#pragma unroll
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float base = top == NOTHING ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < MOST_PARTS / 32; ++i) {
    const float weight = power_of_two(own[i].x - base);
    weights[i * 32 + lane] = weight, total += weight * own[i].y;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  if (lane == 0) state = make_float2(top, total);
}

// The same as merge_warps, of all parts, to the output.
template <typename W>
__device__ __forceinline__ void merge_parts(const ListTask& p, ListShared& shared, unsigned char* room, int b, int head,
                                            int problem) {
  constexpr int BATCH = 16;  // as many as there are of a list for one row of 8 KV heads
  const int thread = static_cast<int>(threadIdx.x), stride = p.group * LIST_OUT;
  const float* from = scratch_of(p, problem, 0);
  float* weights = reinterpret_cast<float*>(room);
  float2 parts[BATCH];
  const auto load = [&](int i, int first) {
    const float* own = from + i / (LIST_DIM / 2) * LIST_OUT + i % (LIST_DIM / 2) * 2 + first * stride;
#pragma unroll
    for (int part = 0; part < BATCH; ++part) {
      parts[part] = make_float2(0.0f, 0.0f);
      if (first + part < p.splits.by) parts[part] = __ldcg(reinterpret_cast<const float2*>(own + part * stride));
    }
  };
  if (thread < p.group * (LIST_DIM / 2)) load(thread, 0);
#pragma unroll 1
  for (int row = thread / 32; row < p.group; row += LIST_WARPS) {
    weigh_parts(p, from + row * LIST_OUT, weights + row * MOST_PARTS, shared.states[0][row]);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < p.group * (LIST_DIM / 2); i += CHOOSERS) {
    const int row = i / (LIST_DIM / 2);
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < p.splits.by; first += BATCH) {
      if (first > 0 || i >= CHOOSERS) load(i, first);
#pragma unroll
      for (int part = 0; part < BATCH; ++part) add(sum, weights[row * MOST_PARTS + first + part], parts[part]);
    }
    finish<W>(p, b, head, row, i % (LIST_DIM / 2) * 2, sum, shared.states[0][row]);
  }
}

}  // namespace hfl
