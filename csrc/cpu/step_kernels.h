// What an instruction set offers the optimizers' operators: one entry per rule and penalty.
#pragma once

#include "../optimizers.h"
#include "kernels.h"

namespace r2 {

// Whether bfloat16 is rounded stochastically, and what the random bits of a chunk follow from, besides an entry's
// place.
struct RoundingKey {
  bool is_stochastic;
  uint32_t first, second;
};

// Consecutive entries of one weight with their gradients and what the optimizer keeps for them.
struct StepArrays {
  static constexpr int kMostStates = 3;

  char* weight;
  const char* gradient;
  char* states[kMostStates];  // null beyond those in use
  Storage weight_storage, gradient_storage, state_storage;
  int64_t size;
};

// The penalty's part: `coefficient` times the slope joins the gradient, or where it is decoupled is taken off the
// weight before the update. `row` is of the whole segment, `parameter` M or the temperature that it was gathered with.
struct StepPenalty {
  const double* row;
  double parameter, coefficient;
  bool is_decoupled;
};

// `gradient_scale` multiplies the gradients as they are read.
template <class Scalars>
using StepKernel = void (*)(const StepArrays& arrays, const Scalars& scalars, double gradient_scale,
                            const StepPenalty& penalty, const RoundingKey& rounding);

struct StepKernels {
  StepKernel<AdamWScalars> adamw;
  StepKernel<SgdScalars> sgd;
};

// By PenaltyIndex, and kPenaltyCount for none.
struct StepTable {
  StepKernels kernels[kPenaltyCount + 1];
};

// Of the instruction set that kernels.h chooses.
const StepTable& step_table();

extern const StepTable kAvx512Steps, kAvx2Steps, kPortableSteps;

}  // namespace r2
