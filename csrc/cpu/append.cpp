// ops.append_pages on the host: a few tokens of each row into their slots, quantized where the store is, and the bounds
// of the sub-blocks that they touch made anew from the keys as they are stored.
//
// The payloads, scales and bounds are, bit for bit, those of the definition. A task is a row and KV head.
#include <stdint.h>

#include <algorithm>
#include <new>

#include "append.h"
#define HFL_BODY "append.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t ALONE = 1 << 16;  // channels that one thread reads and writes sooner than others would wake up

const char* wrong(const hfl_append& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "append: expected float32, float16 or bfloat16";
  if (a.dim < 1 || a.v_dim < 1) return "append: expected dim and v_dim of at least 1";
  if (a.bounds && (a.ring > 0 || a.sub < 1)) return "append: expected a sub of at least 1 and no ring with bounds";
  if (const char* message = wrong_rows(a.k, a.dim)) return message;
  if (const char* message = wrong_rows(a.v, a.v_dim)) return message;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t pos = a.pos[b * a.pos_b + t];
      if (pos >= 0 && slot_of(a, pos) >= a.capacity) return "append: expected positions within the store's capacity";
    }
  }
  return nullptr;
}

void append(const hfl_append& a, int threads) {
  const int64_t tasks = int64_t{a.batch} * a.kv_heads, own = 3 * plain::padded(std::max(a.dim, a.v_dim));
  const int64_t channels = tasks * a.tokens * (a.dim + a.v_dim) + (a.bounds ? tasks * a.sub * a.dim : 0);
  const Floats work(threads * own);
  const auto append_some = HFL_CHOOSE(append_head);
#pragma omp parallel for num_threads(threads) if (channels > ALONE)
  for (int64_t task = 0; task < tasks; ++task) {
    append_some(a, task / a.kv_heads, task % a.kv_heads, work.at(thread() * own));
  }
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_append_cpu(const hfl_append* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::append(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "append: not enough memory";
  }
  return nullptr;
}
