// What the library is; and, built without CUDA, operations that say so.
#include "count.h"
#include "experts.h"
#include "fill.h"
#include "host.h"
#include "joined.h"
#include "linear.h"
#include "project.h"
#include "recent.h"
#include "streamed.h"
#include "tables.h"

extern "C" int32_t hfl_abi(void) { return HFL_ABI; }

extern "C" const char* hfl_version(void) { return HFL_BUILD; }

#ifdef HFL_CUDA
extern "C" int32_t hfl_has_cuda(void) { return 1; }
#else
namespace {
constexpr const char* kNone = "expected a library with CUDA; got one that was built without";
}

extern "C" int32_t hfl_has_cuda(void) { return 0; }
extern "C" int64_t hfl_attend_scratch(const hfl_attend*, int32_t* splits) { return *splits = 0; }
extern "C" int64_t hfl_attend_counters(const hfl_attend*) { return 0; }
extern "C" int64_t hfl_pick_scratch(const hfl_pick*) { return 0; }
extern "C" int64_t hfl_layer_scratch(const hfl_layer*, int64_t* counters) { return *counters = 0; }
extern "C" int64_t hfl_antidiagonal_scratch(const hfl_antidiagonal*) { return 0; }
extern "C" int64_t hfl_delta_scratch(const hfl_delta*) { return 0; }
extern "C" int64_t hfl_merged_scratch(const hfl_merged*) { return 0; }
extern "C" const char* hfl_attend_cuda(const hfl_attend*) { return kNone; }
extern "C" const char* hfl_score_cuda(const hfl_score*) { return kNone; }
extern "C" const char* hfl_pick_cuda(const hfl_pick*) { return kNone; }
extern "C" const char* hfl_append_cuda(const hfl_append*) { return kNone; }
extern "C" const char* hfl_fill_cuda(const hfl_fill*) { return kNone; }
extern "C" const char* hfl_decode_cuda(const hfl_decode*) { return kNone; }
extern "C" const char* hfl_antidiagonal_cuda(const hfl_antidiagonal*) { return kNone; }
extern "C" const char* hfl_pick_mass_cuda(const hfl_pick_mass*) { return kNone; }
extern "C" const char* hfl_bring_cuda(const hfl_bring*) { return kNone; }
extern "C" const char* hfl_copy_cuda(const hfl_copy*) { return kNone; }
extern "C" const char* hfl_norm_cuda(const hfl_norm*) { return kNone; }
extern "C" const char* hfl_turn_cuda(const hfl_turn*) { return kNone; }
extern "C" const char* hfl_gated_cuda(const hfl_gated*) { return kNone; }
extern "C" const char* hfl_prefill_cuda(const hfl_prefill*) { return kNone; }
extern "C" const char* hfl_layer_cuda(const hfl_layer*) { return kNone; }
extern "C" const char* hfl_delta_cuda(const hfl_delta*) { return kNone; }
extern "C" const char* hfl_joined_cuda(const hfl_joined*) { return kNone; }
extern "C" const char* hfl_project_cuda(const hfl_project*) { return kNone; }
extern "C" int64_t hfl_recent_scratch(hfl_recent*) { return 0; }
extern "C" int64_t hfl_recent_counters(const hfl_recent*) { return 0; }
extern "C" const char* hfl_recent_cuda(const hfl_recent*) { return kNone; }
extern "C" const char* hfl_streamed_cuda(const hfl_streamed*) { return kNone; }
extern "C" const char* hfl_count_cuda(const hfl_count*) { return kNone; }
extern "C" const char* hfl_tables_cuda(const hfl_tables*) { return kNone; }
extern "C" int64_t hfl_linear_scratch(const hfl_linear*) { return 0; }
extern "C" const char* hfl_quantize_cuda(const hfl_quantize*) { return kNone; }
extern "C" const char* hfl_linear_cuda(const hfl_linear*) { return kNone; }
extern "C" int32_t hfl_experts_in_order(const hfl_experts*) { return 0; }
extern "C" const char* hfl_sort_cuda(const hfl_sort*) { return kNone; }
extern "C" const char* hfl_experts_cuda(const hfl_experts*) { return kNone; }
extern "C" const char* hfl_combine_cuda(const hfl_combine*) { return kNone; }
#endif
