// EWGS (Lee, Kim and Ham, arXiv 2104.00903): an entry on evenly spaced levels, and what its gradient gives to the entry
// and to the ends. Written once for all C++ backends; docs/derivation.md derives the gradients.
#pragma once

#include <limits>

#include "penalties.h"

namespace r2 {

// The bounds of the values, and the outputs of the first and the last level.
struct EwgsEnds {
  double lower, upper, first, last;
};

inline namespace R2_INSTRUCTION_SET {

// V is a scalar or a vector of float or double.
template <class V>
class Ewgs {
 public:
  R2_INLINE Ewgs(const EwgsEnds& ends, int64_t levels, double delta)
      : lower_(broadcast<V>(ends.lower)),
        inverse_width_(broadcast<V>(1 / (ends.upper - ends.lower))),
        // Between equal bounds nothing is inside.
        least_(broadcast<V>(ends.lower == ends.upper ? std::numeric_limits<double>::infinity()
                                                     : (ends.lower < ends.upper ? ends.lower : ends.upper))),
        most_(broadcast<V>(ends.lower < ends.upper ? ends.upper : ends.lower)),
        first_(broadcast<V>(ends.first)),
        last_(broadcast<V>(ends.last)),
        span_(broadcast<V>(ends.last - ends.first)),
        steps_(broadcast<V>(static_cast<double>(levels - 1))),
        delta_(broadcast<V>(delta)) {}

  R2_INLINE V operator()(V value) const { return at(rounded(clipped(value))); }

  // What the gradients of entries add up to: with respect to lower, upper, first, last; the first two still without the
  // factor 1 / (upper - lower).
  struct Sums {
    V fields[4];

    R2_INLINE Sums() : fields{V{}, V{}, V{}, V{}} {}
    R2_INLINE void merge(const Sums& other) {
      for (int i = 0; i < 4; ++i) fields[i] = fields[i] + other.fields[i];
    }
  };

  // The gradient with respect to a value, given that with respect to its output.
  R2_INLINE V gradient(V value, V output_gradient, Sums& sums) const {
    const V zero = broadcast<V>(0), one = broadcast<V>(1);
    const V clip = clipped(value), level = rounded(clip);
    const V g = output_gradient * span_;
    const V scaled = g * (one + copysign(delta_, g) * (clip - level));
    // One after the other: a mask of both is not a vector everywhere.
    const V passed = select(value >= least_, select(value <= most_, scaled, zero), zero);
    sums.fields[0] = sums.fields[0] + passed * (clip - one);
    sums.fields[1] = sums.fields[1] - passed * clip;
    sums.fields[2] = sums.fields[2] + output_gradient * (one - level);
    sums.fields[3] = sums.fields[3] + output_gradient * level;
    return passed * inverse_width_;
  }

 private:
  // On [0, 1]; a NaN stays.
  R2_INLINE V clipped(V value) const {
    const V zero = broadcast<V>(0), one = broadcast<V>(1);
    const V x = (value - lower_) * inverse_width_;
    return select(x < zero, zero, select(x > one, one, x));
  }
  // To the nearest level, ties to even: what is added leaves no bits for a fraction.
  R2_INLINE V rounded(V x) const {
    constexpr lane_t<V> kRound = sizeof(lane_t<V>) == sizeof(float) ? lane_t<V>(12582912) : lane_t<V>(6755399441055744);
    return ((x * steps_ + kRound) - kRound) / steps_;
  }
  // From either end by its own, so that the ends come out exactly.
  R2_INLINE V at(V level) const {
    return select(level < broadcast<V>(0.5), first_ + level * span_, last_ - (broadcast<V>(1) - level) * span_);
  }

  const V lower_, inverse_width_, least_, most_, first_, last_, span_, steps_, delta_;
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
