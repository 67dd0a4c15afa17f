// Linear layers of few rows, each with the delta of its tenant. On CUDA of sm_90 alone.
#pragma once
#include "hf_longctx.h"

#define HFL_STREAMED_ROWS 16
#define HFL_STREAMED_PARTS 3

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// ops.linear_with_delta of few rows, and of several layers that get the same rows. Inputs are a multiple of 128;
// weights, bits and the rows of x and of weights begin at multiples of 16 bytes.
typedef struct {
  int32_t rows, inputs, slots, dtype;  // float16 or bfloat16 for all but scales
  int32_t parts;
  int32_t outputs[HFL_STREAMED_PARTS];
  const void* x;  // [R, K]
  int64_t x_r;
  const int32_t* slots_of_rows;            // [R]; below 0: none
  const void* weight[HFL_STREAMED_PARTS];  // [N, K]
  int64_t weight_r[HFL_STREAMED_PARTS];
  const void* bias[HFL_STREAMED_PARTS];     // [N] or NULL
  const int32_t* bits[HFL_STREAMED_PARTS];  // [S, N, K / 32] contiguous
  const float* scales[HFL_STREAMED_PARTS];  // [S]
  void* out[HFL_STREAMED_PARTS];            // [R, N] contiguous
  void* stream;
} hfl_streamed;

const char* hfl_streamed_cuda(const hfl_streamed* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
