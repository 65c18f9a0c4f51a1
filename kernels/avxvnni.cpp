// Kernels for x86-64 with AVX2 and its byte products (AVX-VNNI): Intel Core since Alder Lake, AMD since Zen 5.
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11  // does not know them

const edge::Kernels edge::avxvnni::kernels = {"avxvnni", [] { return false; }};

#else

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avxvnni,avx2,fma,f16c")
#endif

namespace edge {
namespace avxvnni {

constexpr const char* kInstructions = "avxvnni";

// sum += low · x_low + high · x_high, by groups of four bytes: weights of at most 15 with −127..127.
inline void add_products(__m256i& sum, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
  sum = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, low, x_low), high, x_high);
}

inline __m256i whole_sums(__m256i sum) { return sum; }

// sum += codes · x, by pairs of 16-bit lanes.
inline void add_products(__m256i& sum, __m256i codes, __m256i x) { sum = _mm256_dpwssd_avx_epi32(sum, codes, x); }

#include "avx2.inl"
#include "arithmetic.inl"
#include "attention.inl"
#include "products.inl"

bool supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;  // compilers have no common name for it
  return vnni && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#include "table.inl"

}  // namespace avxvnni

}  // namespace edge

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
