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
// Where a sparse penalty has no slope in this chunk, the chunk is only gathered.
struct StepPenalty {
  const double* row;
  double parameter, coefficient;
  bool is_decoupled, has_slope;
  double next_parameter;  // what the new weights are gathered for
};

// Steps a chunk, its gradients multiplied with `gradient_scale` as they are read, and writes the row of the new weights
// to `new_row` where it can do so while they are in registers; returns whether it could.
template <class Scalars>
using StepKernel = bool (*)(const StepArrays& arrays, const Scalars& scalars, double gradient_scale,
                            const StepPenalty& penalty, const RoundingKey& rounding, double* new_row);

struct StepKernels {
  StepKernel<AdamWScalars> adamw;
  StepKernel<SgdScalars> sgd;
};

// By penalty, and at kPenaltyCount for none.
struct StepTable {
  StepKernels kernels[kPenaltyCount + 1];
};

}  // namespace r2
