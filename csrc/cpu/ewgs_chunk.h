// EWGS over chunks, for the table of ewgs_kernels.h.
#pragma once

#include "ewgs_kernels.h"
#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

template <class Storage>
struct EwgsChunk {
  using Vector = vector_t<Storage>;
  using Scalar = scalar_t<Storage>;
  static constexpr int kWidth = kLanes<Vector>;
  // Entries added up in one go before they join the total, as in chunk.h.
  static constexpr int64_t kBlock = 1024;

  static void forward(const void* values, void* outputs, int64_t size, const EwgsEnds& ends, int64_t levels) {
    const Storage* from = static_cast<const Storage*>(values);
    Storage* to = static_cast<Storage*>(outputs);
    const Ewgs<Vector> quantize(ends, levels, 0);
    int64_t i = 0;
    for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
      const Pair<Vector> pair = load_pair(from + i);
      store_pair(to + i, Pair<Vector>{quantize(pair.first), quantize(pair.second)});
    }
    const Ewgs<Scalar> quantize_one(ends, levels, 0);
    for (; i < size; ++i) to[i] = static_cast<Storage>(quantize_one(static_cast<Scalar>(from[i])));
  }

  static void backward(const void* values, const void* output_gradients, void* gradients, int64_t size,
                       const EwgsEnds& ends, int64_t levels, double delta, double* sums) {
    const Storage* from = static_cast<const Storage*>(values);
    const Storage* given = static_cast<const Storage*>(output_gradients);
    Storage* to = static_cast<Storage*>(gradients);
    const Ewgs<Vector> quantize(ends, levels, delta);
    typename Ewgs<Vector>::Sums total;
    int64_t i = 0;
    while (i + 2 * kWidth <= size) {
      typename Ewgs<Vector>::Sums first, second;  // two, so that one add need not wait for the last
      const int64_t stop = i + kBlock < size ? i + kBlock : size;
      for (; i + 2 * kWidth <= stop; i += 2 * kWidth) {
        const Pair<Vector> value = load_pair(from + i), gradient = load_pair(given + i);
        store_pair(to + i, Pair<Vector>{quantize.gradient(value.first, gradient.first, first),
                                        quantize.gradient(value.second, gradient.second, second)});
      }
      first.merge(second);
      total.merge(first);
    }
    const Ewgs<Scalar> quantize_one(ends, levels, delta);
    typename Ewgs<Scalar>::Sums rest;
    for (; i < size; ++i) {
      to[i] = static_cast<Storage>(
          quantize_one.gradient(static_cast<Scalar>(from[i]), static_cast<Scalar>(given[i]), rest));
    }
    for (int field = 0; field < 4; ++field) {
      sums[field] = rest.fields[field];
      for (int lane = 0; lane < kWidth; ++lane) sums[field] += total.fields[field][lane];
    }
  }

  static constexpr EwgsKernels table() { return {forward, backward}; }
};

constexpr EwgsKernels kEwgs[kStorageCount] = {EwgsChunk<float>::table(), EwgsChunk<double>::table(),
                                              EwgsChunk<BFloat16>::table(), EwgsChunk<Half>::table()};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
