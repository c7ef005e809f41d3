// Fills the table of kernels.h for the instruction set of the including file.
#pragma once

#include "chunk.h"
#include "kernels.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

template <class Penalty, class Storage>
struct ForChunk {
  using Row = typename Penalty::Row;

  static void reduce(const void* weight, int64_t size, double parameter, double* row) {
    save(Penalty::reduce(Chunk<Storage>(weight, nullptr, size), parameter), row);
  }
  template <bool kAccumulate>
  static void apply(const void* weight, void* gradient, int64_t size, const double* row, double parameter,
                    double coefficient) {
    Row segment;
    __builtin_memcpy(&segment, row, sizeof(segment));
    Penalty::apply(Chunk<Storage, kAccumulate>(weight, gradient, size), segment, parameter, coefficient);
  }
  static void reduce_and_add(const void* weight, void* gradient, int64_t size, double parameter, double coefficient,
                             double* row) {
    save(Penalty::reduce_and_apply(Chunk<Storage>(weight, gradient, size), parameter, coefficient), row);
  }

  static void save(const Row& row, double* to) { __builtin_memcpy(to, &row, sizeof(row)); }

  static constexpr ChunkKernels table() {
    ChunkKernels kernels{reduce, apply<false>, apply<true>, nullptr};
    if constexpr (Penalty::kIsOnePass) kernels.reduce_and_add = reduce_and_add;
    return kernels;
  }
};

#define R2_FOR_STORAGES(Penalty)                                                                                \
  {ForChunk<Penalty, float>::table(), ForChunk<Penalty, double>::table(), ForChunk<Penalty, BFloat16>::table(), \
   ForChunk<Penalty, Half>::table()}

}  // namespace R2_INSTRUCTION_SET

const InstructionSet R2_TABLE = {R2_NAME_OF_INSTRUCTION_SET,
                                 {R2_FOR_STORAGES(LInf), R2_FOR_STORAGES(Margin), R2_FOR_STORAGES(SoftMinMax)}};

}  // namespace r2
