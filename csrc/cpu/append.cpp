// ops.append_pages on the host: a few tokens of each row into their slots, quantized where the store is, and the bounds
// of the sub-blocks that they touch made anew from the keys as they are stored; ops.fill_pages, the same for a prompt;
// ops.encode_kv and ops.decode_kv.
//
// The payloads, scales and bounds are, bit for bit, those of the definition. A task is a row and KV head.
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <new>

#include "../fill.h"
#include "append.h"
#define HFL_BODY "append.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t ALONE = 1 << 16;  // channels that one thread reads and writes sooner than others would wake up

const char* wrong_format(const hfl_append& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "append: expected float32, float16 or bfloat16";
  if (a.dim < 1 || (a.v.data && a.v_dim < 1)) return "append: expected dim and v_dim of at least 1";
  if (a.bounds && (a.ring > 0 || a.sub < 1)) return "append: expected a sub of at least 1 and no ring with bounds";
  if (const char* message = wrong_rows(a.k, a.dim)) return message;
  return a.v.data ? wrong_rows(a.v, a.v_dim) : nullptr;
}

const char* wrong(const hfl_append& a) {
  if (const char* message = wrong_format(a)) return message;
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

const char* wrong_fill(const hfl_append& a) {
  if (const char* message = wrong_format(a)) return message;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t pos = a.pos ? a.pos[b * a.pos_b + t] : t;
      if (pos < 0) break;
      if (slot_of(a, pos) >= a.capacity) return "fill: expected positions within the store's capacity";
    }
  }
  return nullptr;
}

void fill(const hfl_fill& f, int threads) {
  const int64_t sides = f.at.v.data ? 2 : 1, tasks = sides * f.at.batch * f.at.kv_heads;
  const int64_t own = 3 * plain::padded(std::max(f.at.dim, f.at.v_dim));
  const Floats work(threads * own);
  const auto fill_some = HFL_CHOOSE(fill_head);
#pragma omp parallel for num_threads(threads) if (tasks * f.at.tokens * f.at.dim > ALONE)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t problem = task / sides;
    fill_some(f, problem / f.at.kv_heads, problem % f.at.kv_heads, task % sides == 0, work.at(thread() * own));
  }
}

void decode(const hfl_decode& a, int threads) {
  const int64_t tasks = int64_t{a.batch} * a.kv_heads, own = plain::padded(a.dim);
  const Floats work(threads * own);
  const auto decode_some = HFL_CHOOSE(decode_head);
#pragma omp parallel for num_threads(threads) if (tasks * a.tokens * a.dim > ALONE)
  for (int64_t task = 0; task < tasks; ++task) {
    decode_some(a, task / a.kv_heads, task % a.kv_heads, work.at(thread() * own));
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

extern "C" const char* hfl_fill_cpu(const hfl_fill* a, int32_t threads) {
  for (int i = 0; i < a->count; ++i) {
    if (const char* message = hfl::wrong_fill(a[i].at)) return message;
  }
  try {
    for (int i = 0; i < a->count; ++i) hfl::fill(a[i], std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "fill: not enough memory";
  }
  return nullptr;
}

extern "C" const char* hfl_decode_cpu(const hfl_decode* a, int32_t threads) {
  if (const char* message = hfl::wrong_rows(a->x, a->dim)) return message;
  if (a->dtype < HFL_F32 || a->dtype > HFL_BF16) return "decode: expected float32, float16 or bfloat16";
  if (!a->x.bits) return "decode: expected packed rows";
  try {
    hfl::decode(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "decode: not enough memory";
  }
  return nullptr;
}
