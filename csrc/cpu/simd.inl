// Vectors of HFL_LANES floats, rows of either format as floats, and products of rows. Included by each_isa.h, several
// times, each time in another namespace and for another instruction set.

constexpr int LANES = HFL_LANES;
constexpr int PAD = 16;  // rows of floats are padded with zeros to a multiple of this

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t shorts __attribute__((vector_size(LANES * 2)));

#if HFL_LANES == 16
constexpr __mmask16 ALL = 0xffff;  // intrinsics without a mask read a variable that gcc 12 finds uninitialized
#endif

inline int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

inline vec all(float x) { return x - vec{}; }

inline vec larger(vec a, vec b) { return a > b ? a : b; }

template <class V>
inline V raw(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline vec load(const float* from) { return raw<vec>(from); }

// What is not in the language of vectors, or what gcc would take apart: 16-bit numbers, float16, bytes, and half bytes
// (the low half first), as many as there are lanes.
#if HFL_LANES == 16
inline words widen(const uint16_t* from) { return (words)_mm512_maskz_cvtepu16_epi32(ALL, raw<__m256i>(from)); }

inline vec load(const half* from) { return (vec)_mm512_maskz_cvtph_ps(ALL, raw<__m256i>(from)); }

inline vec floats(__m128i x) { return (vec)_mm512_maskz_cvtepi32_ps(ALL, _mm512_maskz_cvtepu8_epi32(ALL, x)); }

inline vec load_bytes(const uint8_t* from) { return floats(raw<__m128i>(from)); }

inline __m128i few_bytes(const uint8_t* from) { return _mm_cvtsi64_si128(raw<int64_t>(from)); }
#elif HFL_LANES == 8
inline words widen(const uint16_t* from) { return (words)_mm256_cvtepu16_epi32(raw<__m128i>(from)); }

inline vec load(const half* from) { return (vec)_mm256_cvtph_ps(raw<__m128i>(from)); }

inline vec floats(__m128i x) { return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)); }

inline vec load_bytes(const uint8_t* from) { return floats(_mm_cvtsi64_si128(raw<int64_t>(from))); }

inline __m128i few_bytes(const uint8_t* from) { return _mm_cvtsi32_si128(raw<int32_t>(from)); }
#else
inline words widen(const uint16_t* from) { return __builtin_convertvector(raw<shorts>(from), words); }

inline vec load(const half* from) { return vec{value(from[0]), value(from[1]), value(from[2]), value(from[3])}; }

inline vec floats(words x) { return __builtin_convertvector((ints)x, vec); }

inline vec load_bytes(const uint8_t* from) { return floats(words{from[0], from[1], from[2], from[3]}); }
#endif

inline vec load_half_bytes(const uint8_t* from) {
#if HFL_LANES == 4
  const uint32_t a = from[0], b = from[1];
  return floats(words{a & 15, a >> 4, b & 15, b >> 4});
#else
  const __m128i pairs = _mm_cvtepu8_epi16(few_bytes(from));
  return floats(_mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi16(0x0f0f)));
#endif
}

inline vec load(const bfloat* from) { return (vec)(widen(reinterpret_cast<const uint16_t*>(from)) << 16); }

inline void store(float* to, vec x) { memcpy(to, &x, sizeof x); }

// Payloads from channel i on.
template <int BITS>
inline vec payload(const uint8_t* from, int i) {
  return BITS == 8 ? load_bytes(from + i) : load_half_bytes(from + i / 2);
}

// As the dtype holds it.
inline vec rounded(vec x, const float*) { return x; }

inline vec rounded(vec x, const bfloat*) {
  const words w = (words)x;
  return (vec)((w + 0x7fff + (w >> 16 & 1)) & 0xffff0000u);
}

inline vec rounded(vec x, const half*) {
#if HFL_LANES == 16
  return (vec)_mm512_maskz_cvtph_ps(ALL, _mm512_maskz_cvtps_ph(ALL, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif HFL_LANES == 8
  return (vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; ++i) {
    half h;
    assign(&h, x[i]);
    x[i] = value(h);
  }
  return x;
#endif
}

template <class T>
inline void read_row(float* to, const T* from, int n) {
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = value(from[i]);
  for (; i < padded(n); ++i) to[i] = 0;
}

template <class T, int BITS>
inline void decode_row(float* to, const uint8_t* from, float scale, float zero, int n) {
  const T* dtype = nullptr;
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, rounded((payload<BITS>(from, i) - zero) * scale, dtype));
  for (; i < n; ++i) {
    const int p = BITS == 8 ? from[i] : from[i / 2] >> i % 2 * 4 & 15;
    T x;
    assign(&x, (static_cast<float>(p) - zero) * scale);
    to[i] = value(x);
  }
  for (; i < padded(n); ++i) to[i] = 0;
}

template <class T>
inline void read_tokens(float* to, const Lines& x, const int64_t* columns, int n) {
  const int64_t width = padded(x.dim);
  for (int j = 0; j < n; ++j, to += width) {
    const int64_t c = columns[j];
    const uint8_t* from = reinterpret_cast<const uint8_t*>(x.data + c * x.stride);
    if (x.bits == 0) {
      read_row(to, reinterpret_cast<const T*>(from), x.dim);
    } else if (x.bits == 8) {
      decode_row<T, 8>(to, from, value(x.scale[c]), value(x.zero[c]), x.dim);
    } else {
      decode_row<T, 4>(to, from, value(x.scale[c]), value(x.zero[c]), x.dim);
    }
  }
}

// Some tokens as floats: [n, padded(dim)].
inline void read_tokens(float* to, const Lines& x, const int64_t* columns, int n) {
  if (x.dtype == HFL_F32) return read_tokens<float>(to, x, columns, n);
  if (x.dtype == HFL_F16) return read_tokens<half>(to, x, columns, n);
  return read_tokens<bfloat>(to, x, columns, n);
}

// A row of a tensor of the dtype.
inline void read_any(float* to, const void* from, int32_t dtype, int n) {
  if (dtype == HFL_F32) return read_row(to, static_cast<const float*>(from), n);
  if (dtype == HFL_F16) return read_row(to, static_cast<const half*>(from), n);
  return read_row(to, static_cast<const bfloat*>(from), n);
}

// The sums of four vectors.
inline void sum4(float* to, vec a, vec b, vec c, vec d) {
#if HFL_LANES == 4
  for (int i = 0; i < 4; ++i) to[i] = i == 0 ? a[0] : i == 1 ? b[0] : i == 2 ? c[0] : d[0];
  for (int i = 1; i < 4; ++i) {
    to[0] += a[i];
    to[1] += b[i];
    to[2] += c[i];
    to[3] += d[i];
  }
#else
  __m256 part[4];
  const vec all4[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
#if HFL_LANES == 16
    const __m512 x = (__m512)all4[i];
    part[i] = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, x, 0), _mm512_maskz_extractf32x8_ps(0xff, x, 1));
#else
    part[i] = (__m256)all4[i];
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#endif
}

template <int NQ>
inline void dot_rows(float* to, int64_t stride, const float* q, const float* k, int n, int64_t width) {
  for (int j = 0; j < n; j += 4, k += 4 * width) {
    vec sums[NQ][4] = {};
    for (int64_t c = 0; c < width; c += LANES) {
      const vec keys[4] = {load(k + c), load(k + width + c), load(k + 2 * width + c), load(k + 3 * width + c)};
#pragma GCC unroll 4
      for (int i = 0; i < NQ; ++i) {
        const vec x = load(q + i * width + c);
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) sums[i][m] += x * keys[m];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NQ; ++i) sum4(to + i * stride + j, sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
  }
}

// Products of `queries` rows and n rows, n a multiple of 4, all padded to `width`: to[i * stride + j] = q_i . k_j.
inline void dots(float* to, int64_t stride, const float* q, int queries, const float* k, int n, int64_t width) {
  int i = 0;
  if (LANES == 16) {
    for (; i + 4 <= queries; i += 4) dot_rows<4>(to + i * stride, stride, q + i * width, k, n, width);
  }
  for (; i + 2 <= queries; i += 2) dot_rows<2>(to + i * stride, stride, q + i * width, k, n, width);
  if (i < queries) dot_rows<1>(to + i * stride, stride, q + i * width, k, n, width);
}

// e^x to an ulp or two; 0 below the least normal number.
inline vec exp_of(vec x) {
  const vec shift = all(12582912.0f);  // 1.5 * 2^23: the sum's last bit is worth 1
  const vec least = all(-87.0f);
  const vec y = x < least ? least : x;
  const vec t = y * 1.44269504088896341f + shift;
  const vec n = t - shift;
  const vec r = y - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec power = (vec)(((words)t << 23) + 0x3f800000u);
  return x < least ? vec{} : p * power;
}

inline vec tanh_of(vec x) {
  const vec size = x < vec{} ? -x : x, z = x * x;
  vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec near = p * z * x + x;
  const vec most = all(10.0f);  // beyond, it is 1
  const vec far = 1.0f - 2.0f / (exp_of(2.0f * (size > most ? most : size)) + 1.0f);
  return size < all(0.625f) ? near : x < vec{} ? -far : far;
}
