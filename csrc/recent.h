// Attention to two stores of the same tokens. On CUDA alone.
#pragma once
#include "hf_longctx.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// ops.attend_recent, up to 8 queries a row at q_pos; and, where fresh keys are given, ops.step_recent, one token a row.
// Without a selection, turns, slopes and sinks. Near keys are of 16 bits, far ones of 8 or 4.
typedef struct {
  hfl_attend near, far;  // alike but for keys, values, k_pos, stored, window; out, sink logits, stream: those of far
  hfl_append near_append, far_append;  // fresh_k NULL in both: nothing is stored
  int32_t recent;  // queries see far keys at so many tokens before their positions, and further back
} hfl_recent;

// Bytes of scratch, and how many counters, zero before and after every call: those of far. Sets `splits` of both.
int64_t hfl_recent_scratch(hfl_recent* a);
int64_t hfl_recent_counters(const hfl_recent* a);
const char* hfl_recent_cuda(const hfl_recent* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
