// Attention over the paged cache: the same for every instruction set, over its vectors. Included inside its namespace.

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

// x (n) as every `stride`-th element from `to` on.
void put(const float* x, int64_t n, half* to, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = to_half(x[i]);
}

// The same as codes; `scale` makes them numbers again. Of x that are not all numbers nothing is one.
void put(const float* x, int64_t n, int8_t* to, int64_t stride, float* scale) {
  float largest = 0, nothing = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    nothing += x[i] * 0.0f;  // not 0 of an infinity or a NaN
  }
  *scale = largest / 127 + nothing;
  const float factor = largest > 0 && nothing == 0 ? 127 / largest : 0;
  for (int64_t i = 0; i < n; ++i) {
    to[i * stride] = int8_t(std::nearbyint(std::min(127.0f, std::max(-127.0f, x[i] * factor))));
  }
}

// x (n) by an orthogonal matrix that is its own inverse: Hadamard's, of the largest power of two that divides n, block by
// block. Keys have a few large elements, which would take all of a code's range; turned, all elements are of a size. Scores
// do not change when queries and keys are both turned, and sums of turned values are turned back (QuaRot: Ashkboos et al.
// 2024, arXiv 2404.00456).
void turn(float* x, int64_t n) {
  const int64_t size = n & -n;
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  const float norm = 1.0f / std::sqrt(float(size));
  for (int64_t i = 0; i < n; ++i) x[i] *= norm;
}

// Where the scales of a head's codes in a block are.
inline float* scales(const Attention& job, uint8_t* codes) {
  return reinterpret_cast<float*>(codes + kBlockTokens * job.head_dim);
}

void append(const Attention& job, int64_t sequence, int64_t token) {
  const int64_t dim = job.head_dim, pairs = job.rotary_dim / 2;
  const int64_t position = job.position(sequence, token);
  const int64_t block = job.table[sequence * job.table_width + position / kBlockTokens];
  const int64_t place = position % kBlockTokens;
  const float* from = job.qkv + token * (job.heads + 2 * job.kv_heads) * dim;
  const float* cos = pairs ? job.cos + job.positions[token] * pairs : nullptr;
  const float* sin = pairs ? job.sin + job.positions[token] * pairs : nullptr;
  float* query = job.query + token * job.heads * dim;
  const bool turned = job.stored == Stored::kCodes;
  std::vector<float> key(from + job.heads * dim, from + (job.heads + 2 * job.kv_heads) * dim);  // and value
  std::copy(from, from + job.heads * dim, query);
  for (int64_t head = 0; head < job.heads + job.kv_heads; ++head) {
    float* x = head < job.heads ? query + head * dim : key.data() + (head - job.heads) * dim;
    const float* norm = head < job.heads ? job.q_norm : job.k_norm;
    if (norm) norm_head(x, norm, dim, job.epsilon);
    if (pairs) rotate_head(x, cos, sin, pairs, job.interleaved);
    if (turned) turn(x, dim);
  }
  for (int64_t i = 0; i < job.heads * dim; ++i) query[i] *= job.scale;
  float* value = key.data() + job.kv_heads * dim;
  for (int64_t head = 0; turned && head < job.kv_heads; ++head) turn(value + head * dim, dim);
  for (int64_t head = 0; head < job.kv_heads; ++head) {
    uint8_t *keys = job.keys(block, head), *values = job.values(block, head);
    const float *new_key = key.data() + head * dim, *new_value = value + head * dim;
    if (job.stored == Stored::kHalf) {
      put(new_key, dim, reinterpret_cast<half*>(keys) + place, kBlockTokens);
      put(new_value, dim, reinterpret_cast<half*>(values) + place * dim, 1);
    } else {
      put(new_key, dim, reinterpret_cast<int8_t*>(keys) + place, kBlockTokens, scales(job, keys) + place);
      put(new_value, dim, reinterpret_cast<int8_t*>(values) + place * dim, 1, scales(job, values) + place);
    }
  }
}

// c (R, 32) += a (R, n) · b (n, 32), each sum in the order of n. Of `next`, which lies like b, each line is asked for.
template <int R, class Element>
inline void block_product(const float* a, int64_t a_stride, int64_t n, const Element* b, int64_t b_stride, float* c,
                          int64_t c_stride, const Element* next) {
  constexpr int kVectors = 32 / kLanes;
  Vec sums[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * c_stride + v * kLanes);
  }
  for (int64_t k = 0; k < n; ++k) {
    if (next) prefetch(next + k * b_stride, 32 * sizeof(Element));
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
                        float* c, int64_t c_stride, const Element* next) {
  if constexpr (R > 0) {
    if (rows == R) return block_product<R>(a, a_stride, n, b, b_stride, c, c_stride, next);
    block_product_rest<R - 1>(rows, a, a_stride, n, b, b_stride, c, c_stride, next);
  }
}

template <class Element>
void rows_product(int64_t rows, const float* a, int64_t a_stride, int64_t n, const Element* b, int64_t b_stride,
                  float* c, int64_t c_stride, const Element* next = nullptr) {
  constexpr int R = kRowsAtOnce;
  for (; rows >= R; rows -= R, a += R * a_stride, c += R * c_stride) {
    block_product<R>(a, a_stride, n, b, b_stride, c, c_stride, next);
  }
  block_product_rest<R - 1>(rows, a, a_stride, n, b, b_stride, c, c_stride, next);
}

// (rows, columns) halves or codes as floats with the columns filled up with zeros to `wide`.
template <class Element>
void widen(const Element* from, int64_t rows, int64_t columns, int64_t wide, float* to) {
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

// A share of a tile: for each of its rows the largest score, Σ e**(score − largest), and the values weighted by these
// terms. Shares join in any cut: segments begin at fixed positions and are added in their order, so a token's result does
// not depend on which tokens share its tile (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867).
void begin_share(const Attention& job, const Tile& tile, float* total) {
  const int64_t stride = job.share_stride();
  std::fill(total, total + tile.count * job.group() * stride, 0.0f);
  for (int64_t r = 0; r < tile.count * job.group(); ++r) total[r * stride] = -std::numeric_limits<float>::infinity();
}

// Scores, or weights, of (rows, kSegment): those of a block's tokens times their scales.
void scale_tokens(float* x, int64_t rows, const float* scales) {
  for (int64_t r = 0; r < rows; ++r, x += kSegment) {
    for (int64_t i = 0; i < kBlockTokens; i += kLanes) store(x + i, mul(load(x + i), load(scales + i)));
  }
}

template <class Element>
void attend_to(const Attention& job, const Tile& tile, int64_t segment, float* share) {
  constexpr bool kScaled = std::is_same<Element, int8_t>::value;
  thread_local struct {
    std::vector<float> query, scores, floats;
  } scratch;
  const int64_t dim = job.head_dim, wide = job.wide_dim(), stride = job.share_stride();
  const int64_t group = job.group(), rows = tile.count * group;
  const int64_t first = job.position(tile.sequence, tile.token), end = first + tile.count;
  const int32_t* table = job.table + tile.sequence * job.table_width;
  scratch.query.resize(rows * dim);
  scratch.scores.assign(rows * kSegment, 0.0f);
  scratch.floats.resize(wide * kBlockTokens);
  for (int64_t t = 0; t < tile.count; ++t) {
    const float* from = job.query + ((tile.token + t) * job.heads + tile.kv_head * group) * dim;
    std::copy(from, from + group * dim, scratch.query.data() + t * group * dim);
  }
  const bool direct = rows <= kRowsAtOnce && dim % 32 == 0;  // each key is then converted just once anyway
  const int64_t start = segment * kSegment, stop = std::min(start + kSegment, end);
  const int64_t from = std::max(start, job.lowest(first) / kBlockTokens * kBlockTokens);
  const auto keys_at = [&](int64_t key) {
    return reinterpret_cast<Element*>(job.keys(table[key / kBlockTokens], tile.kv_head));
  };
  const auto values_at = [&](int64_t key) {
    return reinterpret_cast<Element*>(job.values(table[key / kBlockTokens], tile.kv_head));
  };
  const auto scales_of = [&](Element* codes) { return scales(job, reinterpret_cast<uint8_t*>(codes)); };
  for (int64_t key = from; key < stop; key += kBlockTokens) {
    Element* keys = keys_at(key);
    float* scores = scratch.scores.data() + key - start;
    if (direct) {
      Element* next = key + kBlockTokens < stop ? keys_at(key + kBlockTokens) : values_at(from);
      if (kScaled) prefetch(scales_of(next), kBlockTokens * sizeof(float));
      rows_product(rows, scratch.query.data(), dim, dim, keys, kBlockTokens, scores, kSegment, next);
    } else {
      widen(keys, dim, kBlockTokens, kBlockTokens, scratch.floats.data());
      rows_product(rows, scratch.query.data(), dim, dim, scratch.floats.data(), kBlockTokens, scores, kSegment);
    }
    if (kScaled) scale_tokens(scores, rows, scales_of(keys));
  }
  const int64_t width = (stop - start + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  begin_share(job, tile, share);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = first + r / group;
    const int64_t high = std::min(position + 1, stop) - start;
    const int64_t low = std::max<int64_t>(0, job.lowest(position) - start);
    float* scores = scratch.scores.data() + r * kSegment;
    if (low < high) {
      const Softmax softmaxed = softmax(scores, width, low, high, job.softcap);
      share[r * stride] = softmaxed.maximum;
      share[r * stride + 1] = softmaxed.sum;
    } else {
      std::fill(scores, scores + width, 0.0f);
    }
  }
  for (int64_t key = from; key < stop; key += kBlockTokens) {
    Element* values = values_at(key);
    Element* next = key + kBlockTokens < stop ? values_at(key + kBlockTokens) : nullptr;
    const int64_t held = std::min(kBlockTokens, stop - key);
    float* weights = scratch.scores.data() + key - start;
    if (kScaled) {
      if (direct && next) prefetch(scales_of(next), kBlockTokens * sizeof(float));
      scale_tokens(weights, rows, scales_of(values));
    }
    if (!direct) widen(values, held, dim, wide, scratch.floats.data());
    for (int64_t d = 0; d < wide; d += 32) {
      float* sums = share + 2 + d;
      if (direct) {
        rows_product(rows, weights, kSegment, held, values + d, dim, sums, stride, next ? next + d : nullptr);
      } else {
        rows_product(rows, weights, kSegment, held, scratch.floats.data() + d, wide, sums, stride);
      }
    }
  }
}

void attend(const Attention& job, const Tile& tile, int64_t segment, float* share) {
  (job.stored == Stored::kHalf ? attend_to<half> : attend_to<int8_t>)(job, tile, segment, share);
}

void join_share(const Attention& job, const Tile& tile, float* total, const float* share) {
  const int64_t stride = job.share_stride();
  for (int64_t r = 0; r < tile.count * job.group(); ++r, total += stride, share += stride) {
    if (share[1] == 0.0f) continue;
    const float maximum = std::max(total[0], share[0]);
    const float before = std::exp(total[0] - maximum), now = std::exp(share[0] - maximum);
    total[0] = maximum;
    total[1] = total[1] * before + share[1] * now;
    for (int64_t d = 2; d < stride; d += kLanes) {
      store(total + d, fma(load(share + d), all(now), mul(load(total + d), all(before))));
    }
  }
}

void finish_share(const Attention& job, const Tile& tile, const float* total) {
  const int64_t group = job.group();
  for (int64_t r = 0; r < tile.count * group; ++r, total += job.share_stride()) {
    const float inverse = 1.0f / total[1];
    float* out = job.y + ((tile.token + r / group) * job.heads + tile.kv_head * group + r % group) * job.head_dim;
    for (int64_t d = 0; d < job.head_dim; ++d) out[d] = total[2 + d] * inverse;
    if (job.stored == Stored::kCodes) turn(out, job.head_dim);
  }
}
