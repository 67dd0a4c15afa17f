// ops.attend_recent: attention to keys of one format, which is joined with that to keys of another one.
#pragma once
#include "hf_longctx.h"

extern "C" {
#pragma GCC visibility push(default)

// Beside hfl_attend without a selection and without turns: call first for the near keys, with `reads` 0, then, as the
// next on the stream, for the far ones, with `reads` 1 and the same `out` and `sums`, which are then part of the result.
// Both run at a time: each has scratch and counters of its own.
typedef struct {
  float* sums;     // [batch, q_heads, tokens]: logarithms, to the base of two, of the sums of weights; -inf: nothing seen
  int32_t reads;   // whether `out` and `sums` are read, else `sums` is written
  int32_t before;  // queries see keys at so many tokens before their positions, and further back
} hfl_beside;

const char* hfl_attend_beside_cuda(const hfl_attend* a, const hfl_beside* beside);

#pragma GCC visibility pop
}
