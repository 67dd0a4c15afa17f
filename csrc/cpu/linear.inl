// linear.quantize_tokens of a row, and what linear.w4a8_linear does with 16 rows of a weight. Included by each_isa.h.

// To whole numbers, halves to the even one.
inline ints nearest(vec x) {
#if HFL_LANES == 16
  return (ints)_mm512_maskz_cvtps_epi32(ALL, (__m512)x);
#elif HFL_LANES == 8
  return (ints)_mm256_cvtps_epi32((__m256)x);
#else
  ints out;
  for (int i = 0; i < LANES; ++i) out[i] = static_cast<int32_t>(nearbyintf(x[i]));
  return out;
#endif
}

// x: K floats, padded with zeros; values as in the definition. Returns the largest size; what is not finite, if one is.
inline float largest_of(const float* x, int n) {
  vec most = {}, strange = {};
  for (int i = 0; i < padded(n); i += LANES) {
    const vec y = load(x + i);
    most = larger(y < vec{} ? -y : y, most);
    strange += y - y;  // not a number where y is not finite
  }
  float out = 0;
  for (int i = 0; i < LANES; ++i) out = most[i] > out || strange[i] != strange[i] ? most[i] + strange[i] : out;
  return out;
}

inline int32_t write_values(int8_t* to, const float* x, float up, int n) {
  ints sums = {};
  alignas(64) int32_t part[LANES];
  for (int i = 0; i < n; i += LANES) {
    const ints y = up == 0 ? ints{} : nearest(load(x + i) * up);
    sums += y;  // behind the last there are zeros
    memcpy(part, &y, sizeof part);
    for (int j = 0; j < LANES && i + j < n; ++j) to[i + j] = static_cast<int8_t>(part[j]);
  }
  int32_t sum = 0;
  for (int j = 0; j < LANES; ++j) sum += sums[j];
  return sum;
}

inline void quantize_row(const hfl_quantize& a, int64_t row, float* x) {
  read_any(x, at(a.x, row * a.x_row, a.dtype), a.dtype, a.columns);
  const float most = largest_of(x, a.columns);
  const bool finite = most - most == 0;
  const float up = !finite || most < 0x1p-100f ? 0 : 127.0f / most;
  a.sums[row] = write_values(a.values + row * a.columns, x, up, a.columns);
  a.scale[row] = finite ? most / 127.0f : of_bits(0x7fc00000);
}

// 16 rows of a weight as unsigned bytes: for each pair of rows g and g + 8, and each run of 64 columns, two vectors of
// 64 bytes. to: [8, runs, 2, 64].
inline void expand_strip(uint8_t* to, const hfl_linear& a, int64_t panel, int strip) {
  const int64_t runs = (a.columns + 127) / 128 * 2, chunks = a.bits == 8 ? runs : runs / 2;
  const uint8_t* codes = a.codes + panel * chunks * 4096 + strip * 1024;
  for (int64_t run = 0; run < runs; ++run) {
    const uint8_t* from = codes + (a.bits == 8 ? run * 4096 : run / 2 * 4096 + run % 2 * 512);
    for (int g = 0; g < 8; ++g) {
      uint8_t* vectors = to + (g * runs + run) * 128;
      if (a.bits == 8) {
        memcpy(vectors, from + g * 64, 64);
        memcpy(vectors + 64, from + 512 + g * 64, 64);
        continue;
      }
      uint32_t scale[16], zero[16];  // of words 4t + 2j + h
      for (int i = 0; i < 16; ++i) {
        scale[i] = 1, zero[i] = 0;
        if (!a.group) continue;
        const int64_t group = (run * 64 + i / 2 % 2 * 32) / a.group, groups = runs * 64 / a.group;
        const uint8_t* pair = a.groups + ((panel * groups + group) * 64 + strip * 16 + g * 2 + i % 2) * 2;
        scale[i] = pair[0], zero[i] = pair[1] * 0x01010101u;
      }
      for (int i = 0; i < 16; i += LANES) {
        const words x = raw<words>(from + g * 64 + i * 4), s = raw<words>(scale + i), z = raw<words>(zero + i);
        const words low = (x & 0x0f0f0f0fu) * s + z, high = (x >> 4 & 0x0f0f0f0fu) * s + z;
        memcpy(vectors + i * 4, &low, sizeof low);
        memcpy(vectors + 64 + i * 4, &high, sizeof high);
      }
    }
  }
}

// Sums of products of two rows of a strip with a token: bytes w and x in vectors of 64, in which words of both rows
// take turns.
inline void multiply_rows(int32_t* to, const uint8_t* w, const int8_t* x, int64_t vectors) {
#if HFL_LANES == 16
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < vectors * 2; ++i) {
    const __m512i a = _mm512_maskz_cvtepu8_epi16(~__mmask32{0}, raw<__m256i>(w + i * 32));
    const __m512i b = _mm512_maskz_cvtepi8_epi16(~__mmask32{0}, raw<__m256i>(x + i * 32));
    sums = _mm512_maskz_add_epi32(ALL, sums, _mm512_maskz_madd_epi16(ALL, a, b));
  }
  alignas(64) int32_t part[16];
  memcpy(part, &sums, sizeof part);
#elif HFL_LANES == 8
  __m256i sums = _mm256_setzero_si256();
  for (int64_t i = 0; i < vectors * 4; ++i) {
    const __m256i a = _mm256_cvtepu8_epi16(raw<__m128i>(w + i * 16));
    const __m256i b = _mm256_cvtepi8_epi16(raw<__m128i>(x + i * 16));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
  }
  alignas(32) int32_t part[8];
  memcpy(part, &sums, sizeof part);
#else
  int32_t part[4] = {};
  for (int64_t i = 0; i < vectors * 8; ++i, w += 8, x += 8) {
    for (int j = 0; j < 4; ++j) part[j] += w[2 * j] * x[2 * j] + w[2 * j + 1] * x[2 * j + 1];
  }
#endif
  to[0] = to[1] = 0;
  for (int i = 0; i < LANES; ++i) to[i / 2 % 2] += part[i];  // a sum is of two bytes, a word of four
}
