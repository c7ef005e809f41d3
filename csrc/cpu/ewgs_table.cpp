#include "ewgs_kernels.h"

namespace r2 {

const EwgsTable& ewgs_table() {
#if defined(__x86_64__)
  if (&instruction_set() == &kAvx512) return kAvx512Ewgs;
  if (&instruction_set() == &kAvx2) return kAvx2Ewgs;
#endif
  return kPortableEwgs;
}

}  // namespace r2
