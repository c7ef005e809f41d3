// The skeleton for short segments on a CPU core: as many as a vector has lanes, side by side. It knows nothing of a
// penalty; included once per instruction set.
#pragma once

#include <cstddef>
#include <utility>

#include "vector.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// Up to kWidth consecutive segments of one size. Each is read vector by vector; what its lanes have added up is then
// folded for all segments at once, so that lane i holds the sums of segment i, and what follows from these is computed
// for a vector of segments. The lanes of segments that are not there repeat the last one's.
//
//   weight      `count` times `size` entries of Storage, at any alignment
//   gradient    as many, or null where only sums are asked for
//   kAccumulate whether a gradient is added to what is there, or written over it
template <class Storage, bool kAccumulate = true>
class Bundle {
 public:
  using Scalar = scalar_t<Storage>;
  using Vector = vector_t<Storage>;
  using Doubles = DoubleVector;
  static constexpr int kWidth = kLanes<Vector>;
  static constexpr int kDoubles = kLanes<Doubles>;  // divides kWidth

  Bundle(const void* weight, void* gradient, int64_t count, int64_t size)
      : weight_(static_cast<const Storage*>(weight)),
        gradient_(static_cast<Storage*>(gradient)),
        count_(count),
        size_(size) {}

  int64_t count() const { return count_; }
  int64_t size() const { return size_; }

  // Lane i of the result: the sums of segment i, which start as make(i).
  template <class Make>
  auto sum(const Make& make) const {
    using Sums = decltype(make(0));
    constexpr int kFields = sizeof(Sums::fields) / sizeof(Vector);
    Vector fields[kWidth][kFields];
    for (int i = 0; i < kWidth; ++i) {
      if (i < count_) {
        Sums sums = make(i);
        // The first look waits for memory anyway: the gradients are asked for, which the last one needs.
        if (Sums::kIsFirstLook && gradient_ != nullptr) ask_for<1>(gradient_ + i * size_);
        add_segment(sums, weight_ + i * size_);
        for (int field = 0; field < kFields; ++field) fields[i][field] = sums.fields[field];
      } else {
        for (int field = 0; field < kFields; ++field) fields[i][field] = fields[count_ - 1][field];
      }
    }
    Sums folded = make(0);
    fold<1>(folded, fields);
    return folded;
  }

  // The gradient of each entry of segment i is make(i) of the entry.
  template <class Make>
  void apply(const Make& make) const {
    for (int i = 0; i < count_; ++i) {
      ask_for<0>(weight_ + (i + kWidth) * size_);  // of the next bundle
      apply_to_segment(make(i), i * size_);
    }
  }

 private:
  using Bits = bits_t<Vector>;

  // Prefetches a segment's lines, to read or to write.
  template <int kToWrite>
  R2_INLINE void ask_for(const Storage* entries) const {
    constexpr int64_t kLine = 64 / sizeof(Storage);
    for (int64_t i = 0; i < size_; i += kLine) __builtin_prefetch(entries + i, kToWrite);
  }

  template <class Sums>
  R2_INLINE void add_segment(Sums& sums, const Storage* from) const {
    int64_t i = 0;
    for (; i + 2 * kWidth <= size_; i += 2 * kWidth) {
      const Pair<Vector> w = load_pair(from + i);
      sums.add(w.first);
      sums.add(w.second);
    }
    if (i + kWidth <= size_) {
      sums.add(load(from + i));
      i += kWidth;
    }
    if (i == size_) return;
    const Sums before = sums;
    const Tail tail(*this, from, i);
    sums.add(tail.entries);
    constexpr int kFields = sizeof(Sums::fields) / sizeof(Vector);
    for (int field = 0; field < kFields; ++field) {
      sums.fields[field] = select(tail.mask, sums.fields[field], before.fields[field]);
    }
  }

  template <class Slope>
  R2_INLINE void apply_to_segment(const Slope& slope, int64_t begin) const {
    const Storage* from = weight_ + begin;
    Storage* to = gradient_ + begin;
    int64_t i = 0;
    for (; i + 2 * kWidth <= size_; i += 2 * kWidth) {
      const Pair<Vector> w = load_pair(from + i);
      Pair<Vector> slopes{slope(w.first), slope(w.second)};
      if constexpr (kAccumulate) {
        const Pair<Vector> old = load_pair(to + i);
        slopes = {old.first + slopes.first, old.second + slopes.second};
      }
      store_pair(to + i, slopes);
    }
    if (i + kWidth <= size_) {
      Vector result = slope(load(from + i));
      if constexpr (kAccumulate) result = load(to + i) + result;
      store(to + i, result);
      i += kWidth;
    }
    if (i == size_) return;
    const Vector slopes = slope(Tail(*this, from, i).entries);
    Storage buffer[kWidth] = {};
    const int64_t rest = size_ - i, first = size_ < kWidth ? 0 : kWidth - rest;
    __builtin_memcpy(buffer + first, to + i, rest * sizeof(Storage));
    Vector result = slopes;
    if constexpr (kAccumulate) result = load(buffer) + slopes;
    store(buffer, result);
    __builtin_memcpy(to + i, buffer + first, rest * sizeof(Storage));
  }

  // The entries of a segment from `begin` on, fewer than a vector, in some of its lanes.
  struct Tail {
    Vector entries;
    decltype(Bits{} < Bits{}) mask;

    R2_INLINE Tail(const Bundle& bundle, const Storage* from, int64_t begin) {
      Bits lanes;
      for (int i = 0; i < kWidth; ++i) lanes[i] = i;
      const int64_t rest = bundle.size_ - begin;
      if (bundle.size_ >= kWidth) {  // the last whole vector
        entries = load(from + bundle.size_ - kWidth);
        mask = lanes >= Bits{} + static_cast<bits_t<Scalar>>(kWidth - rest);
      } else {
        Storage buffer[kWidth] = {};
        __builtin_memcpy(buffer, from, rest * sizeof(Storage));
        entries = load(buffer);
        mask = lanes < Bits{} + static_cast<bits_t<Scalar>>(rest);
      }
    }
  };

  // A tree: each step merges neighbouring lanes of neighbouring segments, which then share a vector.
  template <int kStep, class Sums, int kFields>
  static R2_INLINE void fold(Sums& folded, Vector (&fields)[kWidth][kFields]) {
    if constexpr (kStep == kWidth) {
      for (int field = 0; field < kFields; ++field) folded.fields[field] = fields[0][field];
    } else {
      for (int i = 0; i < kWidth / kStep / 2; ++i) {
        Sums other = folded;
        for (int field = 0; field < kFields; ++field) {
          const Vector a = fields[2 * i][field], b = fields[2 * i + 1][field];
          folded.fields[field] = shuffled<kStep, false>(a, b, std::make_index_sequence<kWidth>());
          other.fields[field] = shuffled<kStep, true>(a, b, std::make_index_sequence<kWidth>());
        }
        folded.merge(other);
        for (int field = 0; field < kFields; ++field) fields[i][field] = folded.fields[field];
      }
      fold<2 * kStep>(folded, fields);
    }
  }
  // Of the lanes that a step merges, the first or the second ones: a's in the lanes without the bit kStep, b's in the
  // others.
  template <size_t kStep, bool kSecond, size_t... kLane>
  static R2_INLINE Vector shuffled(Vector a, Vector b, std::index_sequence<kLane...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(
        a, b,
        ((kLane & kStep) == 0 ? (kLane | (kSecond ? kStep : 0)) : (kSecond ? kLane : kLane & ~kStep) + kWidth)...);
#else
    return Vector{((kLane & kStep) == 0 ? a[kLane | (kSecond ? kStep : 0)] : b[kSecond ? kLane : kLane & ~kStep])...};
#endif
  }

  const Storage* weight_;
  Storage* gradient_;
  int64_t count_, size_;
};

// Numbers of consecutive segments, one a lane.
R2_INLINE DoubleVector load_doubles(const double* from) { return load(from); }
R2_INLINE DoubleVector load_doubles(const float* from) {
  using Narrow = float __attribute__((vector_size(R2_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_unaligned<Narrow>(from), DoubleVector);
}
R2_INLINE void store_doubles(double* to, DoubleVector x) { store(to, x); }
R2_INLINE void store_doubles(float* to, DoubleVector x) {
  using Narrow = float __attribute__((vector_size(R2_VECTOR_BYTES / 2)));
  const Narrow narrow = __builtin_convertvector(x, Narrow);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
