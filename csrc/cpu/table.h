// Fills the table of kernels.h for the instruction set of the including file.
#pragma once

#include "chunk_kernels.h"
#include "dkm_chunk.h"
#include "ewgs_chunk.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

extern const StepTable kSteps;  // of steps_*.cpp, which are files of their own since they take long to compile

#define R2_FOR_STORAGES(For, Penalty)                                                            \
  {For<Penalty, float>::table(), For<Penalty, double>::table(), For<Penalty, BFloat16>::table(), \
   For<Penalty, Half>::table()}
template <class... Of>
constexpr InstructionSet table_of(PenaltyList<Of...>) {
  return {R2_NAME_OF_INSTRUCTION_SET,
          {R2_FOR_STORAGES(ForChunk, Of)...},
          {R2_FOR_STORAGES(ForSpan, Of)...},
          &kSteps,
          kEwgs,
          kDkm};
}

}  // namespace R2_INSTRUCTION_SET

constexpr InstructionSet R2_TABLE = table_of(Penalties());

}  // namespace r2
