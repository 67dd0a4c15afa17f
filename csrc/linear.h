// Argument blocks of quantized linears: what hf_longctx/kernels/linear.py defines. Conventions as in hf_longctx.h.
#pragma once
#include "hf_longctx.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum { HFL_OF_ROWS = 0, HFL_OF_NORM = 1, HFL_OF_GATE = 2 };  // linear.quantize_tokens, _norm, _gated

typedef struct {
  int32_t tokens, columns, dtype;  // M; K; of x and y
  int32_t kind;
  const void* x;  // [M, K], the gate where there is one
  const void* y;  // [M, K], what the gate is multiplied with
  int64_t x_row, y_row;
  int32_t weight_dtype, early;  // of the norm, as in hfl_norm
  float eps, offset;
  const void* weight;  // [K]
  void* normed;        // [M, K] contiguous, what comes of the norm; or NULL
  int8_t* values;      // [M, K] contiguous
  float* scale;        // [M]
  int32_t* sums;       // [M]
  void* stream;
} hfl_quantize;

// linear.w4a8_linear, or, where there is a next one, w4a8_linears; the order of codes and groups is that of
// hf_longctx/kernels/packing.py.
typedef struct hfl_linear {
  int32_t tokens, rows, columns;  // M, N, K
  int32_t bits, group, dtype;     // 4 or 8; 0, 32, 64 or 128; of out
  int32_t few;                    // on CUDA: tokens up to which weights, not products, are what takes time
  int32_t ahead;                  // 1: codes and groups may be read while the kernels before still run
  const int8_t* values;           // [M, K] contiguous
  const float* token_scale;       // [M]
  const int32_t* sums;            // [M]
  const uint8_t* codes;
  const float* scale;     // [N]
  const float* shift;     // [N] or NULL
  const uint8_t* groups;  // NULL where group is 0
  const float* bias;      // [N] or NULL
  void* out;              // [M, N] contiguous
  int32_t* scratch;       // hfl_linear_scratch elements, zero before and after every call
  void* stream;
  const struct hfl_linear* next;  // on CUDA: another weight for the same tokens, of the same form; or NULL
  const hfl_quantize* of;         // on CUDA: what one token is made of in the same launch (w4a8_linears_of); or NULL
} hfl_linear;

int64_t hfl_linear_scratch(const hfl_linear* a);  // int32 elements; tensors are not looked at

const char* hfl_quantize_cpu(const hfl_quantize* a, int32_t threads);
const char* hfl_linear_cpu(const hfl_linear* a, int32_t threads);
const char* hfl_quantize_cuda(const hfl_quantize* a);
const char* hfl_linear_cuda(const hfl_linear* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
