// What an instruction set offers the operators of EWGS: one entry per storage type.
#pragma once

#include "../ewgs.h"
#include "kernels.h"

namespace r2 {

// Over `size` entries of the storage type; `sums` are four numbers, as Ewgs::Sums has them.
struct EwgsKernels {
  void (*forward)(const void* values, void* outputs, int64_t size, const EwgsEnds& ends, int64_t levels);
  void (*backward)(const void* values, const void* output_gradients, void* gradients, int64_t size,
                   const EwgsEnds& ends, int64_t levels, double delta, double* sums);
};

}  // namespace r2
