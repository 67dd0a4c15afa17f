// ops.pick_blocks with `take` on the host: the forced blocks and the best candidates, ascending.
//
// The least score that is taken is found bit by bit, by counting, in at most 32 passes over a row's scores, which lie
// in the cache; of candidates with just that score the first ones are taken. NaN counts as -inf, as in the definition.
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>

#define HFL_BODY "pick.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t ALONE = 1 << 13;  // scores that one thread has read sooner than others would wake up

const char* wrong(const hfl_pick& a) {
  if (a.batch < 0 || a.heads < 1 || a.queries < 1 || a.blocks < 0 || a.chosen < 0) return "pick: expected a shape";
  return a.sink < 0 || a.take < 0 ? "pick: expected sink and take of at least 0" : nullptr;
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_pick_cpu(const hfl_pick* a, int32_t threads) {
  using namespace hfl;
  if (const char* message = wrong(*a)) return message;
  threads = std::max(1, threads);
  const int64_t rows = int64_t{a->batch} * a->heads * a->queries, own = plain::padded(a->blocks);
  const std::unique_ptr<uint32_t[]> ranks(new (std::nothrow) uint32_t[static_cast<size_t>(threads * own + 1)]);
  if (!ranks) return "pick: not enough memory for the order of scores";
  const auto pick = HFL_CHOOSE(pick_row);
#pragma omp parallel for num_threads(threads) if (rows * own > ALONE)
  for (int64_t row = 0; row < rows; ++row) pick(*a, row, ranks.get() + thread() * own);
  return nullptr;
}
