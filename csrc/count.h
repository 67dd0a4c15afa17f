// What queries read of the blocks that they could see, added up. On CUDA alone.
#pragma once
#include "hf_longctx.h"

#define HFL_COUNT_PARTS 64

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// ops.count_blocks: tally[0] += blocks of all parts from 0 to a query's own, tally[1] += those that each head could see.
typedef struct {
  int32_t parts, batch, queries, chosen, block;
  int32_t heads[HFL_COUNT_PARTS];       // of each part
  const int32_t* ids[HFL_COUNT_PARTS];  // [batch, heads, queries, chosen] contiguous, -1: none
  const int64_t* pos;                   // [batch, queries], where each query stands, -1: none
  int64_t pos_b, pos_n;
  int64_t* tally;  // [2]
  void* stream;
} hfl_count;

const char* hfl_count_cuda(const hfl_count* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
