// Everything that is the same for every instruction set, over its vectors and tiles. Included inside its namespace.

// ---- arithmetic

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
inline Vec exponential(Vec x) {
  x = min(max(x, all(-87.3f)), all(88.3f));
  const Vec n = nearest(mul(x, all(1.44269504f)));
  Vec r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Vec p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, r, all(c));
  }
  return mul(add(fma(p, mul(r, r), r), all(1.0f)), power_of_two(n));
}

// ---- activations as integers

inline float largest_of(const float* x, int block) {
  Vec largest = all(0.0f);
  for (int k = 0; k < block; k += kLanes) largest = max(largest, magnitude(load(x + k)));
  return max_lanes(largest);
}

// One block as codes; returns the scale, and Σ code.
template <class Code>
inline float quantize_block(const float* x, int block, float largest, Code* codes, float& sum) {
  constexpr float kTop = std::numeric_limits<Code>::max();
  const float inverse = largest > 0 ? kTop / largest : 0.0f;
  // The smallest numbers have no finite inverse; they count as 0.
  const bool usable = inverse <= std::numeric_limits<float>::max();
  const Vec factor = all(usable ? inverse : 0.0f);
  Vec total = all(0.0f);
  for (int k = 0; k < block; k += kLanes) {
    const Vec whole = nearest(mul(load(x + k), factor));
    store_codes(codes + k, whole);
    total = add(total, whole);
  }
  sum = sum_lanes(total);
  return usable ? largest / kTop : 0.0f;
}

template <class Code, int DIGITS>
void quantize_rows(const float* x, int64_t first, int64_t last, int64_t columns, int block, const Activations& into) {
  const int64_t blocks = columns / block;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t b = 0; b < blocks; ++b) {
      const float* from = x + row * columns + b * block;
      float largest = largest_of(from, block), rest[32];
      for (int digit = 0; digit < DIGITS; ++digit) {
        const int64_t at = row * DIGITS + digit;
        Code* codes = static_cast<Code*>(into.codes) + at * columns + b * block;
        float sum;
        const float scale = quantize_block(from, block, largest, codes, sum);
        into.scale[at * blocks + b] = scale;
        into.sum[at * blocks + b] = scale * sum;
        if (digit + 1 < DIGITS) {
          for (int k = 0; k < block; ++k) rest[k] = from[k] - scale * float(codes[k]);
          from = rest;
          largest = largest_of(rest, block);
        }
      }
    }
  }
}

void quantize(const float* x, int64_t first, int64_t last, int64_t columns, int block, const Activations& into) {
  if (into.digits == 2) {
    quantize_rows<int8_t, 2>(x, first, last, columns, block, into);
  } else if (into.bits == 8) {
    quantize_rows<int8_t, 1>(x, first, last, columns, block, into);
  } else {
    quantize_rows<int16_t, 1>(x, first, last, columns, block, into);
  }
}

// ---- products

// Rows [row, row + R) of the activations with one panel.
template <int R, int DIGITS>
void panel_tile(const MatMul& job, int64_t panel, int64_t row) {
  const PackedMatrix& w = job.weight;
  const uint8_t* data = w.data + panel * w.panel_bytes();
  Vec out[R][kPanelVectors];
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kPanelVectors; ++h) out[r][h] = all(0.0f);
  }
  if (w.bits == 4) {
    w.block == 32 ? narrow_tile<R, 32>(job, data, row, out) : narrow_tile<R, 16>(job, data, row, out);
  } else {
    w.block == 32 ? wide_tile<R, 32>(job, data, row, out) : wide_tile<R, 16>(job, data, row, out);
  }
  const int64_t start = panel * kPanel, count = std::min(kPanel, w.rows - start);
  for (int r = 0; r < R; r += DIGITS) {
    float values[kPanel];
    for (int h = 0; h < kPanelVectors; ++h) {
      store(values + h * kLanes, DIGITS == 2 ? add(out[r][h], out[r + DIGITS - 1][h]) : out[r][h]);
    }
    float* y = job.y + (row + r) / DIGITS * w.rows + start;
    for (int64_t i = 0; i < count; ++i) y[i] = values[i] + (job.bias ? job.bias[start + i] : 0.0f);
  }
}

template <int R, int DIGITS>
void panel_rest(const MatMul& job, int64_t panel, int64_t row, int64_t count) {
  if constexpr (R > 0) {
    if (count == R) return panel_tile<R, DIGITS>(job, panel, row);
    panel_rest<R - DIGITS, DIGITS>(job, panel, row, count);
  }
}

template <int R, int DIGITS>
void panel_product(const MatMul& job, int64_t panel) {
  const int64_t rows = job.tokens * DIGITS;
  int64_t row = 0;
  for (; row + R <= rows; row += R) panel_tile<R, DIGITS>(job, panel, row);
  panel_rest<R - DIGITS, DIGITS>(job, panel, row, rows - row);
}

void matmul(const MatMul& job, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    if (job.weight.bits == 8) {
      panel_product<kWideRows, 1>(job, panel);
    } else {
      job.x.digits == 2 ? panel_product<kNarrowRows, 2>(job, panel) : panel_product<kNarrowRows, 1>(job, panel);
    }
  }
}

void matrix_row(const PackedMatrix& matrix, int64_t index, float* out) {
  const int64_t row = index % kPanel, half_block = matrix.block / 2;
  const uint8_t* data = matrix.data + index / kPanel * matrix.panel_bytes();
  for (int64_t block = 0; block < matrix.blocks(); ++block, data += matrix.block_bytes()) {
    const half* parameters = reinterpret_cast<const half*>(data + matrix.codes_bytes());
    const float scale = to_float(parameters[row]), offset = to_float(parameters[kPanel + row]);
    for (int64_t k = 0; k < matrix.block; ++k) {
      const int64_t stored = matrix.bits == 8 ? k : k % half_block;
      const uint8_t byte = data[stored / 4 * 64 + row * 4 + stored % 4];
      const int code = matrix.bits == 8 ? int8_t(byte) : k < half_block ? byte & 15 : byte >> 4;
      *out++ = scale * float(code) + offset;
    }
  }
}

// ---- attention

void norm_head(float* x, const float* weight, int64_t n, float epsilon) {
  float squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(squares / float(n) + epsilon);
  for (int64_t i = 0; i < n; ++i) x[i] *= factor * weight[i];
}

void rotate_head(float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    float &a = x[i * step], &b = x[i * step + partner];
    const float rotated = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = rotated;
  }
}

void append(const Attention& job, int64_t sequence, int64_t token) {
  const int64_t dim = job.head_dim, pairs = job.rotary_dim / 2;
  const int64_t position = job.past[sequence] + token - job.begins[sequence];
  const int64_t block = job.table[sequence * job.table_width + position / kBlockTokens];
  const int64_t place = position % kBlockTokens;
  const float* from = job.qkv + token * (job.heads + 2 * job.kv_heads) * dim;
  const float* cos = pairs ? job.cos + job.positions[token] * pairs : nullptr;
  const float* sin = pairs ? job.sin + job.positions[token] * pairs : nullptr;
  float* query = job.query + token * job.heads * dim;
  std::vector<float> key(from + job.heads * dim, from + (job.heads + job.kv_heads) * dim);
  std::copy(from, from + job.heads * dim, query);
  for (int64_t head = 0; head < job.heads + job.kv_heads; ++head) {
    float* x = head < job.heads ? query + head * dim : key.data() + (head - job.heads) * dim;
    const float* norm = head < job.heads ? job.q_norm : job.k_norm;
    if (norm) norm_head(x, norm, dim, job.epsilon);
    if (pairs) rotate_head(x, cos, sin, pairs, job.interleaved);
  }
  for (int64_t i = 0; i < job.heads * dim; ++i) query[i] *= job.scale;
  const float* value = from + (job.heads + job.kv_heads) * dim;
  for (int64_t head = 0; head < job.kv_heads; ++head) {
    half *keys = job.keys(block, head) + place, *values = job.values(block, head) + place * dim;
    for (int64_t i = 0; i < dim; ++i) keys[i * kBlockTokens] = to_half(key[head * dim + i]);
    for (int64_t i = 0; i < dim; ++i) values[i] = to_half(value[head * dim + i]);
  }
}

// c (R, 32) += a (R, n) · b (n, 32), each sum in the order of n.
template <int R, class Element>
inline void block_product(const float* a, int64_t a_stride, int64_t n, const Element* b, int64_t b_stride, float* c,
                          int64_t c_stride) {
  constexpr int kVectors = 32 / kLanes;
  Vec sums[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * c_stride + v * kLanes);
  }
  for (int64_t k = 0; k < n; ++k) {
    Vec row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec factor = all(a[r * a_stride + k]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

template <int R, class Element>
void block_product_rest(int64_t rows, const float* a, int64_t a_stride, int64_t n, const Element* b, int64_t b_stride,
                        float* c, int64_t c_stride) {
  if constexpr (R > 0) {
    if (rows == R) return block_product<R>(a, a_stride, n, b, b_stride, c, c_stride);
    block_product_rest<R - 1>(rows, a, a_stride, n, b, b_stride, c, c_stride);
  }
}

template <class Element>
void rows_product(int64_t rows, const float* a, int64_t a_stride, int64_t n, const Element* b, int64_t b_stride,
                  float* c, int64_t c_stride) {
  constexpr int R = kRowsAtOnce;
  for (; rows >= R; rows -= R, a += R * a_stride, c += R * c_stride) {
    block_product<R>(a, a_stride, n, b, b_stride, c, c_stride);
  }
  block_product_rest<R - 1>(rows, a, a_stride, n, b, b_stride, c, c_stride);
}

// (rows, columns) halves as floats with the columns filled up with zeros to `wide`.
void widen(const half* from, int64_t rows, int64_t columns, int64_t wide, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += columns, to += wide) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(to + i, load(from + i));
    for (; i < columns; ++i) to[i] = to_float(from[i]);
    for (; i < wide; ++i) to[i] = 0.0f;
  }
}

// Scores → weights over one segment: the row's maximum and Σ e**(score − maximum). Only [low, high) counts; what lies
// outside becomes 0.
struct Softmax {
  float maximum, sum;
};
Softmax softmax(float* scores, int64_t width, int64_t low, int64_t high, float softcap) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  if (softcap > 0) {
    for (int64_t i = low; i < high; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
  }
  std::fill(scores, scores + low, kNothing);
  std::fill(scores + high, scores + width, kNothing);
  Vec largest = all(kNothing), sum = all(0.0f);
  for (int64_t i = 0; i < width; i += kLanes) largest = max(largest, load(scores + i));
  const float maximum = max_lanes(largest);
  for (int64_t i = 0; i < width; i += kLanes) store(scores + i, exponential(sub(load(scores + i), all(maximum))));
  std::fill(scores, scores + low, 0.0f);
  std::fill(scores + high, scores + width, 0.0f);
  for (int64_t i = 0; i < width; i += kLanes) sum = add(sum, load(scores + i));
  return {maximum, sum_lanes(sum)};
}

struct AttentionScratch {
  std::vector<float> query, scores, floats, segment, total, maximum, sum;
};

// Segments of keys are softmaxed by themselves and then joined (online softmax: Milakov and Gimelshein 2018, arXiv
// 1805.02867); they begin at fixed positions, so a token's result does not depend on which tokens share its tile.
void attend(const Attention& job, int64_t sequence, int64_t token, int64_t count, int64_t kv_head) {
  thread_local AttentionScratch scratch;
  const int64_t dim = job.head_dim, wide = (dim + 31) / 32 * 32, group = job.group(), rows = count * group;
  const int64_t first = job.past[sequence] + token - job.begins[sequence], end = first + count;
  const int32_t* table = job.table + sequence * job.table_width;
  scratch.query.resize(rows * dim);
  scratch.scores.resize(rows * kSegment);
  scratch.floats.resize(std::max(dim, wide) * kBlockTokens);
  scratch.segment.resize(rows * wide);
  scratch.total.assign(rows * wide, 0.0f);
  scratch.maximum.assign(rows, -std::numeric_limits<float>::infinity());
  scratch.sum.assign(rows, 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    const float* from = job.query + ((token + t) * job.heads + kv_head * group) * dim;
    std::copy(from, from + group * dim, scratch.query.data() + t * group * dim);
  }
  const bool direct = rows <= kRowsAtOnce && dim % 32 == 0;  // each key is then converted just once anyway
  const int64_t lowest = job.window ? std::max<int64_t>(0, first + 1 - job.window) : 0;
  for (int64_t start = lowest / kSegment * kSegment; start < end; start += kSegment) {
    const int64_t stop = std::min(start + kSegment, end);
    const int64_t from = std::max(start, lowest / kBlockTokens * kBlockTokens);
    const int64_t width = (stop - start + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
    std::fill(scratch.scores.begin(), scratch.scores.end(), 0.0f);
    for (int64_t key = from; key < stop; key += kBlockTokens) {
      const half* keys = job.keys(table[key / kBlockTokens], kv_head);
      float* scores = scratch.scores.data() + key - start;
      if (direct) {
        rows_product(rows, scratch.query.data(), dim, dim, keys, kBlockTokens, scores, kSegment);
      } else {
        widen(keys, dim, kBlockTokens, kBlockTokens, scratch.floats.data());
        rows_product(rows, scratch.query.data(), dim, dim, scratch.floats.data(), kBlockTokens, scores, kSegment);
      }
    }
    std::vector<Softmax>& parts = []() -> std::vector<Softmax>& {
      thread_local std::vector<Softmax> kept;
      return kept;
    }();
    parts.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first + r / group;
      const int64_t high = std::min(position + 1, stop) - start;
      const int64_t low = job.window ? std::max<int64_t>(0, position + 1 - job.window - start) : 0;
      float* scores = scratch.scores.data() + r * kSegment;
      if (low < high) {
        parts[r] = softmax(scores, width, low, high, job.softcap);
      } else {
        std::fill(scores, scores + width, 0.0f);
        parts[r] = {0.0f, 0.0f};
      }
    }
    std::fill(scratch.segment.begin(), scratch.segment.end(), 0.0f);
    for (int64_t key = from; key < stop; key += kBlockTokens) {
      const half* values = job.values(table[key / kBlockTokens], kv_head);
      const int64_t held = std::min(kBlockTokens, stop - key);
      const float* weights = scratch.scores.data() + key - start;
      if (!direct) widen(values, held, dim, wide, scratch.floats.data());
      for (int64_t d = 0; d < wide; d += 32) {
        float* sums = scratch.segment.data() + d;
        if (direct) {
          rows_product(rows, weights, kSegment, held, values + d, dim, sums, wide);
        } else {
          rows_product(rows, weights, kSegment, held, scratch.floats.data() + d, wide, sums, wide);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (parts[r].sum == 0.0f) continue;
      const float maximum = std::max(scratch.maximum[r], parts[r].maximum);
      const float before = std::exp(scratch.maximum[r] - maximum), now = std::exp(parts[r].maximum - maximum);
      float *total = scratch.total.data() + r * wide, *segment = scratch.segment.data() + r * wide;
      for (int64_t d = 0; d < wide; d += kLanes) {
        store(total + d, fma(load(segment + d), all(now), mul(load(total + d), all(before))));
      }
      scratch.sum[r] = scratch.sum[r] * before + parts[r].sum * now;
      scratch.maximum[r] = maximum;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = 1.0f / scratch.sum[r];
    const float* total = scratch.total.data() + r * wide;
    float* out = job.y + ((token + r / group) * job.heads + kv_head * group + r % group) * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = total[d] * inverse;
  }
}

// ---- gates

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
