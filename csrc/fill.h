// ops.fill_pages: many tokens of each row into their slots, and what the store then gives for them.
#pragma once
#include "hf_longctx.h"

extern "C" {
#pragma GCC visibility push(default)

// hfl_append of any number of tokens: of a row first those that are written, one position after the other, then the
// others (-1); of two tokens with one slot the later one stays. at.pos NULL: token t of each row stands at t. at.v.data
// NULL: there are keys alone. at.fresh_k and at.fresh_v have all heads of a layer, of which at.kv_heads are stored.
typedef struct {
  hfl_append at;
  const int32_t* heads;  // [at.kv_heads], which of the layer's each stored head is; NULL: they are in order
  void* read_k;          // as at.fresh_k, and with its strides below: what is read of each token; NULL: nobody asks
  void* read_v;
  int64_t rk_b, rk_h, rk_t, rv_b, rv_h, rv_t;
  int32_t entries;  // M' of at.bounds
  int32_t even;     // all rows are alike and all tokens are written
  int32_t blank;    // the store holds nothing: what is not written becomes 0, and bounds those of no key
  int32_t count;    // of argument blocks side by side, one for each group of heads; read in the first of them
  void* stream;     // of all; at.stream is not used
} hfl_fill;

// ops.decode_kv.
typedef struct {
  int32_t batch, kv_heads, tokens, dim, dtype;  // dtype of the values
  hfl_rows x;                                   // of 8 or 4 bits
  void* out;                                    // [B, H, S, D] contiguous
  void* stream;
} hfl_decode;

const char* hfl_fill_cpu(const hfl_fill* a, int32_t threads);
const char* hfl_decode_cpu(const hfl_decode* a, int32_t threads);
const char* hfl_fill_cuda(const hfl_fill* a);
const char* hfl_decode_cuda(const hfl_decode* a);

#pragma GCC visibility pop
}
