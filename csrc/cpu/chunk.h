// The skeleton on a CPU core: load, add or add up, store. It knows nothing of a penalty; included once per
// instruction set.
#pragma once

#include <cstddef>

#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// Consecutive entries of one weight, and where their gradients are or go.
//
//   weight      `size` entries of Storage, at any alignment
//   gradient    as many, or null where only sums are asked for
//   kAccumulate whether a gradient is added to what is there, or written over it
template <class Storage, bool kAccumulate = true>
class Chunk {
 public:
  using Scalar = scalar_t<Storage>;
  using Vector = vector_t<Storage>;

  Chunk(const void* weight, void* gradient, int64_t size)
      : weight_(static_cast<const Storage*>(weight)), gradient_(static_cast<Storage*>(gradient)), size_(size) {}

  int64_t size() const { return size_; }

  // The sums over all entries, each lane's constructed from `arguments`.
  template <template <class> class Sums, class... Arguments>
  Sums<double> sum(const Arguments&... arguments) const {
    return add_up(Sums<Vector>(arguments...), Sums<Scalar>(arguments...), Sums<double>(arguments...),
                  [](const auto& /*w*/, int64_t /*i*/) {});
  }

  // The gradient of each entry.
  template <template <class> class Slope, class... Arguments>
  void apply(const Arguments&... arguments) const {
    const Slope<Vector> slope(arguments...);
    int64_t i = 0;
    for (; i + kWidth <= size_; i += kWidth) put(slope(load(weight_ + i)), i);
    const Slope<Scalar> scalar_slope(arguments...);
    for (; i < size_; ++i) put(scalar_slope(static_cast<Scalar>(weight_[i])), i);
  }

  // Both in one pass, for slopes that need no statistics; gradients are touched only where the slope is nonzero.
  template <template <class> class Sums, template <class> class Slope, class Parameter>
  Sums<double> sum_and_apply(const Parameter& parameter, double coefficient) const {
    const Slope<Vector> slope(parameter, coefficient);
    const Slope<Scalar> scalar_slope(parameter, coefficient);
    return add_up(Sums<Vector>(parameter), Sums<Scalar>(parameter), Sums<double>(parameter),
                  [&](const auto& w, int64_t i) {
                    if constexpr (sizeof(w) == sizeof(Vector)) {
                      if (any(slope.is_nonzero(w))) put(slope(w), i);
                    } else {
                      if (scalar_slope.is_nonzero(w)) put(scalar_slope(w), i);
                    }
                  });
  }

 private:
  static constexpr int kWidth = kLanes<Vector>;
  static constexpr int kUnroll = 2;
  // Entries added up in one go before they join the total: few enough that float32 sums of positive numbers stay
  // within a few units of the last place.
  static constexpr int64_t kBlock = 1024;

  template <class VectorSums, class ScalarSums, class Total, class Visit>
  Total add_up(const VectorSums& start, const ScalarSums& scalar_start, Total total, const Visit& visit) const {
    VectorSums blocks = start;
    int64_t i = 0;
    while (i + kUnroll * kWidth <= size_) {
      const int64_t stop = i + kBlock < size_ ? i + kBlock : size_;
      VectorSums even = start, odd = start;
      for (; i + kUnroll * kWidth <= stop; i += kUnroll * kWidth) {
        const Vector first = load(weight_ + i), second = load(weight_ + i + kWidth);
        even.add(first);
        visit(first, i);
        odd.add(second);
        visit(second, i + kWidth);
      }
      even.merge(odd);
      blocks.merge(even);
    }
    for (int lane = 0; lane < kWidth; ++lane) total.merge(as_double(total, blocks, [=](Vector v) { return v[lane]; }));
    ScalarSums rest = scalar_start;
    for (; i < size_; ++i) {
      const Scalar w = static_cast<Scalar>(weight_[i]);
      rest.add(w);
      visit(w, i);
    }
    total.merge(as_double(total, rest, [](Scalar x) { return x; }));
    return total;
  }

  template <class Total, class Sums, class Get>
  static Total as_double(const Total& like, const Sums& sums, const Get& get) {
    Total result = like;
    for (size_t i = 0; i < sizeof(result.fields) / sizeof(double); ++i) result.fields[i] = get(sums.fields[i]);
    return result;
  }

  void put(Vector slope, int64_t i) const {
    if constexpr (kAccumulate) slope = load(gradient_ + i) + slope;
    store(gradient_ + i, slope);
  }
  void put(Scalar slope, int64_t i) const {
    if constexpr (kAccumulate) slope = static_cast<Scalar>(gradient_[i]) + slope;
    gradient_[i] = static_cast<Storage>(slope);
  }

  const Storage* weight_;
  Storage* gradient_;
  int64_t size_;
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
