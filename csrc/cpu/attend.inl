// One task of ops.attend_pages: an online softmax over some columns. Included by each_isa.h.

// Columns of a tile that some query sees; bit t of `seen` and of `before`: for query t, seen, and of the lap before.
struct Tile {
  int64_t columns[TILE], pos[TILE];
  uint8_t seen[TILE], before[TILE];
  bool sink[TILE];
  int count;
  uint8_t whole;  // queries that see every column
};

inline uint8_t seeing(const hfl_attend& a, const Item& it, int64_t pos) {
  unsigned bits = 0;
  for (int t = 0; t < it.queries; ++t) {
    const int64_t far = it.pos[t] - pos;
    const bool seen = pos >= 0 && far >= 0 && (it.ids || a.window < 0 || pos < a.sink || far < a.window);
    bits |= static_cast<unsigned>(seen) << t;
  }
  return static_cast<uint8_t>(bits);
}

inline void add_column(const hfl_attend& a, const Item& it, Tile* tile, int64_t column, int64_t pos) {
  const uint8_t seen = seeing(a, it, pos);
  if (!seen) return;
  tile->columns[tile->count] = column;
  tile->pos[tile->count] = pos;
  tile->seen[tile->count++] = seen;
  tile->whole &= seen;
}

// Fills a tile from column i of the item on; returns the first column that is left.
inline int64_t gather(const hfl_attend& a, const Item& it, Tile* tile, int64_t i, int64_t last) {
  tile->count = 0;
  tile->whole = 0xff;
  if (!it.ids) {
    const int64_t* k_pos = a.k_pos ? a.k_pos + it.b * a.k_pos_b : nullptr;
    for (; i < last && tile->count < TILE; ++i) {
      const int64_t column = i < it.first ? i : i - it.first + it.jump;
      add_column(a, it, tile, column, k_pos ? k_pos[column] : column);
    }
    return i;
  }
  int64_t place = i / a.block, within = i % a.block;
  for (; i < last && tile->count < TILE; ++i) {
    const int64_t page = it.pages ? it.pages[place] : it.ids[place], column = page * a.block + within;
    if (column >= 0 && column < a.stored) add_column(a, it, tile, column, it.ids[place] * int64_t{a.block} + within);
    if (++within == a.block) {
      within = 0;
      ++place;
    }
  }
  return i;
}

inline int64_t laps(const hfl_attend& a, int64_t pos) { return pos > a.offset ? (pos - a.offset) / a.lap : 0; }

// For turned queries: which of the three each column is read by. Returns bits: 1 as it is, 2 before, 4 sinks.
inline int sort_columns(const hfl_attend& a, const Item& it, Tile* tile) {
  int64_t own[FEW];
  for (int t = 0; t < it.queries; ++t) own[t] = laps(a, it.pos[t]);
  const unsigned everyone = (1u << it.queries) - 1;
  int kinds = 0;
  for (int j = 0; j < tile->count; ++j) {
    const int64_t lap = laps(a, tile->pos[j]);
    unsigned bits = 0;
    for (int t = 0; t < it.queries; ++t) bits |= static_cast<unsigned>(own[t] > lap) << t;
    tile->before[j] = static_cast<uint8_t>(bits);
    tile->sink[j] = a.q_sinks && !it.ids && tile->pos[j] < a.sink;
    kinds |= tile->sink[j] ? 4 : (bits != everyone ? 1 : 0) | (bits ? 2 : 0);
  }
  return kinds;
}

// Products of every query row and column, each by the query turned as the column wants it.
inline void products(const hfl_attend& a, const Item& it, const Desk& desk, Tile* tile) {
  const int64_t width = padded(a.dim), each = it.rows() * width;
  const int n = (tile->count + 3) / 4 * 4;
  const int kinds = a.q_before ? sort_columns(a, it, tile) : 1;
  float* to = desk.logits;
  for (int kind = 0; kind < 3; ++kind) {
    if (!(kinds >> kind & 1)) continue;
    dots(to, TILE, desk.q + kind * each, it.rows(), desk.tokens, n, width);
    for (int row = 0; to == desk.other && row < it.rows(); ++row) {
      for (int j = 0; j < tile->count; ++j) {
        const int wanted = tile->sink[j] ? 2 : tile->before[j] >> row % it.queries & 1;
        if (wanted == kind) desk.logits[row * TILE + j] = to[row * TILE + j];
      }
    }
    to = desk.other;
  }
}

// From products to weights, in place; brings the row's largest logit and sum up to date and returns the factor for what
// was summed before.
inline float weigh_row(const hfl_attend& a, const Item& it, const Tile& tile, int row, float* x, float* top,
                       float* total) {
  if (a.softcap > 0) {
    for (int j = 0; j < TILE; j += LANES) store(x + j, tanh_of(load(x + j) / a.softcap) * a.softcap);
  }
  const int t = row % it.queries;
  if (a.slopes) {
    const float slope = a.slopes[it.first_head + row / it.queries];
    for (int j = 0; j < tile.count; ++j) x[j] += slope * static_cast<float>(tile.pos[j] - it.pos[t]);
  }
  if (!(tile.whole >> t & 1)) {
    for (int j = 0; j < tile.count; ++j) {
      if (!(tile.seen[j] >> t & 1)) x[j] = -__builtin_inff();
    }
  }
  for (int j = tile.count; j < TILE; ++j) x[j] = -__builtin_inff();
  vec most = load(x);
  for (int j = LANES; j < TILE; j += LANES) most = larger(most, load(x + j));
  float largest = *top;
  for (int i = 0; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
  const float base = largest == -__builtin_inff() ? 0.0f : largest;
  vec sum = {};
  for (int j = 0; j < TILE; j += LANES) {
    const vec weight = exp_of(load(x + j) - base);
    store(x + j, weight);
    sum += weight;
  }
  float sums[4], factor = exp_of(all(*top - base))[0];
  sum4(sums, sum, sum, sum, sum);
  *total = *total * factor + sums[0];
  *top = largest;
  return factor;
}

template <int NQ, int NV>
inline void add_values(float* out, int64_t width, const float* weights, const float* factors, const float* v, int n) {
  vec sums[NQ][NV];
#pragma GCC unroll 4
  for (int i = 0; i < NQ; ++i) {
#pragma GCC unroll 4
    for (int m = 0; m < NV; ++m) sums[i][m] = load(out + i * width + m * LANES) * factors[i];
  }
  for (int j = 0; j < n; ++j, v += width) {
    vec x[NV];
#pragma GCC unroll 4
    for (int m = 0; m < NV; ++m) x[m] = load(v + m * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < NQ; ++i) {
      const vec weight = all(weights[i * TILE + j]);
#pragma GCC unroll 4
      for (int m = 0; m < NV; ++m) sums[i][m] += x[m] * weight;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NQ; ++i) {
#pragma GCC unroll 4
    for (int m = 0; m < NV; ++m) store(out + i * width + m * LANES, sums[i][m]);
  }
}

template <int NQ>
inline void add_rows(float* out, int64_t width, const float* weights, const float* factors, const float* v, int n) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) add_values<NQ, 4>(out + c, width, weights, factors, v + c, n);
  for (; c < width; c += LANES) add_values<NQ, 1>(out + c, width, weights, factors, v + c, n);
}

inline void read_queries(const hfl_attend& a, const Item& it, float* to) {
  const void* kinds[3] = {a.q, a.q_before, a.q_sinks};
  const int64_t width = padded(a.dim);
  for (const void* q : kinds) {
    for (int row = 0; row < it.rows(); ++row, to += width) {
      if (!q) continue;
      const int64_t head = it.first_head + row / it.queries, t = it.first_query + row % it.queries;
      read_any(to, at(q, it.b * a.q_b + head * a.q_h + t * a.q_t, a.dtype), a.dtype, a.dim);
      for (int64_t c = 0; c < width; ++c) to[c] *= a.scale;
    }
  }
}

// Columns `i` to `last - 1` of the item.
inline void attend_part(const hfl_attend& a, const Item& it, int64_t i, int64_t last, const Desk& desk,
                        const Sums& sums) {
  const Lines k(a.k, it.b, it.kv_head, a.dtype, a.dim), v(a.v, it.b, it.kv_head, a.dtype, a.v_dim);
  const int64_t width = padded(a.dim), v_width = padded(a.v_dim);
  const int rows = it.rows();
  read_queries(a, it, desk.q);
  memset(sums.out, 0, sizeof(float) * static_cast<size_t>(rows * v_width));
  memset(sums.total, 0, sizeof(float) * static_cast<size_t>(rows));
  for (int row = 0; row < rows; ++row) sums.top[row] = -__builtin_inff();
  Tile tile;
  for (i = gather(a, it, &tile, i, last); tile.count; i = gather(a, it, &tile, i, last)) {
    read_tokens(desk.tokens, k, tile.columns, tile.count);
    const int missing = -tile.count & 3;
    memset(desk.tokens + tile.count * width, 0, sizeof(float) * static_cast<size_t>(missing * width));
    products(a, it, desk, &tile);
    read_tokens(desk.tokens, v, tile.columns, tile.count);
    float factors[4];
    for (int row = 0, some; row < rows; row += some) {
      some = LANES == 16 && row + 4 <= rows ? 4 : row + 2 <= rows ? 2 : 1;
      float* weights = desk.logits + row * TILE;
      for (int r = 0; r < some; ++r) {
        factors[r] = weigh_row(a, it, tile, row + r, weights + r * TILE, sums.top + row + r, sums.total + row + r);
      }
      float* out = sums.out + row * v_width;
      if (some == 4) add_rows<4>(out, v_width, weights, factors, desk.tokens, tile.count);
      if (some == 2) add_rows<2>(out, v_width, weights, factors, desk.tokens, tile.count);
      if (some == 1) add_rows<1>(out, v_width, weights, factors, desk.tokens, tile.count);
    }
  }
}
