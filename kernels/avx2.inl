// Vectors of 256 bits, and tiles of products over them. Included inside the namespace of an instruction set, after its ways
// to multiply codes.

// ---- vectors of floats

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kRowsAtOnce = 3;  // rows of block_product that fit the registers: 3 · 4 sums, a vector and a factor

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2**n for whole n from −126 to 127.
inline Vec power_of_two(Vec n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_castsi256_ps(bits);
}
inline half to_half(float x) { return half(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
inline float to_float(half x) { return _cvtsh_ss(x); }
inline float to_float(int8_t x) { return x; }
// Whole numbers, in range by construction.
inline void store_codes(int8_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void store_codes(int16_t* p, Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}

// Into the cache; beyond the end of memory it does nothing.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}

// ---- products of codes

// Bytes of weights asked for ahead of use where few rows wait for memory: the processor's own prefetching ends with each
// page of 4 KiB.
constexpr int64_t kAhead = 2048;

constexpr int kPanelVectors = 2;

inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i broadcast4(const int16_t* p) {
  int64_t four;
  std::memcpy(&four, p, 8);
  return _mm256_set1_epi64x(four);
}

// out += x · panelᵀ over one block, from the integer sums of R rows of x and 16 of the panel (two vectors of 8).
template <int R>
inline void scale_block(bool offsets, const uint8_t* parameters, const float* factors,
                        const __m256i (&sums)[R][2], Vec (&out)[R][2]) {
  const half* d = reinterpret_cast<const half*>(parameters);
  const Vec scale[2] = {load(d), load(d + 8)};
  const Vec offset[2] = {offsets ? load(d + 16) : all(0.0f), offsets ? load(d + 24) : all(0.0f)};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec x_scale = all(factors[r]), x_sum = all(factors[R + r]);
    for (int h = 0; h < 2; ++h) {
      out[r][h] = fma(_mm256_cvtepi32_ps(sums[r][h]), mul(scale[h], x_scale), out[r][h]);
      if (offsets) out[r][h] = fma(offset[h], x_sum, out[r][h]);
    }
  }
}

// 4-bit codes with 8-bit activations.
template <int R, int BLOCK>
inline void narrow_tile(const MatMul& job, const uint8_t* panel, int64_t row, Vec (&out)[R][2]) {
  constexpr int kChunks = BLOCK / 8;  // of 64 bytes: low nibbles are columns 4c…, high ones columns BLOCK/2 + 4c…
  const int64_t blocks = job.weight.blocks(), stride = job.weight.block_bytes();
  const int8_t* x = static_cast<const int8_t*>(job.x.codes) + row * job.weight.columns;
  const float* factors = job.x.factors + 2 * row * blocks;
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  for (int64_t block = 0; block < blocks; ++block, panel += stride, x += R * BLOCK, factors += 2 * R) {
    if (R <= 2) prefetch(panel + kAhead, stride);
    __m256i sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 64 * c + 32 * h));
        const __m256i low = _mm256_and_si256(codes, low_nibbles);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_nibbles);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int8_t* four = x + r * BLOCK + 4 * c;
          add_products(sums[r][h], low, broadcast4(four), high, broadcast4(four + BLOCK / 2));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < 2; ++h) sums[r][h] = whole_sums(sums[r][h]);
    }
    scale_block<R>(job.weight.offsets, panel + BLOCK * 8, factors, sums, out);
  }
}

// 8-bit codes with 16-bit activations. A 32-bit lane takes at most 128 · 32767 · 32.
template <int R, int BLOCK>
inline void wide_tile(const MatMul& job, const uint8_t* panel, int64_t row, Vec (&out)[R][2]) {
  const int64_t blocks = job.weight.blocks(), stride = job.weight.block_bytes();
  const int16_t* x = static_cast<const int16_t*>(job.x.codes) + row * job.weight.columns;
  const float* factors = job.x.factors + 2 * row * blocks;
  for (int64_t block = 0; block < blocks; ++block, panel += stride, x += R * BLOCK, factors += 2 * R) {
    if (R <= 2) prefetch(panel + kAhead, stride);
    __m256i whole[R][2];
    for (int h = 0; h < 2; ++h) {
      __m256i sums[R][2];  // by four rows of the panel; each row in two lanes
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
      const __m128i* codes = reinterpret_cast<const __m128i*>(panel + 32 * h);
      for (int c = 0; c < BLOCK / 4; ++c, codes += 4) {
        const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes));
        const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes + 1));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256i four = broadcast4(x + r * BLOCK + 4 * c);
          add_products(sums[r][0], first, four);
          add_products(sums[r][1], second, four);
        }
      }
      for (int r = 0; r < R; ++r) {
        whole[r][h] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][0], sums[r][1]), 0b11011000);
      }
    }
    scale_block<R>(job.weight.offsets, panel + BLOCK * 16, factors, whole, out);
  }
}

constexpr int kNarrowRows = 4, kWideRows = 4;  // rows of activations at once, by the registers there are

int64_t multiply_bytes(int64_t rounds) {
  constexpr int kSums = 8;  // as many as the registers hold beside what is multiplied, enough to have no wait
  __m256i codes = _mm256_set1_epi8(7), x = _mm256_set1_epi8(-3), sums[kSums];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
    for (__m256i& sum : sums) {
#if defined(__GNUC__)
      asm("" : "+x"(codes));  // else products that do not change would be made once
#endif
      add_products(sum, codes, x, codes, x);
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  volatile int kept = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums[0]));  // else nothing would need to be computed
  (void)kept;
  return rounds * kSums * 64;
}
