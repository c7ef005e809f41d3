#include "step_kernels.h"

namespace r2 {

const StepTable& step_table() {
#if defined(__x86_64__)
  if (&instruction_set() == &kAvx512) return kAvx512Steps;
  if (&instruction_set() == &kAvx2) return kAvx2Steps;
#endif
  return kPortableSteps;
}

}  // namespace r2
