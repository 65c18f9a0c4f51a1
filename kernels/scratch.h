// Memory that an operator needs only while it is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// Scratch memory of one operator call, kept by the calling thread for the next. At most two pieces.
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
  std::vector<char> buffers_[2];
  size_t next_ = 0;
};

}  // namespace edge
