// ops.pick_blocks with `take` on the host: the forced blocks and the best candidates, ascending.
//
// The last score that is taken is found in linear time; of candidates with just that score the first ones are taken.
// NaN counts as -inf, as in the definition. Bound by the bytes of the scores, and by the search.
#include <stdint.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>

#include "scalar.h"
#include "threads.h"

namespace hfl {
namespace {

// Whole numbers in the order of scores.
inline uint32_t rank_of(float score) {
  if (score != score) score = -__builtin_inff();
  const uint32_t bits = bits_of(score + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

void pick_row(const hfl_pick& a, int64_t row, uint32_t* ranks) {
  const int64_t b = row / (int64_t{a.heads} * a.queries), n = row % a.queries, blocks = a.blocks;
  const float* scores = a.scores + row * blocks;
  int32_t *to = a.ids + row * a.chosen, *const end = to + a.chosen;
  const int64_t high = std::min(a.high[b * a.high_b + n], blocks - 1), low = a.low[b * a.low_b + n];
  const int64_t first = std::min<int64_t>(std::max(a.sink, 0), high + 1);      // candidates: from here on,
  const int64_t last = std::max(first, std::min(std::max<int64_t>(low, 0), high + 1));  // to here
  const int64_t candidates = last - first, take = std::min<int64_t>(std::max(a.take, 0), candidates);
  uint32_t least = 0;  // rank of the last one that is taken
  int64_t ties = take;
  if (take > 0 && take < candidates) {
    for (int64_t j = 0; j < candidates; ++j) ranks[j] = rank_of(scores[first + j]);
    std::nth_element(ranks, ranks + take - 1, ranks + candidates, std::greater<uint32_t>());
    least = ranks[take - 1];
    ties = std::count(ranks, ranks + take, least);
  }
  for (int64_t j = 0; j <= high && to < end; ++j) {
    bool picked = j < first || j >= last;
    if (!picked && take == candidates) picked = true;
    if (!picked && take > 0) {
      const uint32_t rank = rank_of(scores[j]);
      picked = rank > least || (rank == least && ties-- > 0);
    }
    if (picked) *to++ = static_cast<int32_t>(j);
  }
  std::fill(to, end, -1);
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_pick_cpu(const hfl_pick* a, int32_t threads) {
  using namespace hfl;
  threads = std::max(1, threads);
  const int64_t rows = int64_t{a->batch} * a->heads * a->queries, blocks = a->blocks;
  const std::unique_ptr<uint32_t[]> ranks(new (std::nothrow) uint32_t[static_cast<size_t>(threads * blocks + 1)]);
  if (!ranks) return "pick: not enough memory for the scores in order";
#pragma omp parallel for num_threads(threads) if (rows * blocks > 1 << 14)
  for (int64_t row = 0; row < rows; ++row) pick_row(*a, row, ranks.get() + thread() * blocks);
  return nullptr;
}
