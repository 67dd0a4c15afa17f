// Where ops.append_pages writes a token, on the host.
#pragma once
#include "scalar.h"

namespace hfl {

inline int64_t slot_of(const hfl_append& a, int64_t pos) {
  return a.ring > 0 && pos >= a.sink ? a.sink + (pos - a.sink) % a.ring : pos;
}

}  // namespace hfl
