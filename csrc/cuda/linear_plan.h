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

// By what things took on an H200, in microseconds: 128 columns of a tile, its results, what a cluster adds up, and what
// is added in memory.
struct ManyCost {
  int tokens;
  double step, results;
};
constexpr ManyCost MANY_COSTS[] = {{64, 0.24, 1.0}, {128, 0.3, 1.6}, {256, 0.585, 2.5}};
constexpr double SHARED = 1.8, ADDED_PER_US = 230e3, SPLIT = 5.0;

// Whether clusters of so many blocks, of which one fits on a multiprocessor, are all there at once. The groups of
// multiprocessors that a cluster lies in are not full of larger ones: of four, 32 took two rounds on 132.
inline bool at_once(long long tiles, int shares, int processors) {
  return shares <= 2 ? tiles * shares <= processors : 4 * tiles * shares <= 3 * processors;
}

// rows: tiles of 128 rows; steps: of 128 columns.
inline ManyPlan plan_many(int tokens, int rows, int steps, int processors) {
  ManyPlan best = {256, 0, 0};
  double least = 1e30;
  const auto consider = [&](const ManyPlan& plan, double time) {
    if (time < least) least = time, best = plan;
  };
  for (const ManyCost& cost : MANY_COSTS) {
    const long long tiles = static_cast<long long>(rows) * ((tokens + cost.tokens - 1) / cost.tokens);
    const int most = cost.tokens < 256 ? std::min(8, steps) : 0;
    for (int shares = 1; shares <= most && at_once(tiles, shares, processors); shares *= 2) {
      const double added = shares > 1 ? SHARED : 0.0;
      consider({cost.tokens, 0, shares}, (steps + shares - 1) / shares * cost.step + cost.results + added);
    }
    const long long rounds = tiles / processors, rest = tiles % processors;
    const double tile = steps * cost.step + cost.results, whole = static_cast<double>(rounds) * tile;
    const double added = static_cast<double>(rest + processors) * 128 * std::min(tokens, cost.tokens) / ADDED_PER_US;
    const double split = static_cast<double>(rest) * steps / processors * cost.step + added + SPLIT;
    consider({cost.tokens, 0, 0}, whole + (rest ? tile : 0.0));
    if (rest) consider({cost.tokens, static_cast<int>(rest), 0}, whole + split);
  }
  return best;
}

}  // namespace hfl
