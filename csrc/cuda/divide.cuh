// Division by numbers that the host knows: a product and a shift in place of about thirty instructions.
#pragma once
#include <stdint.h>

namespace hfl {

// n / d of 0 <= n < 2^31, 0 < d < 2^31. With 2^(s - 1) < d <= 2^s the multiplier is less than d / 2^(31 + s) too large
// by, relative to its worth: too little to reach the next whole number.
struct Divisor {
  uint32_t multiplier = 0;
  int32_t by = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int32_t by_) : by(by_), shift(31) {
    while ((int64_t{1} << (shift - 31)) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint32_t>(by) - 1) /
                                       static_cast<uint32_t>(by));
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
#endif
};

}  // namespace hfl
