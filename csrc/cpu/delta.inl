// A task of ops.delta_linear: rows of floats times signs that stay bits until the registers. Included by each_isa.h.

// 1 where the bit is set, else -1; bits PART * LANES and up of a word.
#if HFL_LANES == 16
template <int PART>
inline vec ones(uint32_t word) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return (vec)_mm512_mask_blend_ps(static_cast<__mmask16>(word >> PART * 16), -one, one);
}
#else
template <int PART>
inline vec ones(uint32_t word) {
  words by;
#pragma GCC unroll 8
  for (int i = 0; i < LANES; ++i) by[i] = static_cast<uint32_t>(31 - PART * LANES - i);
  return (vec)((~(word - words{}) << by & 0x80000000u) | 0x3f800000u);
}
#endif

inline float sum_of(vec x) {
  float part[LANES];
  store(part, x);
  for (int half = LANES / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

template <int PART, int ROWS, int OUTS>
inline void add_word(vec (&sums)[ROWS][OUTS], const float* const (&x)[ROWS], const uint32_t* const (&bits)[OUTS],
                     int64_t word) {
  vec inputs[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) inputs[r] = load(x[r] + word * 32 + PART * LANES);
#pragma GCC unroll 8
  for (int n = 0; n < OUTS; ++n) {
    const vec sign = ones<PART>(bits[n][word]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums[r][n] += inputs[r] * sign;
  }
  if constexpr ((PART + 1) * LANES < 32) add_word<PART + 1>(sums, x, bits, word);
}

// to[r][n] += the delta of a slot: sums of a group of inputs, in the order of the inputs, times its scale.
template <int ROWS, int OUTS>
inline void add_delta(float (&to)[ROWS][OUTS], const hfl_delta& a, int64_t slot, int64_t first,
                      const float* const (&x)[ROWS]) {
  const int64_t count = a.inputs / 32, of_group = count / a.groups;
  const uint32_t* bits[OUTS];
  for (int n = 0; n < OUTS; ++n) {
    bits[n] = reinterpret_cast<const uint32_t*>(a.bits) + (slot * a.outputs + first + n) * count;
  }
  for (int64_t group = 0; group < a.groups; ++group) {
    vec sums[ROWS][OUTS] = {};
    for (int64_t word = group * of_group; word < (group + 1) * of_group; ++word) add_word<0>(sums, x, bits, word);
    for (int n = 0; n < OUTS; ++n) {
      const float scale = a.scales[(slot * a.scale_rows + (a.scale_rows > 1 ? first + n : 0)) * a.groups + group];
      for (int r = 0; r < ROWS; ++r) to[r][n] += sum_of(sums[r][n]) * scale;
    }
  }
}

template <class T, int ROWS, int OUTS>
inline void write_results(const hfl_delta& a, const int32_t* rows, int64_t first, const float* inputs) {
  float sums[ROWS][OUTS] = {};
  const float* x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = inputs + int64_t{rows[r]} * padded(a.inputs);
  for (int plane = 0; plane < a.planes; ++plane) {
    const int64_t slot = a.slots_of_rows[int64_t{rows[0]} * a.planes + plane];
    if (slot >= 0) add_delta(sums, a, slot, first, x);
  }
  for (int r = 0; r < ROWS; ++r) {
    const T* base = static_cast<const T*>(a.base) + rows[r] * a.base_r + first;
    T* out = static_cast<T*>(a.out) + int64_t{rows[r]} * a.outputs + first;
    for (int n = 0; n < OUTS; ++n) assign(out + n, value(base[n]) + sums[r][n]);
  }
}

template <class T, int ROWS>
inline void write_rows(const hfl_delta& a, const DeltaTask& task, const int32_t* rows, const float* inputs) {
  int64_t n = task.first;
  for (; n + 4 <= task.last; n += 4) write_results<T, ROWS, 4>(a, rows, n, inputs);
  for (; n < task.last; ++n) write_results<T, ROWS, 1>(a, rows, n, inputs);
}

template <class T>
inline void write_task(const hfl_delta& a, const DeltaTask& task, const float* inputs) {
  int64_t r = 0;
  for (; r + 4 <= task.count; r += 4) write_rows<T, 4>(a, task, task.rows + r, inputs);
  for (; r < task.count; ++r) write_rows<T, 1>(a, task, task.rows + r, inputs);
}

// inputs: [R, padded(K)].
inline void delta_outputs(const hfl_delta& a, const DeltaTask& task, const float* inputs) {
  if (a.dtype == HFL_F32) return write_task<float>(a, task, inputs);
  if (a.dtype == HFL_F16) return write_task<half>(a, task, inputs);
  return write_task<bfloat>(a, task, inputs);
}

inline void read_inputs(const hfl_delta& a, int64_t row, float* to) {
  read_any(to, at(a.x, row * a.x_r, a.dtype), a.dtype, a.inputs);
}
