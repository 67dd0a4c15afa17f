// Which tiles are computed for many tokens: how many tokens they have, and who shares them. Up to 256 tokens groups of
// warps and two blocks may share the columns of one; of more, those of a last round, in which some multiprocessors
// would have none, are split along K.
#pragma once
#include <algorithm>

namespace hfl {

struct ManyPlan {
  int tokens;       // of a tile
  int split_tiles;  // how many of all are split
  int shares;       // blocks of a cluster for each tile; 0: a block computes one tile after the other
  int panels;       // of 64 rows, of a tile of linear_wide.cuh; 0: linear_many.cuh; 4 that are shared: linear_pair.cuh
};

// By what things took on an H200, in microseconds. Of linear_many.cuh: 128 columns of a tile, its results, and what is
// added in memory.
struct ManyCost {
  int tokens;
  double step, results;
};
constexpr ManyCost MANY_COSTS[] = {{128, 0.3, 1.6}, {256, 0.585, 2.5}};
constexpr double ADDED_PER_US = 230e3, SPLIT = 5.0;
// Of linear_wide.cuh: 128 columns of a tile, of one panel and of each more; what comes before the first product and
// after the last; and what another block adds to that.
struct WideCost {
  int tokens, panels;
  double step, more, around;
};
constexpr WideCost ALONE_COSTS[] = {{16, 4, 0.25, 0.06, 1.0}, {64, 4, 0.25, 0.073, 1.0}, {128, 4, 0.35, 0.125, 1.6}};
constexpr WideCost SHARED_COSTS[] = {
    {16, 1, 0.09, 0.0, 1.3}, {64, 1, 0.11, 0.0, 1.5}, {64, 2, 0.205, 0.0, 1.4}, {128, 2, 0.31, 0.0, 2.2}};
constexpr double OTHER = 0.9, PAIRED = 1.3;
constexpr int MOST_WIDE = 256;  // tokens

// Of linear_wide.cuh; tokens is 0 where no plan fits.
inline ManyPlan plan_wide(int tokens, int panels, int steps, int processors) {
  ManyPlan best = {};
  double least = 1e30;
  const auto consider = [&](const ManyPlan& plan, double time) {
    if (time < least) least = time, best = plan;
  };
  for (const WideCost& cost : ALONE_COSTS) {
    if ((cost.tokens == 16) != (tokens <= 16)) continue;
    const int token_tiles = (tokens + cost.tokens - 1) / cost.tokens;
    const int blocks = std::min(panels, processors / token_tiles);
    if (!blocks) continue;
    const int most = (panels + blocks - 1) / blocks, tiles = (most + cost.panels - 1) / cost.panels;
    const double step = tiles * (cost.step - cost.more) + most * cost.more;
    consider({cost.tokens, 0, 0, cost.panels}, steps * step + tiles * cost.around);
    const int pairs = processors / 2, both = pairs ? (panels + pairs - 1) / pairs : 0;
    if (tokens <= 64 && cost.tokens <= 64 && both >= 2 && both <= 8 && panels >= 2 * pairs && steps >= 4) {
      consider({cost.tokens, 0, 2, cost.panels}, steps * (cost.step + (both / 2.0 - 1) * cost.more) + PAIRED);
    }
  }
  for (const WideCost& cost : SHARED_COSTS) {
    if ((cost.tokens == 16) != (tokens <= 16)) continue;
    const int token_tiles = (tokens + cost.tokens - 1) / cost.tokens;
    const long long tiles = (panels + cost.panels - 1LL) / cost.panels * token_tiles;
    for (int shares = 1; shares <= std::min(2, steps) && tiles * shares <= processors; ++shares) {
      const double around = cost.around + (shares - 1) * OTHER;
      consider({cost.tokens, 0, shares, cost.panels}, (steps + shares - 1) / shares * cost.step + around);
    }
  }
  return best;
}

// panels: of 64 rows; steps: of 128 columns.
inline ManyPlan plan_many(int tokens, int panels, int steps, int processors) {
  ManyPlan best = tokens <= MOST_WIDE ? plan_wide(tokens, panels, steps, processors) : ManyPlan{};
  if (best.tokens) return best;
  double least = 1e30;
  const auto consider = [&](const ManyPlan& plan, double time) {
    if (time < least) least = time, best = plan;
  };
  for (const ManyCost& cost : MANY_COSTS) {
    const long long tiles = (panels + 1LL) / 2 * ((tokens + cost.tokens - 1) / cost.tokens);
    const long long rounds = tiles / processors, rest = tiles % processors;
    const double tile = steps * cost.step + cost.results, whole = static_cast<double>(rounds) * tile;
    const double added = static_cast<double>(rest + processors) * 128 * std::min(tokens, cost.tokens) / ADDED_PER_US;
    const double split = static_cast<double>(rest) * steps / processors * cost.step + added + SPLIT;
    consider({cost.tokens, 0, 0, 0}, whole + (rest ? tile : 0.0));
    if (rest) consider({cost.tokens, static_cast<int>(rest), 0, 0}, whole + split);
  }
  return best;
}

}  // namespace hfl
