// ops.score_pages on the host: scores of blocks from what is kept of their keys.
//
// A task is some blocks of a row and KV head (with `all`, of all of them in turn), whose G query heads share one
// reading of the entries. Both bounds are met in one product, as each channel of a query meets one of them with zero.
// Bound by the bytes of the entries.
#include <stdint.h>

#include <algorithm>
#include <new>

#include "score.h"
#define HFL_BODY "score.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t BLOCKS = 256;  // of a task

const char* wrong(const hfl_score& a) {
  if (a.kv_heads < 1 || a.q_heads % a.kv_heads) return "score: expected q_heads as a multiple of kv_heads";
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "score: expected float32, float16 or bfloat16";
  if (a.dim < 1 || a.subs < 1 || a.entries < 0) return "score: expected dim and subs of at least 1";
  if (a.vectors != 1 && a.vectors != 2) return "score: expected 1 or 2 vectors an entry";
  return a.share < HFL_KV_HEAD || a.share > HFL_ALL ? "score: expected share as one of hfl_share" : nullptr;
}

// Takes the scores of a KV head's query heads into those of the heads that share a selection.
void reduce(const hfl_score& a, int64_t b, int64_t kv_head, int64_t first, int64_t last, int64_t blocks,
            const float* best) {
  const int64_t group = a.q_heads / a.kv_heads, count = last - first;
  const int64_t shared = a.share == HFL_ALL ? a.q_heads : group;
  const int64_t heads = a.share == HFL_Q_HEAD ? a.q_heads : a.share == HFL_ALL ? 1 : a.kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = a.share == HFL_Q_HEAD ? kv_head * group + g : a.share == HFL_ALL ? 0 : kv_head;
    const bool fresh = a.share == HFL_Q_HEAD || (g == 0 && (a.share == HFL_KV_HEAD || kv_head == 0));
    const bool done = a.share != HFL_Q_HEAD && g == group - 1 && (a.share == HFL_KV_HEAD || kv_head == a.kv_heads - 1);
    for (int64_t t = 0; t < a.tokens; ++t, best += count) {
      float* to = a.scores + ((b * heads + head) * a.tokens + t) * blocks + first;
      for (int64_t j = 0; j < count; ++j) {
        const float x = fresh ? best[j] : a.vectors == 2 ? std::max(to[j], best[j]) : to[j] + best[j];
        to[j] = done && a.vectors == 1 ? x / static_cast<float>(shared) : x;
      }
    }
  }
}

void score(const hfl_score& a, int threads) {
  const int64_t blocks = (a.entries + a.subs - 1) / a.subs, parts = (blocks + BLOCKS - 1) / BLOCKS;
  const int64_t once = a.share == HFL_ALL ? a.kv_heads : 1, heads = a.kv_heads / once, tasks = a.batch * heads * parts;
  const int64_t rows = int64_t{a.q_heads} / a.kv_heads * a.tokens, width = plain::padded(a.vectors * a.dim);
  const int64_t own = (rows + ENTRIES) * width + rows * ENTRIES + rows * BLOCKS;
  const Floats desks(threads * own);
  const auto score_some = HFL_CHOOSE(score_blocks);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t b = task / (heads * parts), head = task / parts % heads, first = task % parts * BLOCKS;
    const int64_t last = std::min(blocks, first + BLOCKS);
    ScoreDesk desk;
    desk.q = desks.at(thread() * own);
    desk.entries = desk.q + rows * width;
    desk.products = desk.entries + ENTRIES * width;
    desk.best = desk.products + rows * ENTRIES;
    for (int64_t kv_head = head * once; kv_head < (head + 1) * once; ++kv_head) {
      score_some(a, b, kv_head, first, last, desk);
      reduce(a, b, kv_head, first, last, blocks, desk.best);
    }
  }
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_score_cpu(const hfl_score* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::score(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "score: not enough memory";
  }
  return nullptr;
}
