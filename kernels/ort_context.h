// What an operator sees of ONNX Runtime: its attributes when it is made, its tensors and threads when it is called.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace edge {

using ort::Entry;

// Throws what ONNX Runtime says when a call fails.
inline void check(const ort::Api* api, ort::Status* status, const char* what) {
  if (!status) return;
  const std::string message = api->get<const char*(const ort::Status*)>(Entry::kErrorMessage)(status);
  api->get<void(ort::Status*)>(Entry::kReleaseStatus)(status);
  throw std::runtime_error(std::string(what) + ": " + message);
}

// One call of an operator: its tensors, and the session's threads.
class Context {
 public:
  Context(const ort::Api* api, ort::KernelContext* context) : api_(api), context_(context) {}

  template <class T>
  const T* input(size_t index) const {
    const ort::Value* value = get_input(index);
    return value ? static_cast<const T*>(data(const_cast<ort::Value*>(value))) : nullptr;
  }

  std::vector<int64_t> dims(size_t index) const {
    ort::ShapeInfo* info = nullptr;
    using Get = ort::Status*(const ort::Value*, ort::ShapeInfo**);
    check(api_, api_->get<Get>(Entry::kGetTensorTypeAndShape)(get_input(index), &info), "a shape");
    size_t rank = 0;
    using Count = ort::Status*(const ort::ShapeInfo*, size_t*);
    check(api_, api_->get<Count>(Entry::kGetDimensionsCount)(info, &rank), "a rank");
    std::vector<int64_t> found(rank);
    using Dims = ort::Status*(const ort::ShapeInfo*, int64_t*, size_t);
    check(api_, api_->get<Dims>(Entry::kGetDimensions)(info, found.data(), rank), "dimensions");
    api_->get<void(ort::ShapeInfo*)>(Entry::kReleaseShapeInfo)(info);
    return found;
  }

  float* output(int64_t rows, int64_t columns) const {
    const int64_t shape[2] = {rows, columns};
    ort::Value* value = nullptr;
    using Get = ort::Status*(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**);
    check(api_, api_->get<Get>(Entry::kOutput)(context_, 0, shape, 2, &value), "an output");
    return static_cast<float*>(data(value));
  }

  // function(0) … function(count − 1), on the session's threads.
  template <class Function>
  void parallel(int64_t count, const Function& function) const {
    if (count == 0) return;
    if (count == 1) return function(0);
    using Run = ort::Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    const auto call = [](void* user, size_t i) { (*static_cast<const Function*>(user))(int64_t(i)); };
    void* user = const_cast<Function*>(&function);
    check(api_, api_->get<Run>(Entry::kParallelFor)(context_, call, size_t(count), 0, user), "a parallel loop");
  }

 private:
  const ort::Value* get_input(size_t index) const {
    size_t count = 0;
    using Count = ort::Status*(const ort::KernelContext*, size_t*);
    check(api_, api_->get<Count>(Entry::kInputCount)(context_, &count), "the input count");
    if (index >= count) return nullptr;
    const ort::Value* value = nullptr;
    using Get = ort::Status*(const ort::KernelContext*, size_t, const ort::Value**);
    check(api_, api_->get<Get>(Entry::kInput)(context_, index, &value), "an input");
    return value;
  }

  void* data(ort::Value* value) const {
    void* found = nullptr;
    using Get = ort::Status*(ort::Value*, void**);
    check(api_, api_->get<Get>(Entry::kGetTensorMutableData)(value, &found), "tensor data");
    return found;
  }

  const ort::Api* api_;
  ort::KernelContext* context_;
};

class Attributes {
 public:
  Attributes(const ort::Api* api, const ort::KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const char* name) const { return required<int64_t>(Entry::kAttributeInt64, name); }
  int64_t integer(const char* name, int64_t absent) const { return get(Entry::kAttributeInt64, name, absent); }
  float real(const char* name) const { return required<float>(Entry::kAttributeFloat, name); }
  float real(const char* name, float absent) const { return get(Entry::kAttributeFloat, name, absent); }

 private:
  template <class T>
  using Get = ort::Status*(const ort::KernelInfo*, const char*, T*);

  template <class T>
  T required(Entry entry, const char* name) const {
    T value{};
    check(api_, api_->get<Get<T>>(entry)(info_, name, &value), name);
    return value;
  }

  template <class T>
  T get(Entry entry, const char* name, T absent) const {
    T value{};
    ort::Status* status = api_->get<Get<T>>(entry)(info_, name, &value);
    if (!status) return value;
    api_->get<void(ort::Status*)>(Entry::kReleaseStatus)(status);
    return absent;
  }

  const ort::Api* api_;
  const ort::KernelInfo* info_;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace edge
