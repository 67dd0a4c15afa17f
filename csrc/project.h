// Products of few rows with weights of 16 bits, as a decode step has them. On CUDA alone.
#pragma once
#include "hf_longctx.h"

#define HFL_PROJECT_ROWS 4
#define HFL_PROJECT_PARTS 3

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// layers.project and layers.project_gated: out[p] = x weight[p]^T + bias[p].
typedef struct {
  int32_t rows, inputs, dtype;  // float16 or bfloat16 for all; inputs a multiple of 8
  int32_t parts, gated;         // gated 1: two parts of as many outputs, and out[0] = silu(first) * second, no bias
  int32_t outputs[HFL_PROJECT_PARTS];
  const void* x;  // [rows, inputs]
  int64_t x_r;    // stride of its rows
  const void* weight[HFL_PROJECT_PARTS];  // [outputs, inputs], contiguous
  const void* bias[HFL_PROJECT_PARTS];    // [outputs] or NULL
  void* out[HFL_PROJECT_PARTS];           // [rows, outputs], contiguous
  void* stream;
} hfl_project;

const char* hfl_project_cuda(const hfl_project* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
