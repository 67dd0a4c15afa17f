// What a task of ops.score_pages needs on the host.
#pragma once
#include "scalar.h"

namespace hfl {

constexpr int ENTRIES = 16;  // that are read at a time

// Rows are the query heads of a KV head, each with its queries.
struct ScoreDesk {
  float* q;         // [rows, padded(R * D)]
  float* entries;   // [ENTRIES, padded(R * D)]
  float* products;  // [rows, ENTRIES]
  float* best;      // [rows, blocks of the task]
};

}  // namespace hfl
