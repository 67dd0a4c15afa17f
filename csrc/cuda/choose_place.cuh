// Where a step keeps scores of a row until they are chosen from.
#pragma once
#include "divide.cuh"

namespace hfl {

// A thread of 256 that choose has `each` blocks that follow on each other; a warp reads four of each at a time.
struct ScorePlaces {
  Divisor each, warp;  // blocks of a thread, and of a warp

  ScorePlaces() = default;
  explicit ScorePlaces(int each_) : each(each_), warp(32 * each_) {}
#ifdef __CUDACC__
  __device__ __forceinline__ int of(int block) const {
    const int of_warp = warp.divide(block), rest = block - of_warp * warp.by;
    const int lane = each.divide(rest), i = rest - lane * each.by;
    return of_warp * warp.by + i / 4 * 128 + lane * 4 + i % 4;
  }
#endif
};

// Blocks of a thread that choose among so many; 0: too many.
inline int each_of(int blocks) { return blocks <= 256 * 12 ? 12 : blocks <= 256 * 36 ? 36 : 0; }

}  // namespace hfl
