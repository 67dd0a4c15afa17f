// ops.delta_linear on the host: signs are read as bits and turn inputs in registers.
//
// Rows that have the same slots share a reading of the bits. A task is some outputs of some of them. A row's sums are
// made in the same order beside any others. Bound by two instructions for as many inputs as a vector has.
#include <stdint.h>

#include <algorithm>
#include <new>
#include <vector>

#include "delta.h"
#define HFL_BODY "delta.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int64_t OUTPUTS = 64, ROWS = 32;  // of a task

const char* wrong(const hfl_delta& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "delta_linear: expected float32, float16 or bfloat16";
  if (a.rows < 1 || a.outputs < 1 || a.slots < 1 || a.planes < 1) return "delta_linear: expected no empty axis";
  if (a.groups < 1 || a.inputs < 32 || a.inputs % (32 * int64_t{a.groups})) {
    return "delta_linear: expected groups of a multiple of 32 inputs";
  }
  if (a.scale_rows != 1 && a.scale_rows != a.outputs)
    return "delta_linear: expected a scale for each output, or for all";
  for (int64_t i = 0; i < int64_t{a.rows} * a.planes; ++i) {
    if (a.slots_of_rows[i] >= a.slots) return "delta_linear: expected slots that there are";
  }
  return nullptr;
}

void run(const hfl_delta& a, int threads) {
  const int64_t width = plain::padded(a.inputs);
  const Floats inputs(a.rows * width);
  std::vector<int32_t> rows(static_cast<size_t>(a.rows));
  for (int32_t row = 0; row < a.rows; ++row) rows[static_cast<size_t>(row)] = row;
  const auto slots = [&](int32_t row) { return a.slots_of_rows + int64_t{row} * a.planes; };
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t x, int32_t y) {
    return std::lexicographical_compare(slots(x), slots(x) + a.planes, slots(y), slots(y) + a.planes);
  });
  std::vector<DeltaTask> tasks;
  for (int64_t i = 0, next; i < a.rows; i = next) {
    const int32_t* first = rows.data() + i;
    for (next = i + 1; next < a.rows && next - i < ROWS; ++next) {
      if (!std::equal(slots(*first), slots(*first) + a.planes, slots(rows[static_cast<size_t>(next)]))) break;
    }
    for (int64_t n = 0; n < a.outputs; n += OUTPUTS) {
      tasks.push_back({first, next - i, n, std::min<int64_t>(n + OUTPUTS, a.outputs)});
    }
  }
  const auto read = HFL_CHOOSE(read_inputs);
  const auto some = HFL_CHOOSE(delta_outputs);
#pragma omp parallel for num_threads(threads) if (a.rows > 1)
  for (int64_t row = 0; row < a.rows; ++row) read(a, row, inputs.at(row * width));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (tasks.size() > 1)
  for (size_t i = 0; i < tasks.size(); ++i) some(a, tasks[i], inputs.at(0));
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_delta_cpu(const hfl_delta* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::run(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "delta_linear: not enough memory";
  }
  return nullptr;
}
