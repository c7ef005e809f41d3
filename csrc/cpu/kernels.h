// What an instruction set offers the operators, with the same signatures for all.
#pragma once

#include <cstdint>

#include "../penalties.h"

namespace r2 {

enum Storage : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kStorageCount };
constexpr int kPenaltyCount = Penalties::kCount;

// Over one chunk: `weight` and `gradient` point to `size` entries of the storage type, `row` to one row of statistics
// (the chunk's for reduce, its whole segment's for apply), `parameter` is M or the temperature, 0 if there is none.
struct ChunkKernels {
  // weights -> the chunk's row
  void (*reduce)(const void* weight, int64_t size, double parameter, double* row);
  // weights and the segment's row -> gradients, times `coefficient`: written, or added to what is there
  void (*write)(const void* weight, void* gradient, int64_t size, const double* row, double parameter,
                double coefficient);
  void (*add)(const void* weight, void* gradient, int64_t size, const double* row, double parameter,
              double coefficient);
  // weights -> the chunk's row, and gradients added; null for penalties whose gradient needs the segment's statistics
  void (*reduce_and_add)(const void* weight, void* gradient, int64_t size, double parameter, double coefficient,
                         double* row);
};

// At most so many consecutive short segments of one weight, of equal size.
inline constexpr int64_t kSpan = 16;

struct Span {
  const void* weight;
  void* gradient;  // in the weight's order; null where none is asked for
  int64_t count, size;
  double parameters[kSpan], coefficients[kSpan];
};

// What finalize() of r2_kernels/ops.py gives for the segments of a span.
struct SpanValues {
  double values[kSpan], parameter_gradients[kSpan];
};

// Over whole segments, `rows` being theirs, one after the other.
struct SpanKernels {
  void (*reduce)(const Span& span, double* rows, SpanValues& values);
  void (*write)(const Span& span, const double* rows);
  void (*add)(const Span& span, const double* rows);
  void (*reduce_and_add)(const Span& span, SpanValues& values);
};

struct StepTable;
struct EwgsKernels;
struct DkmKernels;

struct InstructionSet {
  const char* name;
  ChunkKernels kernels[kPenaltyCount][kStorageCount];
  SpanKernels span_kernels[kPenaltyCount][kStorageCount];
  const StepTable* steps;   // step_kernels.h
  const EwgsKernels* ewgs;  // ewgs_kernels.h: by storage type
  const DkmKernels* dkm;    // dkm_kernels.h: by storage type
};

// The best one that this processor has.
const InstructionSet& instruction_set();

extern const InstructionSet kAvx512, kAvx2, kPortable;

}  // namespace r2
