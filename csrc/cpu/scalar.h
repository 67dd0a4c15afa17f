// Numbers as the host holds them one at a time: float16 and bfloat16 as bits, and rows of either format.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../hf_longctx.h"

namespace hfl {

struct half {
  uint16_t bits;
};

struct bfloat {
  uint16_t bits;
};

constexpr float LEAST_HALF_NORMAL = 6.103515625e-05f;  // 2^-14

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float value(float x) { return x; }

inline float value(bfloat x) { return of_bits(uint32_t{x.bits} << 16); }

inline float value(half x) {
  // The exponent's bias differs by 112; the product is exact, also for subnormal numbers.
  const uint32_t size = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  if (size >= 0x7c00u << 13) return of_bits(sign | 0x7f800000u | size);  // infinity, NaN
  return of_bits(sign | bits_of(of_bits(size) * 0x1p112f));
}

inline void assign(float* to, float x) { *to = x; }

// To the nearest, ties to even, as torch rounds.
inline void assign(bfloat* to, float x) {
  const uint32_t bits = bits_of(x);
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void assign(half* to, float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  uint32_t size = bits_of(x) & 0x7fffffffu;
  if (size >= 143u << 23) {  // 2^16 and above
    size = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (size < 113u << 23) {  // subnormal: the sum's last bit is worth 2^-24
    size = bits_of(of_bits(size) + 0.5f) - bits_of(0.5f);
  } else {
    size = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | size);
}

inline int64_t dtype_bytes(int32_t dtype) { return dtype == HFL_F32 ? 4 : 2; }

inline const char* at(const void* x, int64_t elements, int32_t dtype) {
  return static_cast<const char*>(x) + elements * dtype_bytes(dtype);
}

inline char* at(void* x, int64_t elements, int32_t dtype) {
  return static_cast<char*>(x) + elements * dtype_bytes(dtype);
}

// The stored tokens of one row and head.
struct Lines {
  char* data;
  int64_t stride;  // bytes from token to token
  half* scale;
  half* zero;
  int32_t bits, dtype, dim;

  Lines(const hfl_rows& x, int64_t b, int64_t h, int32_t dtype_, int32_t dim_)
      : stride(x.t * (x.bits ? 1 : dtype_bytes(dtype_))), scale(nullptr), zero(nullptr), bits(x.bits), dtype(dtype_),
        dim(dim_) {
    data = static_cast<char*>(x.data) + (b * x.b + h * x.h) * (bits ? 1 : dtype_bytes(dtype));
    if (bits) {
      scale = static_cast<half*>(x.scale) + b * x.scale_b + h * x.scale_h;
      zero = static_cast<half*>(x.zero) + b * x.scale_b + h * x.scale_h;
    }
  }
};

// Why a store's format is not one, or NULL.
inline const char* wrong_rows(const hfl_rows& x, int32_t dim) {
  if (x.bits != 0 && x.bits != 4 && x.bits != 8) return "expected rows of 0, 4 or 8 bits";
  return x.bits == 4 && dim % 2 ? "expected an even dim for rows of 4 bits" : nullptr;
}

}  // namespace hfl
