// Which tiles linear_many.cuh computes: how many tokens they have, and whether those of a last round, in which some
// multiprocessors would have none, are split along K instead.
#pragma once
#include <algorithm>
#include <cstdlib>

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

// Clusters, where their blocks fill at most two on each multiprocessor.
inline ManyPlan plan_spread(int tokens, int rows, int steps, int processors) {
  const int tile = tokens <= 32 ? 32 : tokens <= 64 ? 64 : 128;
  const long long tiles = static_cast<long long>(rows) * ((tokens + tile - 1) / tile);
  if (tiles > 2 * processors && tokens > 64) return {0, 0, 0};
  int shares = 1;
  while (shares < 8 && 2 * shares <= steps && 4 * tiles * shares <= 3 * processors) shares *= 2;
  return {tile, 0, shares};
}

// rows: tiles of 128 rows; steps: of 128 columns.
inline ManyPlan plan_many(int tokens, int rows, int steps, int processors) {
  ManyPlan best = {256, 0, 0};
  if (const char* forced = std::getenv("HFL_TILE")) {
    const int tile = std::atoi(forced), how = std::atoi(std::getenv("HFL_SPLIT"));
    const int tiles = rows * ((tokens + tile - 1) / tile);
    if (how >= 10) return {tile, 0, how / 10};
    return {tile, how == 0 ? 0 : how == 1 ? tiles % processors : tiles, 0};
  }
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
