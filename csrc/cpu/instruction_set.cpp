// Chooses the instruction set once, when the library is first used.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace r2 {

namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("R2_KERNELS_INSTRUCTION_SET");
  const std::string name = wanted == nullptr ? "" : wanted;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name.empty() || name == "avx512")) return kAvx512;
  if (has_avx2 && (name.empty() || name == "avx2")) return kAvx2;
#endif
  if (name.empty() || name == "portable") return kPortable;
  throw std::runtime_error(
      "R2_KERNELS_INSTRUCTION_SET: expected 'avx512', 'avx2' or 'portable', one that this "
      "processor has, got '" +
      name + "'");
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace r2
