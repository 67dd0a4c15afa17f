// Blocks of keys and values between the device and host memory. On CUDA alone.
#pragma once
#include "hf_longctx.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// Blocks of keys and values on the device, and in host memory, which the device reads and writes at its own addresses.
// Places are those of ops.Places.
typedef struct {
  int32_t batch, kv_heads, block, sinks, tail;
  int32_t pages;     // blocks that a row and KV head has room for on the device
  void* data[6];     // tensors [B, Hkv, pages, ?], contiguous, at multiples of 16 bytes; NULL behind the last one
  int32_t bytes[6];  // of a block in each, a multiple of 16; 0 behind the last one
  const int64_t* table;  // [segments], addresses of [B, Hkv, per_segment, sum of bytes], contiguous
  int32_t segments, per_segment;
} hfl_blocks;

// ops.bring_blocks.
typedef struct {
  hfl_blocks at;
  int32_t select_heads, chosen, pool;  // Hs: 1 or Hkv; K; P
  const int32_t* ids;                  // [B, Hs, 1, K], ascending, then -1
  int64_t ids_b, ids_h;
  const int64_t* lengths;  // [B or 1]
  int64_t lengths_b;       // 0 where all rows are alike
  int32_t* held;           // [B, Hkv, 2, P] contiguous
  int64_t* counts;         // [2]
  int32_t* places;         // [B, Hkv, 1, K] contiguous
  void* stream;
} hfl_bring;

// ops.copy_blocks.
typedef struct {
  hfl_blocks at;
  const int64_t* first;  // [B or 1]
  const int64_t* last;
  int64_t first_b, last_b;  // 0 where all rows are alike
  int32_t most, out;        // out: to host memory
  void* stream;
} hfl_copy;

const char* hfl_bring_cuda(const hfl_bring* a);
const char* hfl_copy_cuda(const hfl_copy* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
