// The C interface of the compiled library: no Python, no torch, so that one binary serves every version of both.
//
// Every operation takes one argument block and says what became of it: NULL, or a message (a constant, or a buffer of
// the calling thread) that tells why nothing was done. `*_cpu` takes pointers to host memory and returns when the work
// is done; `*_cuda` takes pointers to memory of the current device and enqueues on `stream`, without allocating and
// without waiting, so that it can be captured in a CUDA graph.
//
// Shapes are those of hf_longctx/kernels/ops.py, where each operation is defined. Strides are in elements; the last axis
// is contiguous. Rows of q, k, v, out and of payloads begin at multiples of 16 bytes in `*_cuda`.
// hf_longctx/kernels/compiled/library.py mirrors these structs field by field; HFL_ABI changes with them.
#pragma once
#include <stdint.h>

#include "delta.h"

#define HFL_ABI 8

#pragma GCC visibility push(default)  // all else is hidden
#ifdef __cplusplus
extern "C" {
#endif

enum hfl_dtype { HFL_F32 = 0, HFL_F16 = 1, HFL_BF16 = 2 };
enum hfl_rounded { HFL_NOT_ROUNDED = 0, HFL_FLOAT = 1, HFL_WHOLE = 2 };  // to 8 bits: e4m3, whole numbers
enum hfl_share { HFL_KV_HEAD = 0, HFL_Q_HEAD = 1, HFL_ALL = 2 };

// Keys or values [B, H, S, D]. bits 0: values of the call's dtype. bits 8 or 4: payload uint8 [B, H, S, D * bits / 8]
// with channel 2i in the low half of byte i; value = (payload - zero) * scale, rounded to the call's dtype in the end;
// scale and zero are float16 [B, H, S] with strides scale_b, scale_h, 1.
typedef struct {
  void* data;
  int64_t b, h, t;  // strides of data; for packed rows in bytes
  void* scale;
  void* zero;
  int64_t scale_b, scale_h;
  int32_t bits;
} hfl_rows;

// ops.attend_pages: up to 8 queries a row.
typedef struct {
  int32_t batch, q_heads, kv_heads, tokens, stored, dim, v_dim, dtype;
  const void* q;          // [B, Hq, T, D]
  const void* q_before;   // the same, turned one lap further: for keys of the lap before; NULL: positions are absolute
  const void* q_sinks;    // the same, turned to where the query sees the sinks; NULL as q_before
  int64_t q_b, q_h, q_t;  // strides of all three
  hfl_rows k, v;
  void* out;  // [B, Hq, T, Dv]
  int64_t out_b, out_h, out_t;
  float scale, softcap;  // softcap 0: none
  const float* sink_logits;  // [Hq] or NULL
  const float* slopes;       // [Hq] or NULL; not with q_before
  const int64_t* q_pos;      // [B or 1, T], -1: no query, its output is zero; NULL: query t stands at stored - T + t
  int64_t q_pos_b;           // 0 where all rows are alike
  const int64_t* k_pos;      // [B or 1, S], -1: no key; NULL: columns are positions
  int64_t k_pos_b;
  int64_t sink, window;  // window < 0: none. A key is seen if 0 <= k_pos <= q_pos, and k_pos < sink or q_pos - k_pos < window
  int64_t lap, offset;   // with q_before: lap of position p is max(p - offset, 0) / lap
  // Selection; ids NULL: all columns. With it k_pos is NULL, sink and window are not used, and block n is query n.
  const int32_t* ids;    // [B, Hs, T, K], ascending, then -1
  const int32_t* pages;  // the same strides: where the blocks lie, in blocks; NULL: at their ids
  int64_t ids_b, ids_h, ids_n;
  int32_t select_heads, chosen, block;  // Hs: 1, Hkv or Hq; K
  // scratch of hfl_attend_scratch bytes, and counters of hfl_attend_counters int32, zero before and after every call.
  void* scratch;
  int32_t* counters;
  int32_t splits;  // parts into which the columns (or chosen blocks) of a row and KV head are cut; 0: chosen inside
  void* stream;
} hfl_attend;

// ops.score_pages.
typedef struct {
  int32_t batch, q_heads, kv_heads, tokens, dim, dtype;  // dtype of q and summary
  int32_t entries, vectors, subs, share;                 // M', R, sub-blocks of a block
  const void* q;                                         // [B, Hq, N, D]
  int64_t q_b, q_h, q_t;
  const void* summary;  // [B, Hkv, M', R, D], R and D contiguous, entries at stride R * D
  int64_t s_b, s_h;
  float* scores;  // [B, Hs, N, M] contiguous
  void* stream;
} hfl_score;

// ops.pick_blocks with `take` (TopK). tau is not here.
typedef struct {
  int32_t batch, heads, queries, blocks, chosen;  // B, Hs, N, M, K
  const float* scores;                            // [B, Hs, N, M] contiguous
  const int64_t* low;                             // [B or 1, N]
  const int64_t* high;
  int64_t low_b, high_b;
  int32_t sink, take;  // blocks
  int32_t* ids;        // [B, Hs, N, K] contiguous
  void* scratch;       // hfl_pick_scratch bytes
  void* stream;
} hfl_pick;

// ops.append_pages: up to 8 tokens a row, at positions; quantizes, and sums up anew the sub-blocks that were touched.
typedef struct {
  int32_t batch, kv_heads, tokens, dim, v_dim, dtype;
  hfl_rows k, v;        // the store, [B, Hkv, C, D]
  const void* fresh_k;  // [B, Hkv, T, D]
  const void* fresh_v;  // [B, Hkv, T, Dv]
  int64_t fk_b, fk_h, fk_t, fv_b, fv_h, fv_t;
  const int64_t* pos;  // [B or 1, T]; -1: not written
  int64_t pos_b;
  int64_t sink, ring;  // slot of p: p, or if ring > 0 and p >= sink: sink + (p - sink) % ring
  void* bounds;        // [B, Hkv, M', 2, D] of dtype, or NULL; only with ring 0
  int64_t bounds_b, bounds_h;
  int32_t sub;  // tokens of a sub-block
  int32_t capacity;
  void* stream;
} hfl_append;

// ops.attend_layer, of one group of heads: one token a row, at q_pos, in float16 or bfloat16, on CUDA.
typedef struct {
  hfl_append append;  // heads of the group: stores, and bounds
  hfl_attend attend;  // keys, values and selection of the group; q, out, sink_logits and slopes of all heads of the layer
  hfl_score score;    // likewise; scores NULL: the choice stands, or there is none
  hfl_pick pick;      // what is scored, into the attention's ids
  uint8_t heads[128];  // which KV head of the layer each one of the group is; fresh keys are those of the layer, too
} hfl_layer_group;

typedef struct {
  hfl_layer_group* groups;
  int32_t count;
  // scratch of hfl_layer_scratch bytes, and as many counters as it says, zero before and after every call.
  void* scratch;
  int32_t* counters;
  void* stream;
} hfl_layer;

// ops.score_antidiagonal; float16 or bfloat16, on CUDA. stride is 4, 8, 16 or 32, block 4 to 64 times that.
typedef struct {
  int32_t batch, q_heads, kv_heads, blocks, stored, dim, dtype;  // blocks: N
  int32_t block, stride, causal;
  int32_t rounded;  // hfl_rounded; on sm_90 alone
  const void* q;  // [B, Hq, N * block, D]
  int64_t q_b, q_h, q_t;
  const void* k;  // [B, Hkv, S, D]
  int64_t k_b, k_h, k_t;
  const int64_t* q_pos;  // [B or 1, N * block], -1: no query
  int64_t q_pos_b;       // 0 where all rows are alike
  float scale;
  float* scores;  // [B, Hq, N, M] contiguous
  void* scratch;  // hfl_antidiagonal_scratch bytes, as it says while the device is current
  void* stream;
} hfl_antidiagonal;

// ops.pick_blocks with `tau` (Mass), on CUDA.
typedef struct {
  int32_t batch, heads, queries, blocks;  // B, Hs, N, M
  const float* scores;                    // [B, Hs, N, M] contiguous
  const int64_t* low;                     // [B or 1, N]
  const int64_t* high;
  int64_t low_b, high_b;
  int32_t sink;      // blocks
  const float* tau;  // [Hs]
  int32_t* ids;      // [B, Hs, N, M] contiguous
  void* stream;
} hfl_pick_mass;

// ops.rms_norm; on CUDA alone.
typedef struct {
  int32_t outer, middle, inner, dim;  // x [outer, middle, inner, dim]
  int32_t dtype, weight_dtype;
  int32_t early;  // 1: rows are rounded to dtype before they meet the weight
  int32_t weights, each;  // where there are numbers: of what, and how many rows in turn have the same one
  float eps, offset;
  const void* x;
  int64_t x_o, x_m, x_i;
  const void* weight;  // [dim], or [weights, dim] where there are numbers
  int64_t weight_r;
  const int64_t* of_row;  // [rows / each], which of the weights, or NULL; zeros where there is none of that number
  void* out;              // contiguous; of dtype, but float32 if early and the weight is
  void* stream;
} hfl_norm;

// ops.rotate_heads; on CUDA alone. Rows of q and k begin at multiples of four elements.
typedef struct {
  int32_t batch, q_heads, kv_heads, tokens, dim, dtype;
  int32_t size, pairs;    // channels that are turned; 1: cos and sin have one channel for a pair of them
  int32_t angle_dtype;    // of cos and sin: dtype or float32
  const void* q;          // [B, Hq, T, D]
  const void* k;          // [B, Hkv, T, D]
  int64_t q_b, q_h, q_t, k_b, k_h, k_t;
  const void* cos;        // [B or 1, T, size or size / 2]
  const void* sin;
  int64_t angle_b, angle_t;  // strides of both; angle_b 0 where all rows are alike
  void* q_out;               // contiguous, as k_out
  void* k_out;
  void* stream;
} hfl_turn;

// ops.gated; on CUDA alone. Tensors begin at multiples of 16 bytes.
typedef struct {
  int64_t count;  // numbers of each tensor, a multiple of 8
  int32_t dtype;  // float16 or bfloat16
  const void* gate;
  const void* up;
  void* out;
  void* stream;
} hfl_gated;

// ops.attend_blocks: many queries a row, in one format for keys and values. *_cuda only.
typedef struct {
  int32_t batch, q_heads, kv_heads, tokens, stored, dim, dtype;
  const void* q;          // [B, Hq, T, D]
  int64_t q_b, q_h, q_t;
  hfl_rows k, v;          // [B, Hkv, S, D]
  void* out;              // [B, Hq, T, D]
  int64_t out_b, out_h, out_t;
  float scale, softcap;      // scale > 0; softcap 0: none
  const float* sink_logits;  // [Hq] or NULL
  const float* slopes;       // [Hq] or NULL
  const int64_t* q_pos;      // [B or 1, T], -1: no query, its output is zero; NULL: query t stands at stored - T + t
  int64_t q_pos_b;           // 0 where all rows are alike
  const int64_t* k_pos;      // [B or 1, S], ascending, -1: no key, and the last T are the queries' own; NULL: columns are
  int64_t k_pos_b;           //   positions
  int64_t sink, window;      // as in hfl_attend
  // Keys at lap positions; lap 0: products are right as they are. sink_pos and inv_freq as in ops.Turns.
  int64_t lap, offset, clamp;  // clamp 0: distances are as they are
  const int64_t* sink_pos;     // [B or 1, T]; read if there are sinks and distances are as they are
  int64_t sink_pos_b;
  const float* inv_freq;        // [pairs]
  int32_t pairs, interleaved;   // pairs: a multiple of 8, up to D / 2
  // Selection; ids NULL: all columns. With it k_pos is NULL, and sink and window are not used.
  const int32_t* ids;    // [B, Hs, N, K], ascending, then -1
  const int32_t* pages;  // the same strides: where the blocks lie, in blocks; NULL: at their ids
  int64_t ids_b, ids_h, ids_n;
  int32_t select_heads, chosen, block, q_block;  // Hs: 1, Hkv or Hq; K; multiples of 64 and of 128 tokens
  const int32_t* places;  // [Hq], which head of q and of out each query head is, of so many; NULL: they are in order
  int32_t all_heads;
  int32_t* counter;  // 0 before and after every call
  void* stream;
} hfl_prefill;

int32_t hfl_abi(void);
const char* hfl_version(void);       // compiler, architectures
int32_t hfl_has_cuda(void);          // 1 if the library holds CUDA code
int64_t hfl_attend_scratch(const hfl_attend* a, int32_t* splits);  // bytes; writes the number of splits that it is for
int64_t hfl_attend_counters(const hfl_attend* a);                  // int32 elements
int64_t hfl_pick_scratch(const hfl_pick* a);
// Bytes, or -1: its blocks, which wait for each other, have no room on the device at a time. Writes how many counters.
int64_t hfl_layer_scratch(const hfl_layer* a, int64_t* counters);
int64_t hfl_antidiagonal_scratch(const hfl_antidiagonal* a);
int64_t hfl_delta_scratch(const hfl_delta* a);
int64_t hfl_merged_scratch(const hfl_merged* a);

const char* hfl_attend_cpu(const hfl_attend* a, int32_t threads);
const char* hfl_score_cpu(const hfl_score* a, int32_t threads);
const char* hfl_pick_cpu(const hfl_pick* a, int32_t threads);
const char* hfl_append_cpu(const hfl_append* a, int32_t threads);
const char* hfl_delta_cpu(const hfl_delta* a, int32_t threads);

const char* hfl_attend_cuda(const hfl_attend* a);
const char* hfl_score_cuda(const hfl_score* a);
const char* hfl_pick_cuda(const hfl_pick* a);
const char* hfl_append_cuda(const hfl_append* a);
const char* hfl_antidiagonal_cuda(const hfl_antidiagonal* a);
const char* hfl_pick_mass_cuda(const hfl_pick_mass* a);
const char* hfl_norm_cuda(const hfl_norm* a);
const char* hfl_turn_cuda(const hfl_turn* a);
const char* hfl_gated_cuda(const hfl_gated* a);
const char* hfl_prefill_cuda(const hfl_prefill* a);
const char* hfl_layer_cuda(const hfl_layer* a);
const char* hfl_delta_cuda(const hfl_delta* a);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
