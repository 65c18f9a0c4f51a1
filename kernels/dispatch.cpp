// Which kernels this processor runs.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "export.h"
#include "kernels.h"

namespace edge {

const Kernels* choose_kernels() {
  static const Kernels* const chosen = []() -> const Kernels* {
    const char* wanted = std::getenv("EDGE_KERNELS_INSTRUCTIONS");  // for tests and benchmarks: not the best, but this one
    for (const Kernels* kernels : {&avx512::kernels, &avxvnni::kernels, &avx2::kernels}) {
      if (wanted && *wanted && std::strcmp(wanted, kernels->instructions) != 0) continue;
      if (kernels->supported()) return kernels;
    }
    return nullptr;
  }();
  return chosen;
}

}  // namespace edge

// The instruction set in use, "" where there is none to use.
EXPORT const char* edge_kernels_instructions() {
  const edge::Kernels* kernels = edge::choose_kernels();
  return kernels ? kernels->instructions : "";
}

// See Kernels::multiply_bytes and multiply_floats; 0 where there is no such instruction set.
EXPORT int64_t edge_kernels_multiply(int64_t rounds, int floats) {
  const edge::Kernels* kernels = edge::choose_kernels();
  if (!kernels) return 0;
  return floats ? kernels->multiply_floats(rounds) : kernels->multiply_bytes(rounds);
}
