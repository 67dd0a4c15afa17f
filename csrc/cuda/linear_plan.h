// Which tiles are computed for many tokens: how many tokens they have, and whether a cluster shares each, or those of a
// last round, in which some multiprocessors would have none, are split along K.
#pragma once
#include <algorithm>

namespace hfl {

struct ManyPlan {
  int tokens;       // of a tile
  int split_tiles;  // how many of all are split
  int shares;       // blocks of a cluster for each tile; 0: tiles are as linear_many.cuh has them
};

// By what things took on an H200, in microseconds: 128 columns of a tile, its results, and what is added in memory.
struct ManyCost {
  int tokens;
  double step, results;
};
constexpr ManyCost MANY_COSTS[] = {{64, 0.35, 1.0}, {128, 0.38, 1.5}, {256, 0.63, 2.5}};
constexpr double ADDED_PER_US = 230e3, SPLIT = 3.0;

// Clusters (linear_spread.cuh): of up to 64 tokens, and of more where tiles are so few that two blocks share each. On
// an H200 as many blocks as one and a half on each multiprocessor took least.
inline ManyPlan plan_spread(int tokens, int rows, int steps, int processors) {
  const int tile = tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128;
  const long long tiles = static_cast<long long>(rows) * ((tokens + tile - 1) / tile);
  if (tokens > 64 && 2 * tiles > processors) return {0, 0, 0};
  int shares = 1;
  while (shares < 8 && 2 * shares <= steps && 4 * tiles * shares <= 3 * processors) shares *= 2;
  return {tile, 0, shares};
}

// rows: tiles of 128 rows; steps: of 128 columns.
inline ManyPlan plan_many(int tokens, int rows, int steps, int processors) {
  ManyPlan best = {256, 0, 0};
  const ManyPlan spread = plan_spread(tokens, rows, steps, processors);
  if (spread.shares) return spread;
  double least = 1e30;
  for (const ManyCost& cost : MANY_COSTS) {
    const long long tiles = static_cast<long long>(rows) * ((tokens + cost.tokens - 1) / cost.tokens);
    const long long rounds = tiles / processors, rest = tiles % processors;
    const double tile = steps * cost.step + cost.results;
    const double added = static_cast<double>(rest + processors) * 128 * std::min(tokens, cost.tokens) / ADDED_PER_US;
    const double split = static_cast<double>(rest) * steps / processors * cost.step + added + SPLIT;
    const double whole = static_cast<double>(rounds) * tile, last = rest == 0 ? 0.0 : std::min(tile, split);
    if (whole + last < least) {
      least = whole + last;
      best = {cost.tokens, rest != 0 && split < tile ? static_cast<int>(rest) : 0, 0};
    }
  }
  return best;
}

}  // namespace hfl
