// Kernels for x86-64 with AVX2, FMA and F16C.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace edge {
namespace avx2 {

constexpr const char* kInstructions = "avx2";

// Without it GCC adds in another order, for which it computes all products first and spills them (3 times as slow).
inline void keep_order(__m256i& sum) {
#if defined(__GNUC__)
  asm("" : "+x"(sum));
#endif
}

// sum += low · x_low + high · x_high, by groups of four bytes: weights of at most 15 with −127..127. A 16-bit lane of the
// sum takes two products for each of a block's (at most) 8 groups of columns: 16 · 15 · 127 = 30480, so it cannot overflow.
inline void add_products(__m256i& sum, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
  const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
  sum = _mm256_add_epi16(sum, both);
  keep_order(sum);
}

// Such sums as 32-bit lanes.
inline __m256i whole_sums(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

// sum += codes · x, by pairs of 16-bit lanes.
inline void add_products(__m256i& sum, __m256i codes, __m256i x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x));
  keep_order(sum);
}

#include "avx2.inl"
#include "arithmetic.inl"
#include "attention.inl"
#include "products.inl"

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#include "table.inl"

}  // namespace avx2

}  // namespace edge

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
