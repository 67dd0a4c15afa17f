// Compiles HFL_BODY once for each instruction set; HFL_CHOOSE(f) is then the `f` for the processor at hand.
//
// Of the widest that the processor has, the variable ATEN_CPU_CAPABILITY (default, avx2, avx512), with which torch is
// held back, allows less. Compilers without `#pragma GCC target`, and other processors, have the plain one.
#include <stdlib.h>
#include <string.h>

#include "scalar.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define HFL_X86 1
#endif

namespace hfl {

#ifdef HFL_X86
inline int widest() {
  const char* most = getenv("ATEN_CPU_CAPABILITY");
  if (most && !strcmp(most, "default")) return 4;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && !(most && !strcmp(most, "avx2"))) return 16;
  return avx2 ? 8 : 4;
}

static const int lanes = widest();  // one for each copy of the library that is loaded

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define HFL_LANES 16
namespace avx512 {
#include "simd.inl"
#include HFL_BODY
}  // namespace avx512
#undef HFL_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define HFL_LANES 8
namespace avx2 {
#include "simd.inl"
#include HFL_BODY
}  // namespace avx2
#undef HFL_LANES
#pragma GCC pop_options

#define HFL_CHOOSE(f) (lanes == 16 ? avx512::f : lanes == 8 ? avx2::f : plain::f)
#else
#define HFL_CHOOSE(f) plain::f
#endif

#define HFL_LANES 4
namespace plain {
#include "simd.inl"
#include HFL_BODY
}  // namespace plain
#undef HFL_LANES

}  // namespace hfl
