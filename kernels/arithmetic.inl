// Arithmetic of rows: the same for every instruction set, over its vectors. Included inside its namespace.

inline float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float max_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  return *std::max_element(lanes, lanes + kLanes);
}

// e**x within 2 units in the last place, for x clamped to −87.3 … 88.3 (Cephes' expf: Cody-Waite reduction, degree 6).
// What is no number stays so: min and max give their second operand then.
inline Vec exponential(Vec x) {
  x = min(all(88.3f), max(all(-87.3f), x));
  const Vec n = nearest(mul(x, all(1.44269504f)));
  Vec r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Vec p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, r, all(c));
  }
  return mul(add(fma(p, mul(r, r), r), all(1.0f)), power_of_two(n));
}

// x / sqrt(mean(x²) + epsilon) · weight, n in whole vectors (root-mean-square norm: arXiv 1910.07467).
inline void norm_row(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  Vec squares = all(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Vec factor = all(1.0f / std::sqrt(sum_lanes(squares) / float(n) + epsilon));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
}

inline Vec gate_vector(Vec x, Gate gate) {
  Vec u = x;
  if (gate == Gate::kGeluTanh) {  // ½ (1 + tanh u) = 1 / (1 + e**−2u)
    const Vec cubed = fma(mul(mul(x, x), x), all(0.044715f), x);
    u = mul(cubed, all(2.0f * 0.7978845608f));
  }
  return div(x, add(all(1.0f), exponential(sub(all(0.0f), u))));
}

void gated_unit(const float* x, int64_t n, Gate gate, float* out) {
  int64_t i = 0;
  if (gate != Gate::kGelu) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(gate_vector(load(x + i), gate), load(x + n + i)));
    if (i == n) return;
    float rest[kLanes] = {};
    std::copy(x + i, x + n, rest);
    store(rest, gate_vector(load(rest), gate));
    for (int64_t k = 0; i < n; ++i, ++k) out[i] = rest[k] * x[n + i];
  }
  for (; i < n; ++i) out[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f)) * x[n + i];
}

int64_t multiply_floats(int64_t rounds) {
  constexpr int kSums = 10;  // more than are on their way at once: 2 begin in a cycle, each takes 4
  const Vec x = all(0.5f), y = all(0.25f);
  Vec sums[kSums];
  for (Vec& sum : sums) sum = all(0.0f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (Vec& sum : sums) sum = fma(x, y, sum);
  }
  for (int i = 1; i < kSums; ++i) sums[0] = add(sums[0], sums[i]);
  volatile float kept = sum_lanes(sums[0]);  // else nothing would need to be computed
  (void)kept;
  return rounds * kSums * kLanes;
}
