// DKM over chunks, for the table of dkm_kernels.h.
#pragma once

#include <type_traits>

#include "dkm_kernels.h"
#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// Each kernel goes over whole vectors of entries, then over single entries: V says which.
template <class Storage>
struct DkmChunk {
  using Vector = vector_t<Storage>;
  using Scalar = scalar_t<Storage>;
  // Entries added up in one go before they join the total, as in chunk.h.
  static constexpr int64_t kBlock = 1024;

  static void sum(const void* entries, int64_t size, const DkmIteration& iteration, double* sums) {
    const Storage* from = static_cast<const Storage*>(entries);
    each_width(size, [&](auto kind, int64_t begin, int64_t end) {
      using V = decltype(kind);
      DkmEntries<V> at(iteration);
      add_up<V>(begin, end, dkm_sums(iteration.clusters), sums,
                [&](int64_t i, V* lanes) { at.add_to(lanes, load_as<V>(from + i)); });
    });
  }

  static void output(const void* entries, void* outputs, int64_t size, const DkmIteration& iteration) {
    const Storage* from = static_cast<const Storage*>(entries);
    Storage* to = static_cast<Storage*>(outputs);
    each_width(size, [&](auto kind, int64_t begin, int64_t end) {
      using V = decltype(kind);
      DkmEntries<V> at(iteration);
      for (int64_t i = begin; i < end; i += kWidth<V>) store_as(to + i, at.output(load_as<V>(from + i)));
    });
  }

  static void sum_of_outputs(const void* entries, const void* output_gradients, int64_t size,
                             const DkmIteration& iteration, double* of_updated) {
    const Storage* from = static_cast<const Storage*>(entries);
    const Storage* given = static_cast<const Storage*>(output_gradients);
    each_width(size, [&](auto kind, int64_t begin, int64_t end) {
      using V = decltype(kind);
      DkmEntries<V> at(iteration);
      add_up<V>(begin, end, iteration.clusters, of_updated,
                [&](int64_t i, V* lanes) { at.add_of_outputs(lanes, load_as<V>(from + i), load_as<V>(given + i)); });
    });
  }

  static void backward(const void* entries, const void* output_gradients, void* carried, void* gradients, int64_t size,
                       const DkmIteration& iteration, double* of_centroids) {
    const Storage* from = static_cast<const Storage*>(entries);
    const Storage* given = static_cast<const Storage*>(output_gradients);
    Scalar* sum = static_cast<Scalar*>(carried);
    Storage* to = static_cast<Storage*>(gradients);
    const double factor = 2 / iteration.temperature;
    each_width(size, [&](auto kind, int64_t begin, int64_t end) {
      using V = decltype(kind);
      DkmEntries<V> at(iteration);
      add_up<V>(begin, end, iteration.clusters, of_centroids, [&](int64_t i, V* lanes) {
        const V gradient = iteration.is_last ? load_as<V>(given + i) : broadcast<V>(0);
        const auto slope = at.slope(load_as<V>(from + i), gradient, lanes);
        V total = slope.through_moments - broadcast<V>(factor) * slope.through_attention;
        if (!iteration.is_last) total = total + load_as<V>(sum + i);
        if (iteration.is_first) {
          store_as(to + i, total);
        } else {
          store_as(sum + i, total);
        }
      });
    });
    for (int64_t j = 0; j < iteration.clusters; ++j) of_centroids[j] *= factor;
  }

  static constexpr DkmKernels table() { return {sum, output, sum_of_outputs, backward}; }

 private:
  template <class V>
  static constexpr int64_t kWidth = sizeof(V) / sizeof(lane_t<V>);

  // Calls work(V{}, begin, end) for the whole vectors of `size` entries, and for the rest.
  template <class Work>
  static void each_width(int64_t size, const Work& work) {
    const int64_t whole = size - size % kWidth<Vector>;
    if (whole > 0) work(Vector{}, 0, whole);
    if (whole < size) work(Scalar{}, whole, size);
  }

  // Adds to `sums` what add(i, lanes) adds to so many lanes.
  template <class V, class Add>
  static void add_up(int64_t begin, int64_t end, int64_t count, double* sums, const Add& add) {
    V lanes[2 * kMostClusters + 1];
    for (int64_t i = begin; i < end;) {
      for (int64_t k = 0; k < count; ++k) lanes[k] = broadcast<V>(0);
      const int64_t stop = i + kBlock < end ? i + kBlock : end;
      for (; i < stop; i += kWidth<V>) add(i, lanes);
      for (int64_t k = 0; k < count; ++k) sums[k] += across(lanes[k]);
    }
  }

  template <class V>
  R2_INLINE static double across(V lanes) {
    if constexpr (kWidth<V> == 1) {
      return lanes;
    } else {
      double sum = 0;
      for (int lane = 0; lane < kWidth<V>; ++lane) sum += lanes[lane];
      return sum;
    }
  }

  template <class V, class T>
  R2_INLINE static V load_as(const T* from) {
    if constexpr (kWidth<V> == 1) {
      return static_cast<V>(*from);
    } else {
      return load(from);
    }
  }
  template <class V, class T>
  R2_INLINE static void store_as(T* to, V x) {
    if constexpr (kWidth<V> == 1) {
      *to = static_cast<T>(x);
    } else {
      store(to, x);
    }
  }
};

constexpr DkmKernels kDkm[kStorageCount] = {DkmChunk<float>::table(), DkmChunk<double>::table(),
                                            DkmChunk<BFloat16>::table(), DkmChunk<Half>::table()};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
