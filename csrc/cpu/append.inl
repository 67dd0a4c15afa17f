// ops.append_pages for one row and KV head. Included by each_isa.h.

inline vec least_of(vec a, vec b) { return (a < b) | (a != a) ? a : b; }  // NaN stays, as in torch

inline vec most_of(vec a, vec b) { return (a > b) | (a != a) ? a : b; }

// The least and the largest of n floats.
inline void find_range(const float* x, int n, float* least, float* largest) {
  *least = *largest = x[0];
  int i = 0;
  if (n >= LANES) {
    vec low = load(x), high = low;
    for (; i + LANES <= n; i += LANES) {
      low = least_of(load(x + i), low);
      high = most_of(load(x + i), high);
    }
    for (int j = 0; j < LANES; ++j) {
      *least = low[j] < *least || low[j] != low[j] ? low[j] : *least;
      *largest = high[j] > *largest || high[j] != high[j] ? high[j] : *largest;
    }
  }
  for (; i < n; ++i) {
    *least = x[i] < *least || x[i] != x[i] ? x[i] : *least;
    *largest = x[i] > *largest || x[i] != x[i] ? x[i] : *largest;
  }
}

// As ops.encode_kv, with the same roundings in the same order; x is padded and becomes the payload as floats.
inline void encode(const Lines& to, int64_t slot, float* x) {
  const float steps = static_cast<float>((1 << to.bits) - 1);
  float least, largest;
  find_range(x, to.dim, &least, &largest);
  const float size = (-least > largest ? -least : largest) / 2048.0f, step = (largest - least) / steps;
  const float wide = step > size ? step : size;
  assign(to.scale + slot, wide > LEAST_HALF_NORMAL ? wide : LEAST_HALF_NORMAL);
  const float scale = value(to.scale[slot]);
  assign(to.zero + slot, -least / scale);
  const vec shift = all(12582912.0f), none = {}, most = all(steps), zero = all(value(to.zero[slot]));  // 1.5 * 2^23
  for (int c = 0; c < to.dim; c += LANES) {
    const vec y = load(x + c) / scale + zero, above = y < none ? none : y;
    store(x + c, ((above > most ? most : above) + shift) - shift);
  }
  uint8_t* payload = reinterpret_cast<uint8_t*>(to.data + slot * to.stride);
  for (int c = 0; to.bits == 8 && c < to.dim; ++c) payload[c] = static_cast<uint8_t>(static_cast<int>(x[c]));
  for (int c = 0; to.bits == 4 && c < to.dim; c += 2) {
    payload[c / 2] = static_cast<uint8_t>(static_cast<int>(x[c]) | static_cast<int>(x[c + 1]) << 4);
  }
}

inline void write_token(const Lines& to, int64_t slot, const void* from, float* work) {
  if (to.bits) {
    read_any(work, from, to.dtype, to.dim);
    encode(to, slot, work);
  } else {
    memcpy(to.data + slot * to.stride, from, static_cast<size_t>(to.dim * dtype_bytes(to.dtype)));
  }
}

inline void write_any(void* to, int64_t i, float x, int32_t dtype) {
  if (dtype == HFL_F32) assign(static_cast<float*>(to) + i, x);
  if (dtype == HFL_F16) assign(static_cast<half*>(to) + i, x);
  if (dtype == HFL_BF16) assign(static_cast<bfloat*>(to) + i, x);
}

// Bounds of the keys in slots `first` to `last`, as they are read.
inline void bound(const Lines& k, int64_t first, int64_t last, void* entry, float* work) {
  const int width = padded(k.dim);
  float *low = work + width, *high = work + 2 * width;
  read_tokens(low, k, &first, 1);
  memcpy(high, low, sizeof(float) * static_cast<size_t>(width));
  for (int64_t slot = first + 1; slot <= last; ++slot) {
    read_tokens(work, k, &slot, 1);
    for (int c = 0; c < width; c += LANES) {
      const vec x = load(work + c);
      store(low + c, least_of(x, load(low + c)));
      store(high + c, most_of(x, load(high + c)));
    }
  }
  for (int c = 0; c < k.dim; ++c) {
    write_any(entry, c, low[c], k.dtype);
    write_any(entry, k.dim + c, high[c], k.dtype);
  }
}

// work: 3 * padded(max(dim, v_dim)) floats.
inline void append_head(const hfl_append& a, int64_t b, int64_t h, float* work) {
  const Lines k(a.k, b, h, a.dtype, a.dim), v(a.v, b, h, a.dtype, a.v_dim);
  const int64_t* pos = a.pos + b * a.pos_b;
  int64_t last = -1;
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (pos[t] < 0) continue;
    const int64_t slot = slot_of(a, pos[t]);
    write_token(k, slot, at(a.fresh_k, b * a.fk_b + h * a.fk_h + t * a.fk_t, a.dtype), work);
    write_token(v, slot, at(a.fresh_v, b * a.fv_b + h * a.fv_h + t * a.fv_t, a.dtype), work);
    last = pos[t] > last ? pos[t] : last;
  }
  if (!a.bounds) return;
  for (int64_t t = 0, done = -1; t < a.tokens; ++t) {
    const int64_t block = pos[t] < 0 ? done : pos[t] / a.sub, end = (block + 1) * a.sub - 1;
    if (block == done) continue;
    done = block;
    void* entry = at(a.bounds, b * a.bounds_b + h * a.bounds_h + block * 2 * a.dim, a.dtype);
    bound(k, block * a.sub, end < last ? end : last, entry, work);
  }
}

inline void clear_token(const Lines& to, int64_t slot) {
  const int64_t bytes = to.bits ? int64_t{to.dim} * to.bits / 8 : int64_t{to.dim} * dtype_bytes(to.dtype);
  memset(to.data + slot * to.stride, 0, static_cast<size_t>(bytes));
  if (to.bits) to.scale[slot].bits = to.zero[slot].bits = 0;
}

// A token into `slot`, unless that is below 0, and what is then read of it to `read`, unless that is NULL.
// work: 2 * padded(dim) floats.
inline void fill_token(const Lines& to, int64_t slot, const void* from, void* read, float* work) {
  const int64_t bytes = int64_t{to.dim} * dtype_bytes(to.dtype), packed = int64_t{to.dim} * to.bits / 8, own = 0;
  if (!to.bits) {
    if (slot >= 0) memcpy(to.data + slot * to.stride, from, static_cast<size_t>(bytes));
    if (read) memcpy(read, from, static_cast<size_t>(bytes));
    return;
  }
  half sides[2];
  Lines one = to;
  one.data = reinterpret_cast<char*>(work + padded(to.dim)), one.scale = sides, one.zero = sides + 1;
  read_any(work, from, to.dtype, to.dim);
  encode(one, 0, work);
  if (slot >= 0) {
    memcpy(to.data + slot * to.stride, one.data, static_cast<size_t>(packed));
    to.scale[slot] = sides[0], to.zero[slot] = sides[1];
  }
  if (!read) return;
  read_tokens(work, one, &own, 1);
  for (int c = 0; c < to.dim; ++c) write_any(read, c, work[c], to.dtype);
}

// ops.fill_pages for the keys or the values of one row and KV head; work: 3 * padded(dim) floats.
inline void fill_head(const hfl_fill& f, int64_t b, int64_t h, bool keys, float* work) {
  const hfl_append& a = f.at;
  const Lines to(keys ? a.k : a.v, b, h, a.dtype, keys ? a.dim : a.v_dim);
  const int64_t* pos = a.pos ? a.pos + b * a.pos_b : nullptr;
  const int64_t head = f.heads ? f.heads[h] : h;
  const int64_t from = keys ? b * a.fk_b + head * a.fk_h : b * a.fv_b + head * a.fv_h;
  const int64_t out = keys ? b * f.rk_b + head * f.rk_h : b * f.rv_b + head * f.rv_h;
  void* read = keys ? f.read_k : f.read_v;
  int64_t count = pos ? 0 : a.tokens;
  while (pos && count < a.tokens && pos[count] >= 0) ++count;
  const int64_t start = pos ? pos[0] : 0, end = count ? start + count : 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const bool stays = t < count && (a.ring <= 0 || start + t < a.sink || start + t >= end - a.ring);
    const void* x = at(keys ? a.fresh_k : a.fresh_v, from + t * (keys ? a.fk_t : a.fv_t), a.dtype);
    void* value = read ? at(read, out + t * (keys ? f.rk_t : f.rv_t), a.dtype) : nullptr;
    fill_token(to, stays ? slot_of(a, start + t) : -1, x, value, work);
  }
  if (f.blank) {
    const int64_t used = a.ring > 0 && end > a.sink + a.ring ? a.sink + a.ring : end;
    for (int64_t slot = used; slot < a.capacity; ++slot) clear_token(to, slot);
  }
  if (!a.bounds || !keys) return;
  char* bounds = static_cast<char*>(at(a.bounds, b * a.bounds_b + h * a.bounds_h, a.dtype));
  for (int64_t entry = 0; entry < f.entries; ++entry) {
    const int64_t low = entry * a.sub, high = low + a.sub < end ? low + a.sub : end;
    void* into = at(bounds, entry * 2 * a.dim, a.dtype);
    if (count && high > start && low < end) {
      bound(to, low, high - 1, into, work);
    } else if (f.blank) {
      for (int c = 0; c < 2 * a.dim; ++c) write_any(into, c, c < a.dim ? INFINITY : -INFINITY, a.dtype);
    }
  }
}

// ops.decode_kv for one row and KV head; work: padded(dim) floats.
inline void decode_head(const hfl_decode& a, int64_t b, int64_t h, float* work) {
  const Lines from(a.x, b, h, a.dtype, a.dim);
  void* to = at(a.out, (b * a.kv_heads + h) * a.tokens * a.dim, a.dtype);
  for (int64_t slot = 0; slot < a.tokens; ++slot) {
    read_tokens(work, from, &slot, 1);
    for (int c = 0; c < a.dim; ++c) write_any(to, slot * a.dim + c, work[c], a.dtype);
  }
}
