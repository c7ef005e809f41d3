// The penalties over chunks and spans, for the tables of kernels.h.
#pragma once

#include "chunk.h"
#include "kernels.h"
#include "soft_min_max_bundle.h"

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

// What computes a bundle of segments side by side, of the penalties that have it.
template <class Penalty, class Bundle>
struct BundleOf {
  static constexpr bool kExists = false;
};
template <class Bundle>
struct BundleOf<SoftMinMax, Bundle> {
  static constexpr bool kExists = true;
  using type = SoftMinMaxBundle<Bundle>;
};

template <class Penalty, class Storage>
struct ForSpan {
  using Row = typename Penalty::Row;
  using OfChunk = ForChunk<Penalty, Storage>;
  template <bool kAccumulate>
  using BundleFor = Bundle<Storage, kAccumulate>;
  static constexpr bool kHasBundle = BundleOf<Penalty, BundleFor<true>>::kExists;
  static constexpr int64_t kRowSize = sizeof(Row) / sizeof(double);

  static void reduce(const Span& span, double* rows, SpanValues& values) {
    for_each_bundle<true>(
        span,
        [&](auto& together, int64_t first) {
          return together.reduce(reinterpret_cast<Row*>(rows + first * kRowSize), values.values + first,
                                 values.parameter_gradients + first);
        },
        [&](int64_t i) {
          const Row row = Penalty::reduce(Chunk<Storage>(weight(span, i), nullptr, span.size), span.parameters[i]);
          OfChunk::save(row, rows + i * kRowSize);
          finalize(row, span, i, values);
        });
  }
  template <bool kAccumulate>
  static void apply(const Span& span, const double* rows) {
    for_each_bundle<kAccumulate>(
        span,
        [&](auto& together, int64_t first) {
          return together.apply(reinterpret_cast<const Row*>(rows + first * kRowSize), span.coefficients + first);
        },
        [&](int64_t i) {
          OfChunk::template apply<kAccumulate>(weight(span, i), gradient(span, i), span.size, rows + i * kRowSize,
                                               span.parameters[i], span.coefficients[i]);
        });
  }
  static void reduce_and_add(const Span& span, SpanValues& values) {
    for_each_bundle<true>(
        span,
        [&](auto& together, int64_t first) {
          return together.reduce_and_apply(span.coefficients + first, values.values + first,
                                           values.parameter_gradients + first);
        },
        [&](int64_t i) {
          const Chunk<Storage> chunk(weight(span, i), gradient(span, i), span.size);
          const double parameter = span.parameters[i], coefficient = span.coefficients[i];
          if constexpr (Penalty::kIsOnePass) {
            finalize(Penalty::reduce_and_apply(chunk, parameter, coefficient), span, i, values);
          } else {
            const Row row = Penalty::reduce(chunk, parameter);
            finalize(row, span, i, values);
            Penalty::apply(chunk, row, parameter, coefficient);
          }
        });
  }

  // Calls together(bundle of the penalty, its first segment) for as many segments at a time as go together, and where
  // they do not, alone(i) for each.
  template <bool kAccumulate, class Together, class Alone>
  static void for_each_bundle(const Span& span, const Together& together, const Alone& alone) {
    // Of longer ones the sums of a lane would become too long, and what is done once for each does not matter.
    constexpr int64_t kLongest = kBlock;
    constexpr int64_t kWidth = BundleFor<kAccumulate>::kWidth;
    for (int64_t first = 0; first < span.count; first += kWidth) {
      const int64_t count = span.count - first < kWidth ? span.count - first : kWidth;
      if constexpr (kHasBundle) {
        if (span.size <= kLongest) {
          void* to = span.gradient == nullptr ? nullptr : gradient(span, first);
          const BundleFor<kAccumulate> bundle(weight(span, first), to, count, span.size);
          typename BundleOf<Penalty, BundleFor<kAccumulate>>::type of_penalty(bundle, span.parameters + first);
          if (together(of_penalty, first)) continue;
        }
      }
      for (int64_t i = first; i < first + count; ++i) alone(i);
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

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
