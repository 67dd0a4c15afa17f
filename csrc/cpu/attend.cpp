// ops.attend_pages on the host: attention of a few queries over stored columns or selected blocks of them.
//
// The columns of a row and KV head are cut into tasks of 1,024, whatever the number of threads, so that results do not
// depend on it; the G query heads share one reading of them. A task keeps an online softmax in float32; tasks are
// merged by their largest logits. Bound by the bytes of keys and values.
#include <stdint.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <vector>

#include "attend.h"
#define HFL_BODY "attend.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t PART = 1024;

int64_t wide(int64_t dim) { return plain::padded(static_cast<int>(dim)); }

const char* wrong(const hfl_attend& a) {
  if (a.batch < 0 || a.tokens < 1 || a.tokens > FEW) return "attend: expected 1 to 8 queries a row";
  if (a.kv_heads < 1 || a.q_heads % a.kv_heads) return "attend: expected q_heads as a multiple of kv_heads";
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "attend: expected float32, float16 or bfloat16";
  if (a.dim < 1 || a.v_dim < 1 || a.stored < 0) return "attend: expected dim and v_dim of at least 1";
  if (a.q_before && (a.lap < 1 || a.slopes)) return "attend: expected a lap of at least 1 and no slopes with q_before";
  if (a.ids && (a.k_pos || a.block < 1)) return "attend: expected a block of at least 1 and no k_pos with ids";
  if (a.ids && a.select_heads != 1 && a.select_heads != a.kv_heads && a.select_heads != a.q_heads) {
    return "attend: expected select_heads of 1, kv_heads or q_heads";
  }
  const char* message = wrong_rows(a.k, a.dim);
  return message ? message : wrong_rows(a.v, a.v_dim);
}

int64_t query_pos(const hfl_attend& a, int64_t b, int64_t t) {
  return a.q_pos ? a.q_pos[b * a.q_pos_b + t] : a.stored - a.tokens + t;
}

// The columns that queries from position `least` to `most` may see.
void find_columns(const hfl_attend& a, Item* it, int64_t least, int64_t most) {
  it->first = it->jump = 0;
  it->count = a.stored;
  if (most < 0) it->count = 0;
  if (most < 0 || a.k_pos) return;
  const int64_t end = std::min<int64_t>(a.stored, most + 1);
  const int64_t begin = a.window < 0 ? 0 : std::max<int64_t>(0, least - a.window + 1);
  it->first = std::min({std::max<int64_t>(a.sink, 0), begin, end});
  it->jump = begin;
  it->count = it->first + std::max<int64_t>(0, end - begin);
}

// The selected blocks that a query at position `most` may see.
void find_blocks(const hfl_attend& a, Item* it, int64_t head, int64_t most) {
  const int64_t offset = it->b * a.ids_b + head * a.ids_h + it->first_query * a.ids_n;
  it->ids = a.ids + offset;
  it->pages = a.pages ? a.pages + offset : nullptr;
  const int64_t last = most < 0 ? -1 : most / a.block;
  int64_t filled = 0;
  while (filled < a.chosen && it->ids[filled] >= 0 && it->ids[filled] <= last) ++filled;
  it->count = filled * a.block;
}

std::vector<Item> list_items(const hfl_attend& a) {
  const int32_t group = a.q_heads / a.kv_heads;
  const bool alone = a.ids && a.select_heads == a.q_heads;  // with one query head a KV head, both are the same
  const int32_t heads = alone ? 1 : group, steps = a.ids ? a.tokens : 1, queries = a.ids ? 1 : a.tokens;
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(a.batch) * (a.q_heads / heads) * steps);
  int64_t task = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int32_t first = 0; first < a.q_heads; first += heads) {
      for (int32_t t = 0; t < steps; ++t) {
        Item it = {};
        it.b = b;
        it.kv_head = first / group;
        it.first_head = first;
        it.heads = heads;
        it.first_query = t;
        it.queries = queries;
        int64_t least = INT64_MAX, most = -1;
        for (int i = 0; i < queries; ++i) {
          it.pos[i] = query_pos(a, b, t + i);
          if (it.pos[i] >= 0) least = std::min(least, it.pos[i]);
          most = std::max(most, it.pos[i]);
        }
        if (a.ids) {
          find_blocks(a, &it, a.select_heads == 1 ? 0 : alone ? first : it.kv_head, most);
        } else {
          find_columns(a, &it, least, most);
        }
        it.part = a.splits > 0 ? std::max<int64_t>(1, (it.count + a.splits - 1) / a.splits) : PART;
        it.task = task;
        task += (it.count + it.part - 1) / it.part;
        items.push_back(it);
      }
    }
  }
  return items;
}

// The item of a task.
const Item& item_of(const std::vector<Item>& items, int64_t task) {
  const auto before = [](int64_t x, const Item& it) { return x < it.task; };
  return *std::prev(std::upper_bound(items.begin(), items.end(), task, before));
}

template <class T>
void write(T* to, const float* from, float factor, int32_t n) {
  for (int32_t i = 0; i < n; ++i) assign(to + i, from[i] * factor);
}

// Merges the tasks of one query head and query, and writes its output.
void merge(const hfl_attend& a, const Item& it, int row, const float* results, int64_t each, float* work) {
  const int64_t width = wide(a.v_dim), rows = it.rows(), tasks = (it.count + it.part - 1) / it.part;
  const int64_t head = it.first_head + row / it.queries, t = row % it.queries;
  const float none = -__builtin_inff(), sink = a.sink_logits && it.pos[t] >= 0 ? a.sink_logits[head] : none;
  const float* first = results + it.task * each;
  float top = sink, total = 0;
  for (int64_t i = 0; i < tasks; ++i) top = std::max(top, first[i * each + rows * width + row]);
  std::fill(work, work + a.v_dim, 0.0f);
  for (int64_t i = 0; top > none && i < tasks; ++i) {
    const float* part = first + i * each;
    const float factor = __builtin_expf(part[rows * width + row] - top);
    total += factor * part[rows * width + rows + row];
    for (int32_t c = 0; c < a.v_dim; ++c) work[c] += factor * part[row * width + c];
  }
  if (sink > none) total += __builtin_expf(sink - top);
  const float factor = total == 0 ? 0.0f : 1.0f / total;
  char* to = at(a.out, it.b * a.out_b + head * a.out_h + (it.first_query + t) * a.out_t, a.dtype);
  if (a.dtype == HFL_F32) write(reinterpret_cast<float*>(to), work, factor, a.v_dim);
  if (a.dtype == HFL_F16) write(reinterpret_cast<half*>(to), work, factor, a.v_dim);
  if (a.dtype == HFL_BF16) write(reinterpret_cast<bfloat*>(to), work, factor, a.v_dim);
}

Desk desk_at(const hfl_attend& a, float* from, int64_t rows) {
  Desk desk;
  desk.q = from;
  desk.tokens = desk.q + 3 * rows * wide(a.dim);
  desk.logits = desk.tokens + TILE * wide(std::max(a.dim, a.v_dim));
  desk.other = desk.logits + rows * TILE;
  return desk;
}

void attend(const hfl_attend& a, const std::vector<Item>& items, int threads) {
  if (items.empty()) return;
  const int64_t rows = items[0].rows(), width = wide(a.v_dim);
  const int64_t tasks = items.back().task + (items.back().count + items.back().part - 1) / items.back().part;
  const int64_t each = rows * width + (2 * rows + 15) / 16 * 16;
  const int64_t own = rows * (3 * wide(a.dim) + 2 * TILE) + TILE * wide(std::max(a.dim, a.v_dim));
  const Floats results(tasks * each), desks(threads * own);
  const auto part = HFL_CHOOSE(attend_part);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const Item& it = item_of(items, task);
    float* out = results.at(task * each);
    const int64_t i = (task - it.task) * it.part, last = std::min(it.count, i + it.part);
    part(a, it, i, last, desk_at(a, desks.at(thread() * own), rows),
         Sums{out, out + rows * width, out + rows * width + rows});
  }
  const int64_t count = static_cast<int64_t>(items.size()) * rows;
#pragma omp parallel for num_threads(threads) if (tasks * rows > 256)
  for (int64_t i = 0; i < count; ++i) {
    const Item& it = items[static_cast<size_t>(i / rows)];
    merge(a, it, static_cast<int>(i % rows), results.at(0), each, desks.at(thread() * own));
  }
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_attend_cpu(const hfl_attend* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::attend(*a, hfl::list_items(*a), std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "attend: not enough memory for the parts' results";
  }
  return nullptr;
}
