// linear.quantize_tokens and linear.w4a8_linear on the host; integers are those of the definition, and so is each
// rounding after them.
//
// A task is 16 rows of the weight: their codes become bytes once, and meet all tokens. With AVX-512 VNNI one
// instruction multiplies and adds 64 bytes.
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <new>

#include "../linear.h"
#pragma GCC optimize("fp-contract=off")  // a product is rounded before it is added to
#define HFL_BODY "linear.inl"
#include "each_isa.h"
#include "threads.h"

namespace hfl {
namespace {

constexpr int STRIP = 16, MOST_TOKENS = 64;  // rows of a task; tokens at a time
constexpr int64_t ALONE = 1 << 16;           // products that one thread makes sooner than others would wake up

using Multiply = void (*)(int32_t*, const uint8_t*, const int8_t*, int64_t);

#ifdef HFL_X86
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void multiply_vnni(int32_t* to, const uint8_t* w,
                                                                                  const int8_t* x, int64_t vectors) {
  __m512i even = _mm512_setzero_si512(), odd = even;
  for (int64_t i = 0; i < vectors; i += 2) {
    even = _mm512_dpbusd_epi32(even, _mm512_loadu_si512(w + i * 64), _mm512_loadu_si512(x + i * 64));
    odd = _mm512_dpbusd_epi32(odd, _mm512_loadu_si512(w + i * 64 + 64), _mm512_loadu_si512(x + i * 64 + 64));
  }
  alignas(64) int32_t part[16];
  _mm512_store_si512(part, _mm512_maskz_add_epi32(0xffff, even, odd));
  to[0] = to[1] = 0;
  for (int i = 0; i < 16; ++i) to[i % 2] += part[i];
}
#endif

Multiply multiply() {
#ifdef HFL_X86
  if (lanes == 16 && __builtin_cpu_supports("avx512vnni")) return multiply_vnni;
#endif
  return HFL_CHOOSE(multiply_rows);
}

const char* wrong(const hfl_quantize& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "quantize_tokens: expected float32, float16 or bfloat16";
  if (a.kind != HFL_OF_ROWS) return "quantize_tokens: expected plain rows";
  if (a.tokens < 1 || a.columns < 1) return "quantize_tokens: expected no empty axis";
  return nullptr;
}

const char* wrong(const hfl_linear& a) {
  if (a.dtype < HFL_F32 || a.dtype > HFL_BF16) return "w4a8_linear: expected float32, float16 or bfloat16";
  if (a.tokens < 1 || a.rows < 1) return "w4a8_linear: expected no empty axis";
  if (a.columns < 32 || a.columns % 32 || a.columns > 65536) {
    return "w4a8_linear: expected a multiple of 32 columns, at most 65536";
  }
  if (a.bits != 4 && a.bits != 8) return "w4a8_linear: expected 4 or 8 bits";
  if (a.group && (a.bits == 8 || !a.groups || (a.group != 32 && a.group != 64 && a.group != 128))) {
    return "w4a8_linear: expected groups of 32, 64 or 128 columns, of 4 bits";
  }
  return nullptr;
}

// Tokens in the order of a strip's vectors: a word of four columns twice, for both rows.
void arrange(int8_t* to, const hfl_linear& a, int64_t token) {
  const int64_t runs = (a.columns + 127) / 128 * 2;
  const int8_t* from = a.values + token * a.columns;
  for (int64_t run = 0; run < runs; ++run) {
    for (int vector = 0; vector < 2; ++vector) {
      for (int word = 0; word < 16; ++word, to += 4) {
        const int t = word / 4, middle = word / 2 % 2;  // e of 8 bits, j of 4
        const int64_t column = run * 64 + (a.bits == 8 ? vector * 32 + middle * 16 : middle * 32 + vector * 16) + t * 4;
        memset(to, 0, 4);
        if (column < a.columns) memcpy(to, from + column, 4);
      }
    }
  }
}

void write(const hfl_linear& a, int64_t token, int64_t row, int32_t sum) {
  const int32_t too_much = a.group || a.bits == 8 ? 128 * a.sums[token] : 0;
  float y = static_cast<float>(sum - too_much) * a.scale[row];
  if (a.shift) y -= static_cast<float>(a.sums[token]) * a.shift[row];
  y *= a.token_scale[token];
  if (a.bias) y += a.bias[row];
  const int64_t place = token * a.rows + row;
  if (a.dtype == HFL_F32) {
    assign(static_cast<float*>(a.out) + place, y);
  } else if (a.dtype == HFL_F16) {
    assign(static_cast<half*>(a.out) + place, y);
  } else {
    assign(static_cast<bfloat*>(a.out) + place, y);
  }
}

void quantize(const hfl_quantize& a, int threads) {
  const int64_t own = plain::padded(a.columns);
  const Floats work(threads * own);
  const auto one = HFL_CHOOSE(quantize_row);
#pragma omp parallel for num_threads(threads) if (int64_t{a.tokens} * a.columns > ALONE)
  for (int64_t row = 0; row < a.tokens; ++row) one(a, row, work.at(thread() * own));
}

void multiply_all(const hfl_linear& a, int threads) {
  const int64_t runs = (a.columns + 127) / 128 * 2, line = runs * 128;  // bytes
  const int64_t strips = (a.rows + STRIP - 1) / STRIP, most = std::min(a.tokens, MOST_TOKENS);
  const Floats arranged(most * line / 4), expanded(threads * 8 * line / 4);
  int8_t* const tokens = reinterpret_cast<int8_t*>(arranged.at(0));
  const auto expand = HFL_CHOOSE(expand_strip);
  const Multiply product = multiply();
  for (int64_t first = 0; first < a.tokens; first += most) {
    const int64_t count = std::min<int64_t>(most, a.tokens - first);
    for (int64_t m = 0; m < count; ++m) arrange(tokens + m * line, a, first + m);
#pragma omp parallel for num_threads(threads) if (count * a.rows * a.columns > ALONE)
    for (int64_t strip = 0; strip < strips; ++strip) {
      uint8_t* const bytes = reinterpret_cast<uint8_t*>(expanded.at(thread() * 8 * line / 4));
      expand(bytes, a, strip / 4, static_cast<int>(strip % 4));
      for (int g = 0; g < 8; ++g) {
        for (int64_t m = 0; m < count; ++m) {
          int32_t sums[2];
          product(sums, bytes + g * line, tokens + m * line, runs * 2);
          for (int h = 0; h < 2; ++h) {
            const int64_t row = strip * STRIP + h * 8 + g;
            if (row < a.rows) write(a, first + m, row, sums[h]);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace hfl

extern "C" const char* hfl_quantize_cpu(const hfl_quantize* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::quantize(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "quantize_tokens: not enough memory";
  }
  return nullptr;
}

extern "C" const char* hfl_linear_cpu(const hfl_linear* a, int32_t threads) {
  if (const char* message = hfl::wrong(*a)) return message;
  try {
    hfl::multiply_all(*a, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return "w4a8_linear: not enough memory";
  }
  return nullptr;
}
