// Common to the kernels of w4a8_experts: which rows of the sorted tokens a tile has, found on the device.
#pragma once
#include "../experts.h"
#include "linear.cuh"

namespace hfl {

struct ExpertsTask {
  hfl_experts a;
  int panels, chunks, groups, bias;  // as in LinearTask
  int units;                         // of one tile of tokens: runs of rows of the weight
};

// Tokens of one expert, as many as a tile has at most.
struct ExpertsTile {
  int expert, first, count;
};

// Where the tiles of each expert begin, counted through, and its tokens end.
struct ExpertsBoard {
  int firsts[HFL_MOST_EXPERTS + 1], ends[HFL_MOST_EXPERTS];

  // By one warp; others see it after a barrier.
  __device__ __forceinline__ void fill(const hfl_experts& a, int tokens, int lane) {
    int tiles = 0, last = 0;
    for (int base = 0; base < a.experts; base += 32) {
      const int e = base + lane, end = a.ends[min(e, a.experts - 1)];
      const int other = __shfl_up_sync(0xffffffffu, end, 1), before = lane ? other : last;
      const int own = (end - before + tokens - 1) / tokens;
      int upto = own;
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, upto, by);
        if (lane >= by) upto += below;
      }
      if (e < a.experts) firsts[e] = tiles + upto - own, ends[e] = end;
      tiles += __shfl_sync(0xffffffffu, upto, 31), last = __shfl_sync(0xffffffffu, end, 31);
    }
    if (lane == 0) firsts[a.experts] = tiles;
  }

  // The last expert that begins with it or before: those without tokens begin where the next one does.
  __device__ __forceinline__ ExpertsTile tile(int number, int experts, int tokens) const {
    int low = 0, high = experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (firsts[middle] <= number) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int first = (low ? ends[low - 1] : 0) + (number - firsts[low]) * tokens;
    return {low, first, min(tokens, ends[low] - first)};
  }
};

}  // namespace hfl
