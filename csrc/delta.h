// Linear layers whose weights differ from row to row by deltas of one bit a weight. Included by hf_longctx.h.
#pragma once
#include <stdint.h>

// ops.delta_linear. *_cuda takes float16 and bfloat16, inputs and groups that are multiples of 128, x and bits that
// begin at multiples of 16 bytes, as do the rows of x.
typedef struct {
  int32_t rows, inputs, outputs, slots, planes, groups, scale_rows;  // R, K, N, S, P; scale_rows: N or 1
  int32_t dtype;                                                     // of x, base and out
  const void* x;                                                     // [R, K]
  const void* base;                                                  // [R, N]
  int64_t x_r, base_r;
  const int32_t* bits;           // [S, N, K / 32] contiguous
  const float* scales;           // [S, scale_rows, groups] contiguous
  const int32_t* slots_of_rows;  // [R, P] contiguous; below 0: none
  void* out;                     // [R, N] contiguous
  void* scratch;                 // hfl_delta_scratch bytes; *_cuda only
  void* stream;
} hfl_delta;

// ops.linear_with_delta: the same with the base layer in it. On CUDA of sm_90 alone; float16 and bfloat16, inputs and
// groups that are multiples of 64, an even number of outputs, rows that begin at multiples of 16 bytes. delta.base is
// not read.
typedef struct {
  hfl_delta delta;
  const void* weight;  // [N, K]
  int64_t weight_r;
  const void* bias;  // [N] or NULL
} hfl_merged;
