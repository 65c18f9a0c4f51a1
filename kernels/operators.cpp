// The operators of the domain "edge_glm", made known to ONNX Runtime; exporters/onnx_edge_builder.py emits them.
#include <iterator>
#include <string>

#include "attention_operator.h"
#include "export.h"
#include "kernels.h"
#include "matrix_operators.h"
#include "ort_context.h"

namespace edge {
namespace {

using ort::Entry;

// An operator is a class with a name, the types of its inputs (those from kRequired on may be absent), a constructor
// from attributes and a call.
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
