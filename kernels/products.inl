// Activations as integers and their products with packed matrices: the same for every instruction set, over its vectors and tiles. Included inside its namespace.

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

// Row `row` as the weights meet it; `made` has room for it.
inline const float* input_row(const Input& input, int64_t row, float* made) {
  const float* x = input.x + row * input.width();
  if (input.gate != Gate::kNone) {
    gated_unit(x, input.columns, input.gate, made);
    x = made;
  }
  if (input.norm) {
    norm_row(x, input.norm, input.columns, input.epsilon, made);
    x = made;
  }
  return x;
}

template <class Code, int DIGITS>
void quantize_rows(const Input& input, int64_t first, int64_t last, int block, const Activations& into) {
  thread_local std::vector<float> made;
  constexpr int64_t kTile = sizeof(Code) == 1 ? kNarrowRows : kWideRows;
  const int64_t columns = input.columns, blocks = columns / block;
  made.resize(columns);
  for (int64_t row = first; row < last; ++row) {
    const float* x = input_row(input, row, made.data());
    for (int64_t b = 0; b < blocks; ++b) {
      const float* from = x + b * block;
      float largest = largest_of(from, block), rest[32];
      for (int digit = 0; digit < DIGITS; ++digit) {
        const int64_t at = row * DIGITS + digit, tile = at / kTile * kTile, rows = std::min(kTile, into.rows - tile);
        Code* codes = static_cast<Code*>(into.codes) + tile * columns + (b * rows + at - tile) * block;
        float* factors = into.factors + 2 * (tile * blocks + b * rows) + at - tile;
        float sum;
        const float scale = quantize_block(from, block, largest, codes, sum);
        factors[0] = scale;
        factors[rows] = scale * sum;
        if (digit + 1 < DIGITS) {
          for (int k = 0; k < block; ++k) rest[k] = from[k] - scale * float(codes[k]);
          from = rest;
          largest = largest_of(rest, block);
        }
      }
    }
  }
}

void keep_rows(const Input& input, int64_t first, int64_t last, const Activations& into) {
  for (int64_t row = first; row < last; ++row) {
    float* kept = static_cast<float*>(into.codes) + row * input.columns;
    const float* x = input_row(input, row, kept);
    if (x != kept) std::copy(x, x + input.columns, kept);
  }
}

void quantize(const Input& input, int64_t first, int64_t last, int block, const Activations& into) {
  if (into.bits == 32) {
    keep_rows(input, first, last, into);
  } else if (into.digits == 2) {
    quantize_rows<int8_t, 2>(input, first, last, block, into);
  } else if (into.bits == 8) {
    quantize_rows<int8_t, 1>(input, first, last, block, into);
  } else {
    quantize_rows<int16_t, 1>(input, first, last, block, into);
  }
}

// ---- products

// Halves with floats.
template <int R>
inline void half_tile(const MatMul& job, const uint8_t* panel, int64_t row, Vec (&out)[R][kPanelVectors]) {
  const int64_t columns = job.weight.columns;
  const half* weights = reinterpret_cast<const half*>(panel);
  const float* x = static_cast<const float*>(job.x.codes) + row * columns;
  for (int64_t k = 0; k < columns; ++k, weights += kPanel) {
    if (R <= 2) prefetch(reinterpret_cast<const uint8_t*>(weights) + kAhead, kPanel * sizeof(half));
    for (int h = 0; h < kPanelVectors; ++h) {
      const Vec column = load(weights + h * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) out[r][h] = fma(column, all(x[r * columns + k]), out[r][h]);
    }
  }
}

// Rows [row, row + R) of the activations with one panel.
template <int R, int DIGITS>
void panel_tile(const MatMul& job, int64_t panel, int64_t row) {
  const PackedMatrix& w = job.weight;
  const uint8_t* data = w.data + panel * w.panel_bytes();
  Vec out[R][kPanelVectors];
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < kPanelVectors; ++h) out[r][h] = all(0.0f);
  }
  if (w.bits == 16) {
    half_tile<R>(job, data, row, out);
  } else if (w.bits == 4) {
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
    const int64_t at = (row + r) / DIGITS * w.rows + start;
    for (int64_t i = 0; i < count && job.bias; ++i) values[i] += job.bias[start + i];
    for (int64_t i = 0; i < count && job.addend; ++i) values[i] += job.addend[at + i];
    std::copy(values, values + count, job.y + at);
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
  if (matrix.bits == 16) {
    const half* values = reinterpret_cast<const half*>(data) + row;
    for (int64_t k = 0; k < matrix.columns; ++k) out[k] = to_float(values[k * kPanel]);
    return;
  }
  for (int64_t block = 0; block < matrix.blocks(); ++block, data += matrix.block_bytes()) {
    const half* parameters = reinterpret_cast<const half*>(data + matrix.codes_bytes());
    const float scale = to_float(parameters[row]), offset = matrix.offsets ? to_float(parameters[kPanel + row]) : 0.0f;
    for (int64_t k = 0; k < matrix.block; ++k) {
      const int64_t stored = matrix.bits == 8 ? k : k % half_block;
      const uint8_t byte = data[stored / 4 * 64 + row * 4 + stored % 4];
      const int code = matrix.bits == 8 ? int8_t(byte) : k < half_block ? byte & 15 : byte >> 4;
      *out++ = scale * float(code) + offset;
    }
  }
}

