// Products of few rows with a matrix of its own for each: output embeddings of many tenants. On CUDA alone.
#pragma once
#include "hf_longctx.h"

#define HFL_TABLES_ROWS 16

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// ops.linear_of_rows: out[r] = x[r] weight[table_of_row[r]]^T, and -inf behind the outputs of the row's table. Inputs
// are a multiple of 64; weights and the rows of x begin at multiples of 16 bytes.
typedef struct {
  int32_t rows, inputs, width, tables, dtype;  // float16 or bfloat16; width: of out
  int32_t table_of_row[HFL_TABLES_ROWS];       // [rows]
  int32_t outputs[HFL_TABLES_ROWS];            // of each table
  const void* x;                               // [rows, inputs]
  int64_t x_r;
  const void* weight[HFL_TABLES_ROWS];   // [outputs, inputs] contiguous; dtype, or int8 where there are scales
  const float* scales[HFL_TABLES_ROWS];  // [outputs] or NULL
  void* out;                             // [rows, width] contiguous
  void* stream;
} hfl_tables;

const char* hfl_tables_cuda(const hfl_tables* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
