// Operators over packed matrices, and the gate that stands alone where its product is none of them.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "ort_context.h"
#include "scratch.h"

namespace edge {

using ort::Element;

// Parts of about this many bytes of weights: enough to pay for handing them out, few enough to share evenly.
constexpr int64_t kPartBytes = 32 << 10;

// Of rows and columns: a matrix's size in bytes is then far from what 64 bits hold, so that a weight of that size is all
// that is read.
constexpr int64_t kMostRows = int64_t(1) << 28;

inline PackedMatrix matrix_of(const Attributes& attributes) {
  PackedMatrix matrix{nullptr, attributes.integer("N"), attributes.integer("K"), int(attributes.integer("bits")),
                      int(attributes.integer("block")), attributes.integer("offsets", 1) != 0};
  require(matrix.bits == 4 || matrix.bits == 8 || matrix.bits == 16, "bits must be 4, 8 or 16");
  require(matrix.block == 16 || matrix.block == 32, "block must be 16 or 32");
  require(matrix.rows > 0 && matrix.columns > 0 && matrix.columns % matrix.block == 0, "K must be whole blocks");
  require(matrix.rows <= kMostRows && matrix.columns <= kMostRows, "N and K must be at most 2^28");
  return matrix;
}

inline const uint8_t* weight_of(const Context& context, size_t index, const PackedMatrix& matrix) {
  require(context.dims(index) == std::vector<int64_t>{matrix.bytes()}, "the weight has not the size of its matrix");
  return context.input<uint8_t>(index);
}

class QuantizedMatMul {
 public:
  static constexpr const char* kName = "QuantizedMatMul";
  static constexpr Element kInputs[] = {Element::kFloat, Element::kUint8, Element::kFloat, Element::kFloat,
                                        Element::kFloat};
  static constexpr size_t kRequired = 2;

  explicit QuantizedMatMul(const Attributes& attributes)
      : matrix_(matrix_of(attributes)), bits_(int(attributes.integer("activation_bits"))) {
    input_.columns = matrix_.columns;
    input_.gate = Gate(attributes.integer("gate", int64_t(Gate::kNone)));
    input_.epsilon = attributes.real("epsilon", 0.0f);
    require(input_.gate >= Gate::kNone && input_.gate <= Gate::kGelu, "gate must be -1, 0, 1 or 2");
    require((bits_ == 32) == (matrix_.bits == 16), "32-bit activations take float16 weights only, and those no others");
    require(bits_ == 32 || bits_ == 16 || (bits_ == 8 && matrix_.bits == 4), "8-bit activations take 4-bit weights only");
  }

  void compute(const Context& context, const Kernels& kernels) {
    Input input = input_;
    input.x = context.input<float>(0);
    input.norm = context.input<float>(3);
    const auto dims = context.dims(0);
    require(dims.size() == 2 && dims[1] == input.width(), "x must be (tokens, K), or (tokens, 2 · K) for a gate");
    require(!input.norm || context.dims(3) == std::vector<int64_t>{matrix_.columns}, "the norm must be (K)");
    require(!context.input<float>(2) || context.dims(2) == std::vector<int64_t>{matrix_.rows}, "the bias must be (N)");
    MatMul job{matrix_, {}, dims[0], context.input<float>(2), context.input<float>(4), nullptr};
    require(!job.addend || context.dims(4) == std::vector<int64_t>{dims[0], matrix_.rows},
            "the addend must be (tokens, N)");
    job.weight.data = weight_of(context, 1, matrix_);
    job.y = context.output(dims[0], matrix_.rows);
    if (job.tokens == 0) return;
    auto& scratch = Scratch::of_this_thread();
    const int64_t blocks = matrix_.blocks();
    const int digits = bits_ == 16 && matrix_.bits == 4 ? 2 : 1;
    const int64_t rows = job.tokens * digits;
    const int64_t code_bytes = bits_ == 32 ? sizeof(float) : sizeof(int16_t);
    job.x = {bits_, digits, rows, scratch.take<uint8_t>(rows * matrix_.columns * code_bytes),
             scratch.take<float>(bits_ == 32 ? 0 : 2 * rows * blocks)};
    constexpr int64_t kRows = 16;
    context.parallel((job.tokens + kRows - 1) / kRows, [&](int64_t i) {
      kernels.quantize(input, i * kRows, std::min(job.tokens, (i + 1) * kRows), matrix_.block, job.x);
    });
    const int64_t panels = matrix_.panels();
    const int64_t together = std::clamp<int64_t>(kPartBytes / matrix_.panel_bytes() / std::min<int64_t>(job.tokens, 8),
                                                 1, panels);
    context.parallel((panels + together - 1) / together, [&](int64_t i) {
      kernels.matmul(job, i * together, std::min(panels, (i + 1) * together));
    });
  }

 private:
  PackedMatrix matrix_;
  int bits_;
  Input input_{};
};

class QuantizedGather {
 public:
  static constexpr const char* kName = "QuantizedGather";
  static constexpr Element kInputs[] = {Element::kInt64, Element::kUint8};
  static constexpr size_t kRequired = 2;

  explicit QuantizedGather(const Attributes& attributes) : matrix_(matrix_of(attributes)) {}

  void compute(const Context& context, const Kernels& kernels) {
    PackedMatrix matrix = matrix_;
    matrix.data = weight_of(context, 1, matrix);
    const int64_t count = context.dims(0).at(0), *ids = context.input<int64_t>(0);
    float* y = context.output(count, matrix.columns);
    for (int64_t i = 0; i < count; ++i) {
      require(ids[i] >= 0 && ids[i] < matrix.rows, "an id is outside the table");
      kernels.row(matrix, ids[i], y + i * matrix.columns);
    }
  }

 private:
  PackedMatrix matrix_;
};

class GatedUnit {
 public:
  static constexpr const char* kName = "GatedUnit";
  static constexpr Element kInputs[] = {Element::kFloat};
  static constexpr size_t kRequired = 1;

  explicit GatedUnit(const Attributes& attributes) : gate_(Gate(attributes.integer("activation"))) {
    require(int(gate_) >= 0 && int(gate_) <= 2, "activation must be 0, 1 or 2");
  }

  void compute(const Context& context, const Kernels& kernels) {
    const auto dims = context.dims(0);
    require(dims.size() == 2 && dims[1] % 2 == 0, "gate_up must be (tokens, 2 · n)");
    const int64_t n = dims[1] / 2;
    const float* x = context.input<float>(0);
    float* y = context.output(dims[0], n);
    constexpr int64_t kRows = 4;
    context.parallel((dims[0] + kRows - 1) / kRows, [&](int64_t i) {
      for (int64_t row = i * kRows; row < std::min(dims[0], (i + 1) * kRows); ++row) {
        kernels.gated_unit(x + row * 2 * n, n, gate_, y + row * n);
      }
    });
  }

 private:
  Gate gate_;
};

}  // namespace edge
