// The penalties: what is added up over a segment, how two halves merge, what value and gradient follow.
//
// Written once for all C++ backends. A penalty is a struct of
//
//   Row         its statistics, doubles in the order of `statistics` in r2_kernels/penalties.py, with empty(), merge() and
//               finalize(): the same numbers whichever way a segment was cut
//   Sums<V>     what one lane adds up over a chunk: add() an entry, merge() another lane's; all of it is in `fields`
//   Slope<V>    the gradient with respect to an entry, from a finished row
//   reduce()    which sums make the row of a chunk, and apply(), which slope its gradient: a chunk is the skeleton's, with
//               sum<Sums>(arguments of the constructor) and apply<Slope>(arguments of the constructor)
//
// V is a scalar or a vector of float or double: the same text serves SIMD lanes, the tail of a chunk and a GPU thread.
// Constructors are written out, since a defaulted one ignores the target pragma, and the inline namespace keeps the
// instruction sets apart, since the linker would merge their instantiations. docs/derivation.md derives the formulas.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifndef R2_INSTRUCTION_SET
#define R2_INSTRUCTION_SET portable
#endif

#ifdef __CUDACC__
#define R2_INLINE __host__ __device__ __forceinline__
#else
#define R2_INLINE inline __attribute__((always_inline))
#endif

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// ---- one text for scalars and vectors ------------------------------------------------------------------------------

// The type of one lane of V, and the integers that V's bits make; cpu/vector.h adds the vectors.
template <class V>
struct Lane;
template <>
struct Lane<float> {
  using type = float;
  using bits = uint32_t;
};
template <>
struct Lane<double> {
  using type = double;
  using bits = uint64_t;
};
template <class V>
using lane_t = typename Lane<V>::type;
template <class V>
using bits_t = typename Lane<V>::bits;

template <class V>
R2_INLINE V broadcast(double value) {
  return V{} + static_cast<lane_t<V>>(value);
}
template <class V>
R2_INLINE bits_t<V> to_bits(V x) {
  bits_t<V> bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
}
template <class V>
R2_INLINE V from_bits(bits_t<V> bits) {
  V x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// The sign bit of one lane of V.
template <class V>
constexpr auto kSign = sizeof(lane_t<V>) == 4 ? uint64_t{1} << 31 : uint64_t{1} << 63;

template <class V>
R2_INLINE V abs(V x) {
  using T = bits_t<lane_t<V>>;
  return from_bits<V>(to_bits(x) & static_cast<T>(~kSign<V>));
}
template <class V>
R2_INLINE V copysign(V magnitude, V sign) {
  using T = bits_t<lane_t<V>>;
  return from_bits<V>((to_bits(magnitude) & static_cast<T>(~kSign<V>)) | (to_bits(sign) & static_cast<T>(kSign<V>)));
}
// `mask` is what a comparison of two V gives.
template <class Mask, class V>
R2_INLINE V select(Mask mask, V if_true, V if_false) {
  return mask ? if_true : if_false;
}

// ---- exponentials --------------------------------------------------------------------------------------------------

// cosh(t) - 1 = even and sinh(t) = odd for |t| <= 0.5, each to the last bit or so: exp(±t) - 1 = even ± odd, with no
// cancellation however small t is.
template <class V>
struct Hyperbolic {
  V even, odd;

  R2_INLINE explicit Hyperbolic(V t) {
    using T = lane_t<V>;
    const V square = t * t;
    V c, s;
    if constexpr (sizeof(T) == sizeof(float)) {
      c = broadcast<V>(1.0 / 40320);
      s = broadcast<V>(1.0 / 5040);
    } else {
      c = (square * T(1.0 / 87178291200.0) + T(1.0 / 479001600)) * square + T(1.0 / 3628800);
      c = c * square + T(1.0 / 40320);
      s = (square * T(1.0 / 6227020800.0) + T(1.0 / 39916800)) * square + T(1.0 / 362880);
      s = s * square + T(1.0 / 5040);
    }
    c = ((c * square + T(1.0 / 720)) * square + T(1.0 / 24)) * square + T(0.5);
    s = (s * square + T(1.0 / 120)) * square + T(1.0 / 6);
    even = c * square;
    odd = (s * square) * t + t;
  }
};

// exp(t) and exp(-t) for |t| <= 80 from one range reduction: t = n·ln 2 + r, exp(±t) = 2^±n · (1 + even(r) ± odd(r)).
template <class V>
struct Exponentials {
  V up, down;

  R2_INLINE explicit Exponentials(V t) {
    using T = lane_t<V>;
    constexpr bool kIsFloat = sizeof(T) == sizeof(float);
    // Adding 1.5 · 2^(mantissa bits) rounds to an integer n, whose bits are then the low bits of the sum.
    constexpr T kRound = kIsFloat ? T(12582912) : T(6755399441055744);
    constexpr int kMantissa = kIsFloat ? 23 : 52;
    constexpr int kBias = kIsFloat ? 127 : 1023;
    // ln 2 in two parts, the first short enough for n · part to be exact.
    constexpr T kHigh = kIsFloat ? T(0.693145751953125) : T(0.6931471803691238);
    constexpr T kLow = kIsFloat ? T(1.42860682030941723212e-6) : T(1.9082149292705877e-10);
    const V rounded = t * T(1.44269504088896340736) + kRound;
    const V n = rounded - kRound;
    const Hyperbolic<V> r((t - n * kHigh) - n * kLow);
    const V base = broadcast<V>(1) + r.even;
    // A NaN in t makes garbage of n, but stays one in `base`, which the garbage only multiplies.
    up = (base + r.odd) * from_bits<V>((to_bits(rounded) + kBias) << kMantissa);
    down = (base - r.odd) * from_bits<V>((kBias - to_bits(rounded)) << kMantissa);
  }
};

// exp(t) for t <= 0, zero below -80.
template <class V>
R2_INLINE V exponential_of_negative(V t) {
  const V zero = broadcast<V>(0), limit = broadcast<V>(-80);
  const auto is_below = t < limit;
  return select(is_below, zero, Exponentials<V>(select(is_below, zero, t)).up);
}

// What finalize() returns: the penalty's value and its gradient with respect to M or the temperature.
struct Value {
  double value;
  double parameter_gradient;
};

// ---- L∞: max|w| ----------------------------------------------------------------------------------------------------

struct LInf {
  static constexpr bool kHasParameter = false;
  // Whether the gradient is zero outside the chunks whose own maximum is the segment's.
  static constexpr bool kIsSparse = true;
  static constexpr bool kIsOnePass = false;

  template <class V>
  struct Sums {
    V fields[2];  // the maximum, and how many entries reach it

    R2_INLINE Sums() : Sums(V{}, V{}) {}
    R2_INLINE Sums(V maximum, V count) : fields{maximum, count} {}

    R2_INLINE void add(V w) { merge(abs(w), broadcast<V>(1)); }
    R2_INLINE void merge(const Sums& other) { merge(other.fields[0], other.fields[1]); }

   private:
    R2_INLINE void merge(V maximum, V count) {
      const V zero = broadcast<V>(0);
      const auto is_larger = (maximum > fields[0]) | (maximum != maximum);  // a NaN comes, and stays
      fields[1] = select(is_larger, zero, fields[1]);
      fields[0] = select(is_larger, maximum, fields[0]);
      fields[1] = fields[1] + select(maximum == fields[0], count, zero);
    }
  };

  struct Row {
    double maximum, count;

    static Row empty() { return {0, 0}; }
    void merge(const Row& other, double /*parameter*/) {
      Sums<double> sums(maximum, count);
      sums.merge(Sums<double>(other.maximum, other.count));
      *this = {sums.fields[0], sums.fields[1]};
    }
    Value finalize(double /*parameter*/) const { return {maximum, 0}; }
    // Whether a chunk with this row may hold an entry with a gradient, in a segment with the other.
    bool has_slope(const Row& segment) const { return !(maximum < segment.maximum); }
  };

  template <class V>
  struct Slope {
    V maximum, share;

    R2_INLINE Slope(const Row& row, double coefficient)
        : maximum(broadcast<V>(row.maximum)),
          // In a segment with a NaN no entry reaches the maximum: x / 0 · 0 makes its gradient NaN.
          share(broadcast<V>(row.maximum == 0 ? 0 : coefficient / row.count)) {}

    R2_INLINE V operator()(V w) const {
      return select(abs(w) == maximum, share * copysign(broadcast<V>(1), w), share * broadcast<V>(0));
    }
  };

  template <class Chunk>
  static Row reduce(const Chunk& chunk, double /*parameter*/) {
    const Sums<double> sums = chunk.template sum<Sums>();
    return {sums.fields[0], sums.fields[1]};
  }
  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& row, double /*parameter*/, double coefficient) {
    chunk.template apply<Slope>(row, coefficient);
  }
};

// ---- margin: |M| + Σ max(|w| - |M|, 0) -----------------------------------------------------------------------------

struct Margin {
  static constexpr bool kHasParameter = true;
  static constexpr bool kIsSparse = false;
  static constexpr bool kIsOnePass = true;  // the slope needs no statistics

  template <class V>
  struct Sums {
    V fields[2];  // the excess over |M|, and how many entries exceed it
    V margin;

    R2_INLINE explicit Sums(double parameter) : fields{V{}, V{}}, margin(broadcast<V>(std::fabs(parameter))) {}

    R2_INLINE void add(V w) {
      const V zero = broadcast<V>(0);
      const V excess = abs(w) - margin;
      fields[0] = fields[0] + select(excess <= zero, zero, excess);  // asked this way round, a NaN stays
      fields[1] = fields[1] + select(excess > zero, broadcast<V>(1), zero);
    }
    R2_INLINE void merge(const Sums& other) {
      fields[0] = fields[0] + other.fields[0];
      fields[1] = fields[1] + other.fields[1];
    }
  };

  struct Row {
    double excess, exceeding;

    static Row empty() { return {0, 0}; }
    void merge(const Row& other, double /*parameter*/) {
      excess += other.excess;
      exceeding += other.exceeding;
    }
    Value finalize(double parameter) const {
      const double sign = parameter > 0 ? 1 : parameter < 0 ? -1 : parameter;
      return {std::fabs(parameter) + excess, sign * (1 - exceeding)};
    }
  };

  template <class V>
  struct Slope {
    V margin, coefficient;

    R2_INLINE Slope(double parameter, double coefficient)
        : margin(broadcast<V>(std::fabs(parameter))), coefficient(broadcast<V>(coefficient)) {}

    R2_INLINE auto is_nonzero(V w) const { return (abs(w) > margin) | (w != w); }
    R2_INLINE V operator()(V w) const {
      const V inside = select(w != w, w, broadcast<V>(0));
      return select(abs(w) > margin, coefficient * copysign(broadcast<V>(1), w), inside);
    }
  };

  template <class Chunk>
  static Row reduce(const Chunk& chunk, double parameter) {
    const Sums<double> sums = chunk.template sum<Sums>(parameter);
    return {sums.fields[0], sums.fields[1]};
  }
  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& /*row*/, double parameter, double coefficient) {
    chunk.template apply<Slope>(parameter, coefficient);
  }
  // The slope needs no statistics: the sums and the gradient come from one look at an entry.
  template <class Chunk>
  static Row reduce_and_apply(const Chunk& chunk, double parameter, double coefficient) {
    const Sums<double> sums = chunk.template sum_and_apply<Sums, Slope>(parameter, coefficient);
    return {sums.fields[0], sums.fields[1]};
  }
};

// ---- soft-min-max: s_max - s_min + exp(-a) -------------------------------------------------------------------------

struct SoftMinMax {
  static constexpr bool kHasParameter = true;
  static constexpr bool kIsSparse = false;
  static constexpr bool kIsOnePass = false;

  // The extremes. They drop a NaN: the sums that follow keep it.
  template <class V>
  struct Extent {
    V fields[2];  // the maximum and the minimum

    R2_INLINE Extent()
        : fields{broadcast<V>(-std::numeric_limits<double>::infinity()),
                 broadcast<V>(std::numeric_limits<double>::infinity())} {}

    R2_INLINE void add(V w) { merge(w, w); }
    R2_INLINE void merge(const Extent& other) { merge(other.fields[0], other.fields[1]); }

   private:
    R2_INLINE void merge(V maximum, V minimum) {
      fields[0] = select(maximum > fields[0], maximum, fields[0]);
      fields[1] = select(minimum < fields[1], minimum, fields[1]);
    }
  };

  // What the exponentials of a chunk's sums, or of a segment's slopes, are anchored to. `center` is the middle of the
  // extremes as a lane of type T holds it, and `half` = |a|·(maximum - minimum) / 2 decides how they are computed.
  enum class Regime {
    kSmall,   // half <= 0.5: cosh - 1 and sinh of t = |a|·(w - center); no exponential, no cancellation
    kMiddle,  // half <= 20: one range reduction for exp(t) and exp(-t)
    kLarge    // above, and for whatever is not finite: an exponential of the distance to either end
  };
  template <class T>
  struct Frame {
    double maximum, minimum, temperature, center, reach, half;
    Regime regime;

    Frame(double maximum, double minimum, double parameter)
        : maximum(maximum),
          minimum(minimum),
          temperature(std::fabs(parameter)),
          center(static_cast<T>(maximum / 2 + minimum / 2)),
          reach(maximum / 2 - minimum / 2),
          half(temperature * reach),
          regime(half <= 0.5 ? Regime::kSmall : half <= 20 ? Regime::kMiddle : Regime::kLarge) {}
  };

  template <class V>
  struct AdditiveSums {
    V fields[6];

    R2_INLINE AdditiveSums() : fields{V{}, V{}, V{}, V{}, V{}, V{}} {}

    R2_INLINE void merge(const AdditiveSums& other) {
      for (int i = 0; i < 6; ++i) fields[i] = fields[i] + other.fields[i];
    }
  };

  // Of x = (w - center) / reach, with exp(±|a|·(w - center)) = 1 + even ± odd: the even and the odd part of the sums of
  // exp - 1, x·exp and x²·exp.
  template <class V>
  struct SmallSums : AdditiveSums<V> {
    V center, inverse_reach, half;

    template <class T>
    R2_INLINE explicit SmallSums(const Frame<T>& frame)
        : center(broadcast<V>(frame.center)),
          inverse_reach(broadcast<V>(usable_inverse<T>(frame.reach))),
          half(broadcast<V>(frame.half)) {}

    R2_INLINE void add(V w) {
      const V x = (w - center) * inverse_reach;
      const Hyperbolic<V> exponential(half * x);
      const V even = x * exponential.even + x, odd = x * exponential.odd;
      auto& sums = this->fields;
      sums[0] = sums[0] + exponential.even;
      sums[1] = sums[1] + exponential.odd;
      sums[2] = sums[2] + even;
      sums[3] = sums[3] + odd;
      sums[4] = x * even + sums[4];
      sums[5] = x * odd + sums[5];
    }

    // Where every entry is the center, or too close to it for T, x is 0.
    template <class T>
    static R2_INLINE double usable_inverse(double reach) {
      return reach >= 4 * static_cast<double>(std::numeric_limits<T>::min()) ? 1 / reach : 0;
    }
  };

  // exp(±|a|·(w - center)) times 1, u and u², u being the distance to the maximum (first three) or to the minimum.
  template <class V>
  struct MiddleSums : AdditiveSums<V> {
    V center, temperature, maximum, minimum;

    template <class T>
    R2_INLINE explicit MiddleSums(const Frame<T>& frame)
        : center(broadcast<V>(frame.center)),
          temperature(broadcast<V>(frame.temperature)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)) {}

    R2_INLINE void add(V w) {
      const Exponentials<V> exponential((w - center) * temperature);
      add_moments(this->fields, w - maximum, exponential.up);
      add_moments(this->fields + 3, w - minimum, exponential.down);
    }
  };

  // The same with exp(|a|·(w - maximum)) and exp(-|a|·(w - minimum)).
  template <class V>
  struct LargeSums : AdditiveSums<V> {
    V temperature, maximum, minimum;

    template <class T>
    R2_INLINE explicit LargeSums(const Frame<T>& frame)
        : temperature(broadcast<V>(frame.temperature)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)) {}

    R2_INLINE void add(V w) {
      const V upper = finite(w - maximum), lower = finite(w - minimum);
      add_moments(this->fields, upper, exponential_of_negative(temperature * upper));
      add_moments(this->fields + 3, lower, exponential_of_negative(-temperature * lower));
    }

    // A distance beyond the largest number has weight 0, and 0 times it must be 0.
    static R2_INLINE V finite(V distance) {
      const V largest = broadcast<V>(std::numeric_limits<lane_t<V>>::max());
      const V bounded = select(distance > largest, largest, distance);
      return select(bounded < -largest, -largest, bounded);
    }
  };

  template <class V>
  static R2_INLINE void add_moments(V* sums, V distance, V exponential) {
    const V first = distance * exponential;
    sums[0] = sums[0] + exponential;
    sums[1] = sums[1] + first;
    sums[2] = distance * first + sums[2];
  }

  // Sums of exp, d·exp and d²·exp over the entries, d being the distance to some point.
  struct Moments {
    double z, s, q;

    // The sums after every d has grown by `distance`, if exp is exp(a·d).
    Moments shifted(double distance, double a) const {
      if (distance == 0) return *this;
      return scaled(std::exp(a * distance)).moved(distance);
    }
    Moments moved(double distance) const { return {z, s + distance * z, q + distance * (2 * s + distance * z)}; }
    Moments scaled(double factor) const { return {factor * z, factor * s, factor * q}; }
    Moments operator+(const Moments& other) const { return {z + other.z, s + other.s, q + other.q}; }
    double mean() const { return s / z; }
    double variance() const { return q / z - mean() * mean(); }
  };

  struct Row {
    double maximum, minimum;
    Moments upper, lower;  // distances to the maximum and to the minimum

    static Row empty() {
      return {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity(), {}, {}};
    }
    bool is_empty() const { return upper.z == 0; }

    void merge(const Row& other, double parameter) {
      if (other.is_empty()) return;
      if (is_empty()) {
        *this = other;
        return;
      }
      const double a = std::fabs(parameter);
      const double top = other.maximum > maximum ? other.maximum : maximum;
      const double bottom = other.minimum < minimum ? other.minimum : minimum;
      upper = upper.shifted(maximum - top, a) + other.upper.shifted(other.maximum - top, a);
      lower = lower.shifted(minimum - bottom, -a) + other.lower.shifted(other.minimum - bottom, -a);
      maximum = top;
      minimum = bottom;
    }

    Value finalize(double parameter) const {
      const double remainder = std::exp(-parameter);
      if (is_empty()) return {remainder, -remainder};
      const double soft_range = (maximum - minimum) + (upper.mean() - lower.mean());
      // A negative temperature makes the soft maximum the mean near the minimum, and the soft minimum that near the
      // maximum.
      return {(parameter < 0 ? -soft_range : soft_range) + remainder, upper.variance() + lower.variance() - remainder};
    }
  };

  // The slope is p·(1 + |a|·(w - s_max)) - q·(1 - |a|·(w - s_min)) times the coefficient, negated for a negative a.
  // `upper` and `lower` below are |a|·(w - s_max) and |a|·(w - s_min), less t.

  // With p = (1 + P)/Z and q = (1 + Q)/Z, which leaves no difference of nearly equal numbers as a goes to 0. Any Z
  // would do: the mean of both ends' makes P and Q small.
  template <class V>
  struct SmallSlope {
    V center, temperature, p_ratio, p_excess, q_ratio, q_excess, upper, lower, coefficient;

    template <class T>
    R2_INLINE SmallSlope(const Frame<T>& frame, const Row& row, double coefficient) {
      const double a = frame.temperature;
      const double z_upper = row.upper.z * std::exp(a * (frame.maximum - frame.center));
      const double z_lower = row.lower.z * std::exp(-a * (frame.minimum - frame.center));
      const double mean = (z_upper + z_lower) / 2, difference = (z_lower - z_upper) / 2;
      center = broadcast<V>(frame.center);
      temperature = broadcast<V>(a);
      p_ratio = broadcast<V>(mean / z_upper);
      p_excess = broadcast<V>(difference / z_upper);
      q_ratio = broadcast<V>(mean / z_lower);
      q_excess = broadcast<V>(-difference / z_lower);
      upper = broadcast<V>(a * (frame.center - frame.maximum - row.upper.mean()));
      lower = broadcast<V>(a * (frame.center - frame.minimum - row.lower.mean()));
      this->coefficient = broadcast<V>(coefficient / mean);
    }
    R2_INLINE V operator()(V w) const {
      const V t = (w - center) * temperature;
      const Hyperbolic<V> exponential(t);
      const V p = p_ratio * (exponential.even + exponential.odd) + p_excess;
      const V q = q_ratio * (exponential.even - exponential.odd) + q_excess;
      const V above = t + upper, below = t + lower;
      // P·(1 + above) - Q·(1 - below) + above + below
      return coefficient * ((p * above + (p - q)) + (q * below + (above + below)));
    }
  };

  template <class V>
  struct MiddleSlope {
    V center, temperature, p_scale, q_scale, upper, lower;

    template <class T>
    R2_INLINE MiddleSlope(const Frame<T>& frame, const Row& row, double coefficient)
        : center(broadcast<V>(frame.center)),
          temperature(broadcast<V>(frame.temperature)),
          p_scale(broadcast<V>(coefficient * std::exp(-frame.temperature * (frame.maximum - frame.center)) /
                               row.upper.z)),
          q_scale(broadcast<V>(coefficient * std::exp(frame.temperature * (frame.minimum - frame.center)) /
                               row.lower.z)),
          upper(broadcast<V>(1 + frame.temperature * (frame.center - frame.maximum - row.upper.mean()))),
          lower(broadcast<V>(1 - frame.temperature * (frame.center - frame.minimum - row.lower.mean()))) {}

    R2_INLINE V operator()(V w) const {
      const V t = (w - center) * temperature;
      const Exponentials<V> exponential(t);
      return (p_scale * exponential.up) * (upper + t) - (q_scale * exponential.down) * (lower - t);
    }
  };

  template <class V>
  struct LargeSlope {
    V temperature, maximum, minimum, p_scale, q_scale, upper, lower;

    template <class T>
    R2_INLINE LargeSlope(const Frame<T>& frame, const Row& row, double coefficient)
        : temperature(broadcast<V>(frame.temperature)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)),
          p_scale(broadcast<V>(coefficient / row.upper.z)),
          q_scale(broadcast<V>(coefficient / row.lower.z)),
          upper(broadcast<V>(1 - frame.temperature * row.upper.mean())),
          lower(broadcast<V>(1 + frame.temperature * row.lower.mean())) {}

    R2_INLINE V operator()(V w) const {
      const V above = bounded((w - maximum) * temperature), below = bounded((minimum - w) * temperature);
      return (p_scale * exponential_of_negative(above)) * (upper + above) -
             (q_scale * exponential_of_negative(below)) * (lower + below);
    }

    // Below -80 the exponential is 0, and 0 times an infinite distance must be 0.
    static R2_INLINE V bounded(V t) { return select(t < broadcast<V>(-100), broadcast<V>(-100), t); }
  };

  template <class Chunk>
  static Row reduce(const Chunk& chunk, double parameter) {
    const Extent<double> extent = chunk.template sum<Extent>();
    const Frame<typename Chunk::Scalar> frame(extent.fields[0], extent.fields[1], parameter);
    switch (frame.regime) {
      case Regime::kSmall:
        return small_row(frame, chunk.template sum<SmallSums>(frame).fields, static_cast<double>(chunk.size()));
      case Regime::kMiddle:
        return middle_row(frame, chunk.template sum<MiddleSums>(frame).fields);
      default:
        return large_row(frame, chunk.template sum<LargeSums>(frame).fields);
    }
  }

  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& row, double parameter, double coefficient) {
    const Frame<typename Chunk::Scalar> frame(row.maximum, row.minimum, parameter);
    const double signed_coefficient = parameter < 0 ? -coefficient : coefficient;
    switch (frame.regime) {
      case Regime::kSmall:
        return chunk.template apply<SmallSlope>(frame, row, signed_coefficient);
      case Regime::kMiddle:
        return chunk.template apply<MiddleSlope>(frame, row, signed_coefficient);
      default:
        return chunk.template apply<LargeSlope>(frame, row, signed_coefficient);
    }
  }

 private:
  template <class T>
  static Row small_row(const Frame<T>& frame, const double (&sums)[6], double count) {
    const double reach = SmallSums<T>::template usable_inverse<T>(frame.reach) == 0 ? 0 : frame.reach;
    const double a = frame.temperature;
    const Moments up{count + (sums[0] + sums[1]), reach * (sums[2] + sums[3]), reach * reach * (sums[4] + sums[5])};
    const Moments down{count + (sums[0] - sums[1]), reach * (sums[2] - sums[3]), reach * reach * (sums[4] - sums[5])};
    return {frame.maximum, frame.minimum, up.shifted(frame.center - frame.maximum, a),
            down.shifted(frame.center - frame.minimum, -a)};
  }
  template <class T>
  static Row middle_row(const Frame<T>& frame, const double (&sums)[6]) {
    const double a = frame.temperature;
    return {frame.maximum, frame.minimum,
            Moments{sums[0], sums[1], sums[2]}.scaled(std::exp(a * (frame.center - frame.maximum))),
            Moments{sums[3], sums[4], sums[5]}.scaled(std::exp(-a * (frame.center - frame.minimum)))};
  }
  template <class T>
  static Row large_row(const Frame<T>& frame, const double (&sums)[6]) {
    return {frame.maximum, frame.minimum, {sums[0], sums[1], sums[2]}, {sums[3], sums[4], sums[5]}};
  }
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
