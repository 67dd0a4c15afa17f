// Argument blocks of quantized experts: what hf_longctx/kernels/experts.py defines. Conventions as in hf_longctx.h.
#pragma once
#include "hf_longctx.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

enum { HFL_MOST_EXPERTS = 512, HFL_MOST_SORTED = 4096 };

// experts.sort_experts; on CUDA alone, of up to HFL_MOST_SORTED rows.
typedef struct {
  int32_t rows, experts;  // S, E
  const int64_t* ids;     // [S]
  int32_t* order;         // [S]
  int32_t* places;        // [S]
  int32_t* ends;          // [E]
  void* stream;
} hfl_sort;

// experts.w4a8_experts; on CUDA alone. Codes, groups, scale and shift are those of E weights as in hfl_linear, one
// behind the other.
typedef struct {
  int32_t tokens, rows, columns;  // S, N, K
  int32_t bits, group, dtype;     // 4 or 8; 0, 32, 64 or 128; of out
  int32_t experts;                // E
  int32_t times;                  // row i is of token order[i] / times; 0: of token i
  int32_t most;                   // rows that one expert is expected to have, at most
  const int8_t* values;           // [S or S / times, K] contiguous
  const float* token_scale;
  const int32_t* sums;
  const int32_t* order;  // [S]
  const int32_t* ends;   // [E], ascending: where the rows of each expert end
  const uint8_t* codes;
  const float* scale;     // [E, N]
  const float* shift;     // [E, N] or NULL
  const uint8_t* groups;  // NULL where group is 0
  void* out;              // [S, N] contiguous
  void* stream;
} hfl_experts;

// experts.combine_experts; on CUDA alone.
typedef struct {
  int32_t tokens, top, columns;  // T, k, H; a multiple of 8
  int32_t experts;               // E
  int32_t dtype, weight_dtype;   // of rows and out; of weights
  const void* rows;              // [T * k, H] contiguous
  const int32_t* places;         // [T * k]
  const int32_t* ends;           // [E]
  const void* weights;           // [T, k] contiguous
  void* out;                     // [T, H] contiguous
  void* stream;
} hfl_combine;

// 1: a call like this one takes tokens in the order of rows alone, `times` 0. Tensors are not looked at.
int32_t hfl_experts_in_order(const hfl_experts* a);

const char* hfl_sort_cuda(const hfl_sort* a);
const char* hfl_experts_cuda(const hfl_experts* a);
const char* hfl_combine_cuda(const hfl_combine* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
