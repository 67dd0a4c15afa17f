// One task of ops.score_pages: scores of some blocks. Included by each_isa.h.

// Rows that entries are multiplied with: the query; with bounds its negative part, for the least values, and then its
// positive part, for the largest.
inline void read_factors(const hfl_score& a, int64_t b, int64_t first_head, int heads, float* to) {
  const int64_t width = padded(a.vectors * a.dim);
  for (int64_t head = first_head; head < first_head + heads; ++head) {
    for (int64_t t = 0; t < a.tokens; ++t, to += width) {
      read_any(to, at(a.q, b * a.q_b + head * a.q_h + t * a.q_t, a.dtype), a.dtype, a.dim);
      for (int c = 0; a.vectors == 2 && c < a.dim; ++c) {
        const float x = to[c];
        to[c] = x < 0 ? x : 0;
        to[a.dim + c] = x < 0 ? 0 : x;
      }
      for (int64_t c = a.vectors * a.dim; c < width; ++c) to[c] = 0;
    }
  }
}

// The largest score among the sub-blocks of blocks `first` to `last - 1`, for the G query heads of a KV head.
inline void score_blocks(const hfl_score& a, int64_t b, int64_t kv_head, int64_t first, int64_t last,
                         const ScoreDesk& desk) {
  const int group = a.q_heads / a.kv_heads, rows = group * a.tokens, length = a.vectors * a.dim;
  const int64_t width = padded(length), end = last * a.subs < a.entries ? last * a.subs : a.entries;
  read_factors(a, b, kv_head * group, group, desk.q);
  for (int64_t i = 0; i < rows * (last - first); ++i) desk.best[i] = -__builtin_inff();
  for (int64_t entry = first * a.subs; entry < end; entry += ENTRIES) {
    const int n = static_cast<int>(end - entry < ENTRIES ? end - entry : ENTRIES), whole = (n + 3) / 4 * 4;
    for (int j = 0; j < n; ++j) {
      const int64_t offset = b * a.s_b + kv_head * a.s_h + (entry + j) * length;
      read_any(desk.entries + j * width, at(a.summary, offset, a.dtype), a.dtype, length);
    }
    memset(desk.entries + n * width, 0, sizeof(float) * static_cast<size_t>((whole - n) * width));
    dots(desk.products, ENTRIES, desk.q, rows, desk.entries, whole, width);
    for (int j = 0; j < n; ++j) {
      const float* bounds = desk.entries + j * width;
      if (a.vectors == 2 && bounds[0] > bounds[a.dim]) continue;  // no key
      float* best = desk.best + (entry + j) / a.subs - first;
      for (int row = 0; row < rows; ++row, best += last - first) {
        const float x = desk.products[row * ENTRIES + j];
        *best = x > *best ? x : *best;
      }
    }
  }
}
