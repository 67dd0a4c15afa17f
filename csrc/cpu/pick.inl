// ops.pick_blocks for one row of scores. Included by each_isa.h.

// Scores as whole numbers of the same order, then zeros up to a whole vector; of -inf it is more than zero.
inline void rank_scores(const float* scores, int64_t n, uint32_t* ranks) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t left = n - i;
    vec x = {};
    memcpy(&x, scores + i, left < LANES ? static_cast<size_t>(left) * 4 : sizeof x);
    const words bits = (words)(x != x ? all(-__builtin_inff()) : x + 0.0f);  // -0 becomes 0
    const words rank = bits ^ ((words)((ints)bits >> 31) | 0x80000000u);
    memcpy(ranks + i, &rank, sizeof rank);
    for (int64_t j = left; j < LANES; ++j) ranks[i + j] = 0;
  }
}

// How many ranks are at least `least`, which is not 0.
inline int64_t count_from(const uint32_t* ranks, int64_t n, uint32_t least) {
  words counts = {};
  for (int64_t i = 0; i < n; i += LANES) counts -= (words)(raw<words>(ranks + i) >= least);
  int64_t count = 0;
  for (int i = 0; i < LANES; ++i) count += counts[i];
  return count;
}

// The largest number that at least `take` of the ranks reach, found bit by bit, or one that just as many reach.
inline uint32_t find_least(const uint32_t* ranks, int64_t n, int64_t take) {
  uint32_t least = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    const int64_t count = count_from(ranks, n, least | bit);
    if (count >= take) least |= bit;
    if (count == take) break;
  }
  return least;
}

inline void pick_row(const hfl_pick& a, int64_t row, uint32_t* ranks) {
  const int64_t b = row / (int64_t{a.heads} * a.queries), n = row % a.queries;
  const int64_t low = a.low[b * a.low_b + n], after = a.high[b * a.high_b + n];
  const int64_t end = after < a.blocks ? after + 1 : a.blocks;  // no block from here on
  const int64_t first = a.sink < end ? a.sink : end;            // candidates are from here on,
  const int64_t last = low < first ? first : low < end ? low : end;  // and before this one
  const int64_t count = last - first, take = a.take < count ? a.take : count;
  uint32_t least = 0;
  int64_t ties = count;  // candidates of the least rank that are taken
  if (take < count) {
    rank_scores(a.scores + row * a.blocks + first, count, ranks);
    least = take > 0 ? find_least(ranks, count, take) : ~0u;
    ties = take > 0 && least < ~0u ? take - count_from(ranks, count, least + 1) : 0;
  } else {
    memset(ranks, 0, sizeof(uint32_t) * static_cast<size_t>(count));
  }
  int32_t *to = a.ids + row * a.chosen, *const full = to + a.chosen;
  for (int64_t j = 0; j < first && to < full; ++j) *to++ = static_cast<int32_t>(j);
  for (int64_t j = 0; j < count && to < full; ++j) {
    const bool tied = ranks[j] == least, picked = ranks[j] > least || (tied && ties > 0);
    ties -= tied;
    *to = static_cast<int32_t>(first + j);
    to += picked;
  }
  for (int64_t j = last; j < end && to < full; ++j) *to++ = static_cast<int32_t>(j);
  while (to < full) *to++ = -1;
}
