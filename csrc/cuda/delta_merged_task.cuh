// What delta_merged.cuh is told: rows in the order of their slots, and layers beside each other.
#pragma once
#include "../joined.h"
#include "delta_rows.cuh"

namespace hfl {

struct MergedStages {
  static constexpr int ROWS = 256, OUTPUTS = 128, INPUTS = 64, THREADS = 384, STAGES = 6;
  static constexpr int TILE = ROWS * INPUTS * 2,
                       BYTES = STAGES * TILE + 1024;  // so that it can begin at a multiple of 1024
};

struct MergedRows {
  uint16_t* x;     // [R, K], rows by their slots; in each 32 inputs, pair 4 q + 2 s + h of two stands at 8 s + 4 h + q
  int32_t* order;  // as in DeltaRows
  int32_t* starts;
  int32_t* pieces;
  int64_t bytes;

  explicit MergedRows(const hfl_delta& a) {
    const int64_t rows = a.rows;
    bytes = 0;
    x = take<uint16_t>(a.scratch, bytes, rows * a.inputs);
    order = take<int32_t>(a.scratch, bytes, rows);
    starts = take<int32_t>(a.scratch, bytes, rows + 1);
    pieces = take<int32_t>(a.scratch, bytes, 1);
  }
};

// A layer, and the first of its tiles of outputs among those of all.
struct MergedPart {
  const uint16_t* weight;
  int64_t weight_r;
  const uint16_t* bias;
  const int32_t* bits;
  const float* scales;
  uint16_t* out;
  int32_t outputs, scale_rows, begin;
};

struct MergedTask {
  hfl_delta delta;  // what holds for all layers
  MergedRows rows;
  int32_t tiles;  // of outputs of all of them
  MergedPart parts[HFL_JOINED_PARTS];  // those that there are not begin behind the last tile

  explicit MergedTask(const hfl_joined& a) : delta(a.first.delta), rows(a.first.delta), tiles(0) {
    for (int i = 0; i < HFL_JOINED_PARTS; ++i) {
      MergedPart& to = parts[i];
      to = {};
      if (i < a.parts) {
        const hfl_merged of = layer_of(a, i);
        to.weight = static_cast<const uint16_t*>(of.weight), to.weight_r = of.weight_r;
        to.bias = static_cast<const uint16_t*>(of.bias), to.bits = of.delta.bits, to.scales = of.delta.scales;
        to.out = static_cast<uint16_t*>(of.delta.out);
        to.outputs = of.delta.outputs, to.scale_rows = of.delta.scale_rows;
      }
      to.begin = tiles;
      if (i < a.parts) tiles += (to.outputs - 1) / MergedStages::OUTPUTS + 1;
    }
  }

  // One of them by itself.
  static hfl_merged layer_of(const hfl_joined& a, int i) {
    hfl_merged of = a.first;
    if (i == 0) return of;
    const hfl_joined_part& other = a.others[i - 1];
    of.delta.outputs = other.outputs, of.delta.scale_rows = other.scale_rows;
    of.delta.bits = other.bits, of.delta.scales = other.scales, of.delta.out = other.out;
    of.weight = other.weight, of.weight_r = other.weight_r, of.bias = other.bias;
    return of;
  }
};

}  // namespace hfl
