// The skeleton on a CPU core: load, add or add up, store. It knows nothing of a penalty; included once per
// instruction set.
#pragma once

#include <cstddef>
#include <type_traits>

#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// Entries added up in one go before they join the total: few enough that float32 sums of positive numbers stay within a
// few units of the last place.
constexpr int64_t kBlock = 1024;

// All lanes of `sums`, merged in order into `total`, which starts as they did.
template <class Vector, class Total, class VectorSums>
Total fold(Total total, const VectorSums& sums) {
  using Scalar = lane_t<Vector>;
  Total lane = total;
  constexpr size_t kFields = sizeof(total.fields) / sizeof(double);
  Scalar lanes[kFields][kLanes<Vector>];
  __builtin_memcpy(lanes, sums.fields, sizeof(lanes));
  for (int i = 0; i < kLanes<Vector>; ++i) {
    for (size_t field = 0; field < kFields; ++field) lane.fields[field] = lanes[field][i];
    total.merge(lane);
  }
  return total;
}
template <class Total, class ScalarSums>
Total converted(Total result, const ScalarSums& sums) {
  for (size_t i = 0; i < sizeof(result.fields) / sizeof(double); ++i) result.fields[i] = sums.fields[i];
  return result;
}

// Adds whole vectors of the entries in [begin, end) to `sums`, block by block; `begin` is a multiple of a block. Where
// entries come from is the source's affair. Returns how far it came.
template <class Source, class VectorSums>
R2_INLINE int64_t add_blocks(Source entries, int64_t begin, int64_t end, const VectorSums& zero, VectorSums& sums) {
  constexpr int kWidth = kLanes<typename Source::Vector>;
  int64_t i = begin;
  while (i + kWidth <= end) {
    const int64_t stop = i + kBlock < end ? i + kBlock : i + (end - i) / kWidth * kWidth;
    VectorSums block = zero, second_block = zero;  // two, so that one add need not wait for the last
    for (; i + 2 * kWidth <= stop; i += 2 * kWidth) {
      const Pair<typename Source::Vector> w = entries.pair(i);
      block.add(w.first);
      second_block.add(w.second);
    }
    if (i < stop) {
      block.add(entries.vector(i));
      i += kWidth;
    }
    block.merge(second_block);
    sums.merge(block);
  }
  return i;
}

// The sums of all lanes, and of the last entries, fewer than a vector has, each of them constructed from `arguments`.
template <template <class> class Sums, class Vector, class Storage, class... Arguments>
Sums<double> total_of(const Sums<Vector>& sums, const Storage* last, int64_t count, const Arguments&... arguments) {
  Sums<double> total = fold<Vector>(Sums<double>(arguments...), sums);
  Sums<lane_t<Vector>> rest(arguments...);
  for (int64_t i = 0; i < count; ++i) rest.add(static_cast<lane_t<Vector>>(last[i]));
  total.merge(converted(total, rest));
  return total;
}

// Entries as they are stored.
template <class Storage>
struct StoredEntries {
  using Vector = vector_t<Storage>;

  const Storage* weight;

  R2_INLINE Pair<Vector> pair(int64_t i) const { return load_pair(weight + i); }
  R2_INLINE Vector vector(int64_t i) const { return load(weight + i); }
};

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

  // The entries from `begin` on, `size` of them or as many as there are.
  Chunk part(int64_t begin, int64_t size) const {
    return Chunk(weight_ + begin, gradient_ == nullptr ? nullptr : gradient_ + begin,
                 begin + size < size_ ? size : size_ - begin);
  }

  // The same entries, one at a time in float64: for the few magnitudes that a float32 lane cannot hold.
  class InFloat64 {
   public:
    using Scalar = double;

    explicit InFloat64(const Chunk& chunk) : chunk_(chunk) {}
    int64_t size() const { return chunk_.size_; }
    template <template <class> class Sums, class... Arguments>
    Sums<double> sum(const Arguments&... arguments) const {
      Sums<double> sums(arguments...);
      for (int64_t i = 0; i < chunk_.size_; ++i) sums.add(static_cast<double>(chunk_.weight_[i]));
      return sums;
    }
    template <template <class> class Slope, class... Arguments>
    void apply(const Arguments&... arguments) const {
      const Slope<double> slope(arguments...);
      for (int64_t i = 0; i < chunk_.size_; ++i) {
        chunk_.put(static_cast<ChunkScalar>(slope(static_cast<double>(chunk_.weight_[i]))), i);
      }
    }

   private:
    using ChunkScalar = scalar_t<Storage>;
    const Chunk chunk_;
  };
  InFloat64 in_float64() const { return InFloat64(*this); }

  // The same entries in vectors of float64, a block at a time: for sums that cancel.
  class Widened {
   public:
    using Scalar = double;

    explicit Widened(const Chunk& chunk) : chunk_(chunk) {}
    int64_t size() const { return chunk_.size_; }
    template <template <class> class Sums, class... Arguments>
    Sums<double> sum(const Arguments&... arguments) const {
      Sums<double> total(arguments...);
      double block[kBlock];
      for (int64_t begin = 0; begin < chunk_.size_; begin += kBlock) {
        const int64_t count = chunk_.size_ - begin < kBlock ? chunk_.size_ - begin : kBlock;
        chunk_.widen(begin, count, block);
        total.merge(Chunk<double>(block, nullptr, count).template sum<Sums>(arguments...));
      }
      return total;
    }
    template <template <class> class Slope, class... Arguments>
    void apply(const Arguments&... arguments) const {
      double block[kBlock], slopes[kBlock];
      for (int64_t begin = 0; begin < chunk_.size_; begin += kBlock) {
        const int64_t count = chunk_.size_ - begin < kBlock ? chunk_.size_ - begin : kBlock;
        chunk_.widen(begin, count, block);
        Chunk<double, false>(block, slopes, count).template apply<Slope>(arguments...);
        chunk_.put_narrowed(slopes, begin, count);
      }
    }

   private:
    const Chunk chunk_;
  };
  auto widened() const {
    if constexpr (std::is_same_v<Storage, double>) {
      return *this;
    } else {
      return Widened(*this);
    }
  }

  // The sums over all entries, each lane's constructed from `arguments`.
  template <template <class> class Sums, class... Arguments>
  Sums<double> sum(const Arguments&... arguments) const {
    const Sums<Vector> zero(arguments...);
    Sums<Vector> sums = zero;
    const int64_t i = add_blocks(StoredEntries<Storage>{weight_}, 0, size_, zero, sums);
    return total_of<Sums, Vector>(sums, weight_ + i, size_ - i, arguments...);
  }

  // The gradient of each entry.
  template <template <class> class Slope, class... Arguments>
  void apply(const Arguments&... arguments) const {
    const Slope<Vector> slope(arguments...);
    int64_t i = 0;
    for (; i + 2 * kWidth <= size_; i += 2 * kWidth) {
      const Pair<Vector> w = load_pair(weight_ + i);
      Pair<Vector> slopes{slope(w.first), slope(w.second)};
      if constexpr (kAccumulate) {
        const Pair<Vector> old = load_pair(gradient_ + i);
        slopes = {old.first + slopes.first, old.second + slopes.second};
      }
      store_pair(gradient_ + i, slopes);
    }
    if (i + kWidth <= size_) {
      put(slope(load(weight_ + i)), i);
      i += kWidth;
    }
    const Slope<Scalar> scalar_slope(arguments...);
    for (; i < size_; ++i) put(scalar_slope(static_cast<Scalar>(weight_[i])), i);
  }

  // Both in one pass, for slopes that need no statistics. Gradients are touched only where the slope is nonzero, kLag
  // blocks of entries later: where that is is noted without a branch, which would be mispredicted, and the memory is
  // asked for in time.
  template <template <class> class Sums, template <class> class Slope>
  Sums<double> sum_and_apply(double parameter, double coefficient) const {
    const Slope<Vector> slope(parameter, coefficient);
    const Sums<Vector> zero(parameter);
    Sums<Vector> sums = zero;
    Touched touched[kLag];
    int64_t i = 0;
    for (int turn = 0; i + kWidth <= size_; turn = (turn + 1) % kLag) {
      const int64_t stop = i + kBlock < size_ ? i + kBlock : size_;
      Sums<Vector> block = zero;
      Touched& now = touched[turn];
      now.count = 0;
      for (; i + kWidth <= stop; i += kWidth) {
        const Vector w = load(weight_ + i);
        block.add(w);
        now.entries[now.count] = i;
        now.count += !all(slope.is_zero(w));
      }
      sums.merge(block);
      for (int64_t k = 0; k < now.count; ++k) __builtin_prefetch(gradient_ + now.entries[k], 1);
      Touched& oldest = touched[(turn + 1) % kLag];
      apply_where(oldest, slope);
      oldest.count = 0;
    }
    for (const Touched& last : touched) apply_where(last, slope);
    Sums<double> total = fold<Vector>(Sums<double>(parameter), sums);
    const Slope<Scalar> scalar_slope(parameter, coefficient);
    Sums<Scalar> rest(parameter);
    for (; i < size_; ++i) {
      const Scalar w = static_cast<Scalar>(weight_[i]);
      rest.add(w);
      if (!scalar_slope.is_zero(w)) put(scalar_slope(w), i);
    }
    total.merge(converted(total, rest));
    return total;
  }

 private:
  static constexpr int kWidth = kLanes<Vector>;
  // Blocks between asking for memory and using it: longer than it takes to come.
  static constexpr int kLag = 4;

  // The vectors of a block in which some slope is nonzero, by their first entry.
  struct Touched {
    int64_t count = 0;
    int64_t entries[kBlock / kWidth];
  };

  template <class VectorSlope>
  void apply_where(const Touched& touched, const VectorSlope& slope) const {
    for (int64_t k = 0; k < touched.count; ++k) {
      const int64_t i = touched.entries[k];
      put(slope(load(weight_ + i)), i);
    }
  }

  void widen(int64_t begin, int64_t count, double* to) const {
    Scalar block[kBlock];
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(block + i, load(weight_ + begin + i));
    for (; i < count; ++i) block[i] = static_cast<Scalar>(weight_[begin + i]);
    for (i = 0; i < count; ++i) to[i] = block[i];
  }
  void put_narrowed(const double* slopes, int64_t begin, int64_t count) const {
    Scalar block[kBlock];
    for (int64_t i = 0; i < count; ++i) block[i] = static_cast<Scalar>(slopes[i]);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) put(load(block + i), begin + i);
    for (; i < count; ++i) put(block[i], begin + i);
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
