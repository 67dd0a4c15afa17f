// The choice of a step where it is needed: each block that reads chosen keys finds what it reads itself.
//
// Paper: the top-k of Quest (arXiv:2406.10774) section 3.3, as pick.cu defines it. A row's scores are brought to shared
// memory as they come; choose_ranks.cuh finds those that are taken.
#pragma once
#include "choose_ranks.cuh"
#include "step.cuh"

namespace hfl {

// A row's scores to shared memory, each once it is there, those that are no candidates as 0; and of those that came by
// this thread, the extent. By all threads.
__device__ __forceinline__ Extent bring_scores(const uint4* from, uint4* to, int each, int first, int last) {
  constexpr int BATCH = 9;
  const int thread = static_cast<int>(threadIdx.x);
  Extent extent;
#pragma unroll 1
  for (int start = 0; start < each / 4; start += BATCH) {
    uint4 x[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int at = thread + (start + i) * CHOOSERS;
      x[i] = make_uint4(0, 0, 0, 0);
      if (start + i < each / 4 && at * 4 + 4 <= last) x[i] = load_as_it_comes(from + at);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (start + i >= each / 4) break;
      const int at = thread + (start + i) * CHOOSERS;
      if (at * 4 >= first && at * 4 + 4 <= last) {
#pragma unroll 1
        while (min(min(x[i].x, x[i].y), min(x[i].z, x[i].w)) == 0) x[i] = load_as_it_comes(from + at);
        extent.add(x[i].x), extent.add(x[i].y), extent.add(x[i].z), extent.add(x[i].w);
      } else {
        x[i] = make_uint4(0, 0, 0, 0);
      }
      to[at] = x[i];
    }
  }
  // The last of the first four, and the first of the last four.
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int at = (which ? last : first) / 4, from_block = max(at * 4, first), to_block = min(at * 4 + 4, last);
    const bool part = to_block - from_block < 4 && (!which || at > first / 4);
    if (!part || at % CHOOSERS != thread) continue;
#pragma unroll 1
    for (int block = from_block; block < to_block; ++block) {
      uint32_t x;
      do {
        x = load_as_it_comes(reinterpret_cast<const uint32_t*>(from) + block);
      } while (!x);
      extent.add(x), reinterpret_cast<uint32_t*>(to)[block] = x;
    }
  }
  return extent;
}

// A row's list, as pick.cu says: candidates are blocks `first` to `last` - 1, of which `taken` are taken; those before
// and those from `last` to `end` - 1 are forced.
struct ListShape {
  int first, last, end, taken;

  __device__ ListShape(const hfl_pick& a, int b) {
    const int64_t low = a.low[b * a.low_b], high = a.high[b * a.high_b];
    end = high < 0 ? 0 : static_cast<int>(high < a.blocks ? high + 1 : a.blocks);
    first = min(a.sink, end);
    last = low < first ? first : static_cast<int>(low < end ? low : end);
    taken = min(a.take, last - first);
  }
  __device__ bool chosen() const { return taken > 0 && taken < last - first; }
  // What is there without a choice at a place of the list; -2: a candidate.
  __device__ int at(int place) const {
    if (place < first) return place;
    if (place < first + taken) return chosen() ? -2 : place;
    const int block = last + place - first - taken;
    return block < end ? block : -1;
  }
};

// For the scores of the next step, by all threads, once all of these are there, also those that nobody looked at: when
// the kernel that writes them is done.
__device__ __forceinline__ void clear_scores(const float* scores, int each, int problem) {
  float4* to = reinterpret_cast<float4*>(const_cast<float*>(scores) + static_cast<int64_t>(problem) * CHOOSERS * each);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < CHOOSERS * each / 4; i += CHOOSERS) {
    to[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

// Entries `start` to `end` - 1 of the list of a row and KV head, once its scores are there, which are not looked at
// before about `awaited` tiles of them are. By all threads.
__device__ __forceinline__ void choose_part(const hfl_pick& a, int each, const int* scored, int awaited,
                                            unsigned char* memory, int b, int problem, int start, int end, int* list) {
  ChooseRoom& room = *reinterpret_cast<ChooseRoom*>(memory);
  uint32_t* ranks = reinterpret_cast<uint32_t*>(memory + sizeof(ChooseRoom));
  const int thread = static_cast<int>(threadIdx.x);
  const ListShape shape(a, b);
  if (thread == 0) wait_until(scored + problem, awaited);
  __syncthreads();
#pragma unroll 1
  for (int i = start + thread; i < end; i += CHOOSERS) {
    const int block = shape.at(i);
    if (block != -2) list[i - start] = block;
  }
  if (!shape.chosen()) {
    let_next();
    return;
  }
  const uint4* scores = reinterpret_cast<const uint4*>(a.scores) + static_cast<int64_t>(problem) * CHOOSERS * each / 4;
  if (awaited == 0) let_next();  // all comes at once: what the next kernel reads early is in nobody's way
  const Extent extent = bring_scores(scores, reinterpret_cast<uint4*>(ranks), each, shape.first, shape.last);
  let_next();
  Chooser chooser(room, ranks, each);
  chooser.choose(extent, shape.taken, shape.first, start, end, list);
}

}  // namespace hfl
