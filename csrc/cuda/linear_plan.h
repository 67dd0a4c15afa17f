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
constexpr ManyCost MANY_COSTS[] = {{32, 0.17, 0.8}, {64, 0.2, 1.0}, {128, 0.3, 1.5}, {256, 0.585, 2.5}};
constexpr double SHARED = 1.8, ADDED_PER_US = 230e3, SPLIT = 3.0;

// Whether clusters of so many blocks are all there at once, one block on a multiprocessor. Those of three and more do
// not fill the groups of multiprocessors that they come from: of 132 not all take part.
inline bool at_once(long long tiles, int shares, int processors) {
  const long long blocks = tiles * shares;
  return shares <= 2 ? blocks <= processors : shares == 3 ? 8 * blocks <= 7 * processors : 4 * blocks <= 3 * processors;
}

// rows: tiles of 128 rows; steps: of 128 columns.
inline ManyPlan plan_many(int tokens, int rows, int steps, int processors) {
  ManyPlan best = {256, 0, 0};
  double least = 1e30;
  for (const ManyCost& cost : MANY_COSTS) {
    const long long tiles = static_cast<long long>(rows) * ((tokens + cost.tokens - 1) / cost.tokens);
    for (int shares : {1, 2, 3, 4, 8}) {
      if (shares > steps || !at_once(tiles, shares, processors)) continue;
      const double time = (steps + shares - 1) / shares * cost.step + cost.results + (shares > 1 ? SHARED : 0.0);
      if (time < least) least = time, best = {cost.tokens, 0, shares};
    }
    if (cost.tokens < 64) continue;
    const long long rounds = tiles / processors, rest = tiles % processors;
    const double tile = steps * cost.step + cost.results;
    const double added = static_cast<double>(rest + processors) * 128 * std::min(tokens, cost.tokens) / ADDED_PER_US;
    const double split = static_cast<double>(rest) * steps / processors * cost.step + added + SPLIT;
    const double time = static_cast<double>(rounds) * tile + (rest == 0 ? 0.0 : std::min(tile, split));
    if (time < least) least = time, best = {cost.tokens, rest != 0 && split < tile ? static_cast<int>(rest) : 0, 0};
  }
  return best;
}

}  // namespace hfl
