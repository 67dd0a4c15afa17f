// What a task of ops.delta_linear works on, on the host.
#pragma once
#include "scalar.h"

namespace hfl {

// Rows that have the same slots, and some outputs.
struct DeltaTask {
  const int32_t* rows;
  int64_t count;
  int64_t first, last;  // outputs `first` to `last - 1`
};

}  // namespace hfl
