// The kernels as ONNX Runtime operators of the domain "edge_glm"; exporters/onnx_edge_builder.py emits them.
#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_context.h"

namespace edge {
namespace {

using ort::Element;
using ort::Entry;

// Parts of about this many bytes of weights: enough to pay for handing them out, few enough to share evenly.
constexpr int64_t kPartBytes = 32 << 10;

PackedMatrix matrix_of(const Attributes& attributes) {
  PackedMatrix matrix{nullptr, attributes.integer("N"), attributes.integer("K"), int(attributes.integer("bits")),
                      int(attributes.integer("block"))};
  require(matrix.bits == 4 || matrix.bits == 8, "bits must be 4 or 8");
  require(matrix.block == 16 || matrix.block == 32, "block must be 16 or 32");
  require(matrix.rows > 0 && matrix.columns > 0 && matrix.columns % matrix.block == 0, "K must be whole blocks");
  return matrix;
}

const uint8_t* weight_of(const Context& context, size_t index, const PackedMatrix& matrix) {
  require(context.dims(index) == std::vector<int64_t>{matrix.bytes()}, "the weight has not the size of its matrix");
  return context.input<uint8_t>(index);
}

// Scratch memory of one operator call, kept by the calling thread for the next.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    auto& buffer = buffers_[next_++];
    const size_t bytes = size_t(count) * sizeof(T);
    if (buffer.size() < bytes) buffer.resize(bytes);
    return reinterpret_cast<T*>(buffer.data());
  }
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    scratch.next_ = 0;
    return scratch;
  }

 private:
  std::vector<char> buffers_[3];
  size_t next_ = 0;
};

// ---- operators: a name, the types of inputs, attributes when made, and a call

class QuantizedMatMul {
 public:
  static constexpr const char* kName = "QuantizedMatMul";
  static constexpr Element kInputs[] = {Element::kFloat, Element::kUint8, Element::kFloat};
  static constexpr size_t kRequired = 2;

  explicit QuantizedMatMul(const Attributes& attributes)
      : matrix_(matrix_of(attributes)), bits_(int(attributes.integer("activation_bits"))) {
    require(bits_ == 16 || (bits_ == 8 && matrix_.bits == 4), "8-bit activations take 4-bit weights only");
  }

  void compute(const Context& context, const Kernels& kernels) {
    const auto dims = context.dims(0);
    require(dims.size() == 2 && dims[1] == matrix_.columns, "x must be (tokens, K)");
    MatMul job{matrix_, {}, dims[0], context.input<float>(2), context.output(dims[0], matrix_.rows)};
    job.weight.data = weight_of(context, 1, matrix_);
    if (job.tokens == 0) return;
    const float* x = context.input<float>(0);
    auto& scratch = Scratch::of_this_thread();
    const int64_t blocks = matrix_.blocks();
    const int digits = bits_ == 16 && matrix_.bits == 4 ? 2 : 1;
    const int64_t rows = job.tokens * digits;
    job.x = {bits_, digits, scratch.take<int16_t>(rows * matrix_.columns), scratch.take<float>(rows * blocks),
             scratch.take<float>(rows * blocks)};
    constexpr int64_t kRows = 16;
    context.parallel((job.tokens + kRows - 1) / kRows, [&](int64_t i) {
      kernels.quantize(x, i * kRows, std::min(job.tokens, (i + 1) * kRows), matrix_.columns, matrix_.block, job.x);
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

class PagedAttention {
 public:
  static constexpr const char* kName = "PagedAttention";
  static constexpr Element kInputs[] = {Element::kFloat, Element::kFloat16, Element::kInt32, Element::kInt32,
                                        Element::kInt32, Element::kInt64,   Element::kFloat, Element::kFloat,
                                        Element::kFloat, Element::kFloat};
  static constexpr size_t kRequired = 6;

  explicit PagedAttention(const Attributes& attributes) : layer_(attributes.integer("layer")) {
    base_.heads = attributes.integer("num_heads");
    base_.kv_heads = attributes.integer("kv_num_heads");
    base_.head_dim = attributes.integer("head_dim");
    base_.interleaved = attributes.integer("rotary_interleaved") != 0;
    base_.window = attributes.integer("window");
    base_.scale = attributes.real("scale");
    base_.softcap = attributes.real("softcap");
    base_.epsilon = attributes.real("epsilon");
    require(base_.kv_heads > 0 && base_.heads % base_.kv_heads == 0, "heads must be whole groups of KV heads");
  }

  void compute(const Context& context, const Kernels& kernels) {
    Attention job = base_;
    const int64_t width = (job.heads + 2 * job.kv_heads) * job.head_dim;
    const auto qkv = context.dims(0), cache = context.dims(1), table = context.dims(4);
    require(qkv.size() == 2 && qkv[1] == width, "qkv must be (tokens, (heads + 2 KV heads) · head size)");
    require(cache.size() == 5 && layer_ < cache[1] && cache[2] == 2 && cache[3] == job.kv_heads &&
                cache[4] == kBlockTokens * job.head_dim,
            "the KV cache has another shape");
    job.tokens = qkv[0];
    job.sequences = table.at(0);
    job.table_width = table.at(1);
    job.qkv = context.input<float>(0);
    job.block_stride = cache[1] * 2 * job.kv_heads * kBlockTokens * job.head_dim;
    // Written in place: the caller binds its own memory, and no other operator reads this layer's part of it.
    job.cache = const_cast<half*>(context.input<half>(1)) + layer_ * (job.block_stride / cache[1]);
    job.begins = context.input<int32_t>(2);
    job.past = context.input<int32_t>(3);
    job.table = context.input<int32_t>(4);
    job.positions = context.input<int64_t>(5);
    job.cos = context.input<float>(6);
    job.sin = context.input<float>(7);
    job.q_norm = context.input<float>(8);
    job.k_norm = context.input<float>(9);
    job.rotary_dim = job.cos ? 2 * context.dims(6).at(1) : 0;
    require(job.begins[0] == 0 && job.begins[job.sequences] == job.tokens, "begins must cover all tokens");
    job.query = Scratch::of_this_thread().take<float>(job.tokens * job.heads * job.head_dim);
    job.y = context.output(job.tokens, job.heads * job.head_dim);

    struct Part {
      int64_t sequence, token, count, kv_head;
    };
    std::vector<Part> tiles, rows;
    for (int64_t s = 0; s < job.sequences; ++s) {
      check_table(job, s, cache[0]);
      for (int64_t token = job.begins[s]; token < job.begins[s + 1]; token += job.tile_tokens()) {
        const int64_t count = std::min(job.tile_tokens(), job.begins[s + 1] - token);
        rows.push_back({s, token, count, 0});
      }
    }
    // The last tiles see the most keys: they begin first, so that no thread is left with a long one at the end.
    for (auto part = rows.rbegin(); part != rows.rend(); ++part) {
      for (int64_t head = 0; head < job.kv_heads; ++head) tiles.push_back({part->sequence, part->token, part->count, head});
    }
    const auto append = [&](int64_t i) {
      for (int64_t t = 0; t < rows[i].count; ++t) kernels.append(job, rows[i].sequence, rows[i].token + t);
    };
    if (job.tokens <= 2) {  // handing out so little costs more than doing it
      for (size_t i = 0; i < rows.size(); ++i) append(int64_t(i));
    } else {
      context.parallel(int64_t(rows.size()), append);
    }
    context.parallel(int64_t(tiles.size()), [&](int64_t i) {
      kernels.attend(job, tiles[i].sequence, tiles[i].token, tiles[i].count, tiles[i].kv_head);
    });
  }

 private:
  static void check_table(const Attention& job, int64_t sequence, int64_t blocks) {
    const int64_t count = job.begins[sequence + 1] - job.begins[sequence];
    const int64_t held = job.past[sequence] + count;
    require(count > 0 && job.past[sequence] >= 0, "a sequence without tokens");
    require(held <= job.table_width * kBlockTokens, "a sequence is longer than its row of the block table");
    for (int64_t i = 0; i * kBlockTokens < held; ++i) {
      const int32_t block = job.table[sequence * job.table_width + i];
      require(block >= 0 && block < blocks, "a block is outside the KV cache");
    }
  }

  Attention base_{};
  int64_t layer_;
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

// ---- registration

template <class Op>
struct Kernel {
  const ort::Api* api;
  Op op;
};

ort::Status* status_of(const ort::Api* api, const std::string& message) {
  using Create = ort::Status*(ort::ErrorCode, const char*);
  return api->get<Create>(Entry::kCreateStatus)(ort::kInvalidArgument, message.c_str());
}

template <class Op>
const ort::CustomOp* custom_op() {
  static const ort::CustomOp op = [] {
    ort::CustomOp made{};
    made.version = ort::kApiVersion;
    made.GetName = [](const ort::CustomOp*) { return Op::kName; };
    made.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
    made.GetInputType = [](const ort::CustomOp*, size_t i) { return Op::kInputs[i]; };
    made.GetInputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kInputs); };
    made.GetOutputType = [](const ort::CustomOp*, size_t) { return Element::kFloat; };
    made.GetOutputTypeCount = [](const ort::CustomOp*) { return size_t(1); };
    made.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) {
      return i < Op::kRequired ? ort::Presence::kRequired : ort::Presence::kOptional;
    };
    made.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::Presence::kRequired; };
    made.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
    made.GetStartVersion = [](const ort::CustomOp*) { return 1; };
    made.GetEndVersion = [](const ort::CustomOp*) { return 1; };
    made.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
      try {
        *kernel = new Kernel<Op>{api, Op(Attributes(api, info))};
        return static_cast<ort::Status*>(nullptr);
      } catch (const std::exception& error) {
        return status_of(api, std::string(Op::kName) + ": " + error.what());
      }
    };
    made.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      auto* made_kernel = static_cast<Kernel<Op>*>(kernel);
      try {
        const Kernels* kernels = choose_kernels();
        require(kernels, "this processor has neither AVX2 nor AVX-512 VNNI");
        made_kernel->op.compute(Context(made_kernel->api, context), *kernels);
        return static_cast<ort::Status*>(nullptr);
      } catch (const std::exception& error) {
        return status_of(made_kernel->api, std::string(Op::kName) + ": " + error.what());
      }
    };
    made.KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
    return made;
  }();
  return &op;
}

}  // namespace
}  // namespace edge

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Called by ONNX Runtime when the library is registered with a session's options.
EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace edge;
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (!api) return nullptr;  // older than any that the package allows; the graph's operators will not be found
  static ort::CustomOpDomain* domain = nullptr;  // lives as long as the library: sessions keep a pointer to it
  if (!domain) {
    using Create = ort::Status*(const char*, ort::CustomOpDomain**);
    using Add = ort::Status*(ort::CustomOpDomain*, const ort::CustomOp*);
    if (auto* status = api->get<Create>(Entry::kCreateCustomOpDomain)("edge_glm", &domain)) return status;
    const auto add = api->get<Add>(Entry::kCustomOpDomainAdd);
    for (const ort::CustomOp* op : {custom_op<QuantizedMatMul>(), custom_op<QuantizedGather>(),
                                    custom_op<PagedAttention>(), custom_op<GatedUnit>()}) {
      if (auto* status = add(domain, op)) return status;
    }
  }
  using AddDomain = ort::Status*(ort::SessionOptions*, ort::CustomOpDomain*);
  return api->get<AddDomain>(Entry::kAddCustomOpDomain)(options, domain);
}
