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

template <class Penalty, class Storage>
struct ForSpan {
  using Row = typename Penalty::Row;
  using OfChunk = ForChunk<Penalty, Storage>;
  static constexpr int64_t kRowSize = sizeof(Row) / sizeof(double);

  static void reduce(const Span& span, double* rows, SpanValues& values) {
    for (int64_t i = 0; i < span.count; ++i) {
      const Row row = Penalty::reduce(Chunk<Storage>(weight(span, i), nullptr, span.size), span.parameters[i]);
      OfChunk::save(row, rows + i * kRowSize);
      finalize(row, span, i, values);
    }
  }
  template <bool kAccumulate>
  static void apply(const Span& span, const double* rows) {
    for (int64_t i = 0; i < span.count; ++i) {
      OfChunk::template apply<kAccumulate>(weight(span, i), gradient(span, i), span.size, rows + i * kRowSize,
                                           span.parameters[i], span.coefficients[i]);
    }
  }
  static void reduce_and_add(const Span& span, SpanValues& values) {
    for (int64_t i = 0; i < span.count; ++i) {
      const Chunk<Storage> chunk(weight(span, i), gradient(span, i), span.size);
      const double parameter = span.parameters[i], coefficient = span.coefficients[i];
      if constexpr (Penalty::kIsOnePass) {
        finalize(Penalty::reduce_and_apply(chunk, parameter, coefficient), span, i, values);
      } else {
        const Row row = Penalty::reduce(chunk, parameter);
        finalize(row, span, i, values);
        Penalty::apply(chunk, row, parameter, coefficient);
      }
    }
  }

  static const void* weight(const Span& span, int64_t i) {
    return static_cast<const Storage*>(span.weight) + i * span.size;
  }
  static void* gradient(const Span& span, int64_t i) { return static_cast<Storage*>(span.gradient) + i * span.size; }
  static void finalize(const Row& row, const Span& span, int64_t i, SpanValues& values) {
    const Value value = row.finalize(span.parameters[i]);
    values.values[i] = value.value;
    values.parameter_gradients[i] = value.parameter_gradient;
  }

  static constexpr SpanKernels table() { return {reduce, apply<false>, apply<true>, reduce_and_add}; }
};

#define R2_FOR_STORAGES(For, Penalty)                                                            \
  {For<Penalty, float>::table(), For<Penalty, double>::table(), For<Penalty, BFloat16>::table(), \
   For<Penalty, Half>::table()}
#define R2_FOR_PENALTIES(For) \
  {R2_FOR_STORAGES(For, LInf), R2_FOR_STORAGES(For, Margin), R2_FOR_STORAGES(For, SoftMinMax)}

}  // namespace R2_INSTRUCTION_SET

const InstructionSet R2_TABLE = {R2_NAME_OF_INSTRUCTION_SET, R2_FOR_PENALTIES(ForChunk), R2_FOR_PENALTIES(ForSpan)};

}  // namespace r2
