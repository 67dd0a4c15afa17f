// How ops.attend_pages is cut into tasks on the host.
#pragma once
#include "scalar.h"

namespace hfl {

constexpr int TILE = 16;  // columns that are weighed at a time
constexpr int FEW = 8;    // queries of a row

// Query heads that read the same columns for the same queries, and those columns in their order.
struct Item {
  int64_t b;
  int32_t kv_head, first_head, heads, first_query, queries;
  int64_t pos[FEW];  // of the queries
  int64_t count;     // columns that some query may see
  int64_t first, jump;  // all columns: `first` of them from 0 on, the others from `jump` on
  const int32_t* ids;   // selected blocks
  const int32_t* pages;
  int64_t part, task;  // columns of a task, and the first task

  int rows() const { return heads * queries; }
};

// What a task needs: floats at multiples of 64 bytes.
struct Desk {
  float *q, *tokens, *logits, *other;
};

// Result of a task: weighted values [rows, padded v_dim], largest logits [rows] and sums of weights [rows].
struct Sums {
  float *out, *top, *total;
};

}  // namespace hfl
