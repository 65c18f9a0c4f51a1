// Kernels for x86-64 with AVX-512 and its byte products (VNNI): Intel since Ice Lake, AMD since Zen 4.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own intrinsics: bug 105593
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

namespace edge {
namespace avx512 {

constexpr const char* kInstructions = "avx512vnni";

// ---- vectors of floats, for common.inl

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kRowsAtOnce = 8;  // rows of block_product that fit the registers: 8 · 2 sums, two vectors and a factor

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2**n for whole n from −126 to 127.
inline Vec power_of_two(Vec n) {
  const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_castsi512_ps(bits);
}
inline half to_half(float x) { return half(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
inline float to_float(half x) { return _cvtsh_ss(x); }
inline float to_float(int8_t x) { return x; }
// Whole numbers, in range by construction.
inline void store_codes(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
inline void store_codes(int16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}

// Into the cache; beyond the end of memory it does nothing.
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}

// ---- products of codes

// Bytes of weights asked for ahead of use where few rows wait for memory: the processor's own prefetching ends with each
// page of 4 KiB.
constexpr int64_t kAhead = 2048;

constexpr int kPanelVectors = 1;

inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
inline __m512i broadcast4(const int16_t* p) {
  int64_t four;
  std::memcpy(&four, p, 8);
  return _mm512_set1_epi64(four);
}

// out += x · panelᵀ over one block, from the integer sums of R rows of x and 16 of the panel.
template <int R>
inline void scale_block(bool offsets, const uint8_t* parameters, const float* factors,
                        const __m512i (&sums)[R], Vec (&out)[R][1]) {
  const half* d = reinterpret_cast<const half*>(parameters);
  const Vec scale = load(d);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    out[r][0] = fma(_mm512_cvtepi32_ps(sums[r]), mul(scale, all(factors[r])), out[r][0]);
  }
  if (!offsets) return;
  const Vec offset = load(d + 16);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) out[r][0] = fma(offset, all(factors[R + r]), out[r][0]);
}

// 4-bit codes with 8-bit activations.
template <int R, int BLOCK>
inline void narrow_tile(const MatMul& job, const uint8_t* panel, int64_t row, Vec (&out)[R][1]) {
  constexpr int kChunks = BLOCK / 8;  // of 64 bytes: low nibbles are columns 4c…, high ones columns BLOCK/2 + 4c…
  const int64_t blocks = job.weight.blocks(), stride = job.weight.block_bytes();
  const int8_t* x = static_cast<const int8_t*>(job.x.codes) + row * job.weight.columns;
  const float* factors = job.x.factors + 2 * row * blocks;
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  for (int64_t block = 0; block < blocks; ++block, panel += stride, x += R * BLOCK, factors += 2 * R) {
    if (R <= 2) prefetch(panel + kAhead, stride);
    __m512i sums[R];
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int c = 0; c < kChunks; ++c) {
      const __m512i codes = _mm512_loadu_si512(panel + 64 * c);
      const __m512i low = _mm512_and_si512(codes, low_nibbles);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibbles);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const int8_t* four = x + r * BLOCK + 4 * c;
        sums[r] = _mm512_dpbusd_epi32(sums[r], low, broadcast4(four));
        sums[r] = _mm512_dpbusd_epi32(sums[r], high, broadcast4(four + BLOCK / 2));
      }
    }
    scale_block<R>(job.weight.offsets, panel + BLOCK * 8, factors, sums, out);
  }
}

// 8-bit codes with 16-bit activations. A 32-bit lane takes at most 128 · 32767 · 32.
template <int R, int BLOCK>
inline void wide_tile(const MatMul& job, const uint8_t* panel, int64_t row, Vec (&out)[R][1]) {
  const int64_t blocks = job.weight.blocks(), stride = job.weight.block_bytes();
  const int16_t* x = static_cast<const int16_t*>(job.x.codes) + row * job.weight.columns;
  const float* factors = job.x.factors + 2 * row * blocks;
  for (int64_t block = 0; block < blocks; ++block, panel += stride, x += R * BLOCK, factors += 2 * R) {
    if (R <= 2) prefetch(panel + kAhead, stride);
    __m512i sums[R][2];  // by eight rows of the panel; each row in two lanes
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int c = 0; c < BLOCK / 4; ++c) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 64 * c + 32 * h));
        const __m512i codes = _mm512_cvtepi8_epi16(bytes);
        for (int r = 0; r < R; ++r) {
          sums[r][h] = _mm512_dpwssd_epi32(sums[r][h], codes, broadcast4(x + r * BLOCK + 4 * c));
        }
      }
    }
    __m512i whole[R];
    for (int r = 0; r < R; ++r) {
      __m256i halves[2];
      for (int h = 0; h < 2; ++h) {
        const __m512i pairs = _mm512_add_epi32(sums[r][h], _mm512_srli_epi64(sums[r][h], 32));
        halves[h] = _mm512_cvtepi64_epi32(pairs);
      }
      whole[r] = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
    }
    scale_block<R>(job.weight.offsets, panel + BLOCK * 16, factors, whole, out);
  }
}

constexpr int kNarrowRows = 12, kWideRows = 4;  // rows of activations at once, by the registers there are

int64_t multiply_bytes(int64_t rounds) {
  constexpr int kSums = 12;  // more than are on their way at once: 2 begin in a cycle, each takes 4 or 5
  const __m512i codes = _mm512_set1_epi8(7), x = _mm512_set1_epi8(-3);
  __m512i sums[kSums];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, codes, x);
  }
  for (int i = 1; i < kSums; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, sums[0]);
  volatile int32_t kept = lanes[0];  // else nothing would need to be computed
  (void)kept;
  return rounds * kSums * 64;
}

#include "arithmetic.inl"
#include "attention.inl"
#include "products.inl"

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

#include "table.inl"

}  // namespace avx512

}  // namespace edge

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
