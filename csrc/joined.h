// Linear layers of many rows, each with the delta of its tenant, that get the same rows. On CUDA of sm_90 alone.
#pragma once
#include "hf_longctx.h"

#define HFL_JOINED_PARTS 3

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// What another layer than the first has of its own; the fields are those of hfl_merged and hfl_delta.
typedef struct {
  int32_t outputs, scale_rows;
  const int32_t* bits;
  const float* scales;
  const void* weight;
  int64_t weight_r;
  const void* bias;
  void* out;
} hfl_joined_part;

// ops.linears_with_delta of many rows.
typedef struct {
  hfl_merged first;  // rows, inputs, slots, planes, groups, scratch and stream are those of all
  int32_t parts;
  hfl_joined_part others[HFL_JOINED_PARTS - 1];
} hfl_joined;

const char* hfl_joined_cuda(const hfl_joined* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
