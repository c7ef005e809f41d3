// The penalties: what is added up over a segment, how two halves merge, what value and gradient follow.
//
// Written once for all C++ backends. A penalty is a struct of
//
//   kName       its name in r2_kernels/penalties.py, and what is true of it
//   Row         its statistics, doubles in the order of `statistics` in r2_kernels/penalties.py; empty(), merge() and
//               finalize() give the same numbers whichever way a segment was cut
//   Sums<V>     what one lane adds up over a chunk: add() an entry, merge() another lane's; all of it is in `fields`.
//               kIsFirstLook says whether reduce() may ask for them before it has seen all entries
//   Slope<V>    the gradient with respect to an entry, from a finished row
//   reduce()    which sums make the row of a chunk, and apply(), which slope its gradient; the chunk is the skeleton's
//               and offers sum<Sums>(...) and apply<Slope>(...), with the arguments of their constructors, and itself
//               in_float64(), one entry at a time, or widened() to vectors of float64
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

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

constexpr double inverse_factorial(int k) { return k == 0 ? 1 : inverse_factorial(k - 1) / k; }
constexpr double power(double x, int k) { return k == 0 ? 1 : power(x, k - 1) * x; }

// 2^t and 2^-t for |t| <= 120 from one range reduction: with t = n + r, |r| <= 1/2, they are
// 2^±n · (cosh(r ln 2) ± sinh(r ln 2)). Relative error below 1e-7 for float, 1e-15 for double, but for the rounding of
// t. A NaN in t may become any number: the caller multiplies with something that is NaN too.
template <class V>
struct PowersOfTwo {
  V up, down;

  R2_INLINE explicit PowersOfTwo(V t) {
    using T = lane_t<V>;
    constexpr bool kIsFloat = sizeof(T) == sizeof(float);
    // Adding 1.5 · 2^(mantissa bits) rounds to an integer n, whose bits are then the low bits of the sum: shifted to
    // where the exponent is, they multiply by 2^n when they are added.
    constexpr T kRound = kIsFloat ? T(12582912) : T(6755399441055744);
    constexpr int kMantissaBits = kIsFloat ? 23 : 52;
    const V rounded = t + kRound;
    const V r = t - (rounded - kRound);
    const auto exponent = to_bits(rounded) << kMantissaBits;
    const V square = r * r;
    V even = broadcast<V>(kIsFloat ? coefficient(6) : coefficient(14));
    V odd = broadcast<V>(kIsFloat ? 0.00134003851 : coefficient(13));
    if constexpr (kIsFloat) {
      even = even * square + T(coefficient(4));
      odd = odd * square + T(0.0555032721);  // least maximum error of three terms, 2e-9
    } else {
      even = even * square + T(coefficient(12));
      even = even * square + T(coefficient(10));
      even = even * square + T(coefficient(8));
      even = even * square + T(coefficient(6));
      even = even * square + T(coefficient(4));
      odd = odd * square + T(coefficient(11));
      odd = odd * square + T(coefficient(9));
      odd = odd * square + T(coefficient(7));
      odd = odd * square + T(coefficient(5));
      odd = odd * square + T(coefficient(3));
    }
    even = even * square + T(coefficient(2));
    even = even * square + T(1);
    odd = (odd * square + T(coefficient(1))) * r;
    up = from_bits<V>(to_bits(even + odd) + exponent);
    down = from_bits<V>(to_bits(even - odd) - exponent);
  }

  // Of r^k in the series of 2^r.
  static constexpr double coefficient(int k) { return power(kLn2, k) * inverse_factorial(k); }
};

// 2^t for t <= 0, zero below -115.
template <class V>
R2_INLINE V negative_power_of_two(V t) {
  const V zero = broadcast<V>(0), limit = broadcast<V>(-115);
  const auto is_below = t < limit;
  return select(is_below, zero, PowersOfTwo<V>(select(is_below, zero, t)).up);
}

// e^x, of vectors for |x| <= 80.
R2_INLINE double exponential(double x) { return std::exp(x); }
template <class V>
R2_INLINE V exponential(V x) {
  return PowersOfTwo<V>(x * lane_t<V>(kLog2E)).up;
}

// What finalize() returns: the penalty's value and its gradient with respect to M or the temperature.
struct Value {
  double value;
  double parameter_gradient;
};

// ---- L∞: max|w| ----------------------------------------------------------------------------------------------------

struct LInf {
  static constexpr const char* kName = "linf";
  static constexpr bool kHasParameter = false;
  // Whether the gradient is zero outside the chunks whose own maximum is the segment's.
  static constexpr bool kIsSparse = true;
  static constexpr bool kIsOnePass = false;

  // A NaN, whose bits are larger than those of any number, comes and stays.
  template <class V>
  struct Maximum {
    static constexpr bool kIsFirstLook = true;

    V fields[1];

    R2_INLINE Maximum() : fields{V{}} {}
    R2_INLINE void add(V w) { include(abs(w)); }
    R2_INLINE void merge(const Maximum& other) { include(other.fields[0]); }

   private:
    R2_INLINE void include(V magnitude) {
      const auto a = to_bits(magnitude), b = to_bits(fields[0]);
      fields[0] = from_bits<V>(a > b ? a : b);  // spelled out: compilers then see the maximum in it
    }
  };

  template <class V>
  struct Count {
    static constexpr bool kIsFirstLook = false;

    V fields[1];
    V maximum;

    R2_INLINE explicit Count(double maximum) : fields{V{}}, maximum(broadcast<V>(maximum)) {}
    R2_INLINE void add(V w) { fields[0] = fields[0] + select(abs(w) == maximum, broadcast<V>(1), broadcast<V>(0)); }
    R2_INLINE void merge(const Count& other) { fields[0] = fields[0] + other.fields[0]; }
  };

  struct Row {
    double maximum, count;

    static Row empty() { return {0, 0}; }
    void merge(const Row& other, double /*parameter*/) {
      const bool is_larger = other.maximum > maximum || other.maximum != other.maximum;
      if (is_larger) {
        *this = other;
      } else if (other.maximum == maximum) {
        count += other.count;
      }
    }
    Value finalize(double /*parameter*/) const { return {maximum, 0}; }
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
    // Parts that are still in the first cache for a second look, which few of them need.
    constexpr int64_t kPart = 4096;
    Row row = Row::empty();
    for (int64_t begin = 0; begin < chunk.size(); begin += kPart) {
      const Chunk part = chunk.part(begin, kPart);
      const double maximum = part.template sum<Maximum>().fields[0];
      if (!(maximum < row.maximum)) row.merge({maximum, part.template sum<Count>(maximum).fields[0]}, 0);
    }
    return row;
  }
  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& row, double /*parameter*/, double coefficient) {
    chunk.template apply<Slope>(row, coefficient);
  }
};

// ---- margin: |M| + Σ max(|w| - |M|, 0) -----------------------------------------------------------------------------

struct Margin {
  static constexpr const char* kName = "margin";
  static constexpr bool kHasParameter = true;
  static constexpr bool kIsSparse = false;
  static constexpr bool kIsOnePass = true;  // the slope needs no statistics

  template <class V>
  struct Sums {
    static constexpr bool kIsFirstLook = true;

    V fields[2];  // the excess over |M|, and how many entries exceed it
    V margin;

    R2_INLINE explicit Sums(double parameter) : fields{V{}, V{}}, margin(broadcast<V>(std::fabs(parameter))) {}

    R2_INLINE void add(V w) {
      const V zero = broadcast<V>(0);
      const V excess = abs(w) - margin;
      fields[0] = fields[0] + select(zero > excess, zero, excess);  // asked this way round, a NaN stays
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

    R2_INLINE auto is_zero(V w) const { return abs(w) <= margin; }
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

// ---- the extremes ---------------------------------------------------------------------------------------------------

// They drop a NaN: the sums that follow keep it.
template <class V>
struct Extent {
  static constexpr bool kIsFirstLook = true;

  V fields[2];  // the maximum and the minimum

  R2_INLINE Extent()
      : fields{broadcast<V>(-std::numeric_limits<double>::infinity()),
               broadcast<V>(std::numeric_limits<double>::infinity())} {}

  R2_INLINE void add(V w) { include(fields, w, w); }
  R2_INLINE void merge(const Extent& other) { include(fields, other.fields[0], other.fields[1]); }

  static R2_INLINE void include(V* extent, V maximum, V minimum) {
    extent[0] = select(maximum > extent[0], maximum, extent[0]);
    extent[1] = select(minimum < extent[1], minimum, extent[1]);
  }
};

// ---- soft-min-max: s_max - s_min + exp(-a) -------------------------------------------------------------------------

struct SoftMinMax {
  static constexpr const char* kName = "soft_min_max";
  static constexpr bool kHasParameter = true;
  static constexpr bool kIsSparse = false;
  static constexpr bool kIsOnePass = false;

  // What the exponentials of a chunk's sums, or of a segment's slopes, are anchored to: `center` is the middle of the
  // extremes as a lane of type T holds it, `reach` the distance from there to either, and `half` = |a|·reach decides
  // how they are computed.
  enum class Regime {
    kSeries4,   // by their series to the 4th power of x = (w - center) / reach: no exponential and no cancellation,
    kSeries6,   // the same to the 6th,
    kSeries10,  // and to the 10th power,
    kMiddle,    // one range reduction for exp(±|a|·(w - center)),
    kLarge      // above, and for whatever is not finite: an exponential of the distance to either end
  };
  template <class T>
  struct Frame {
    double maximum, minimum, temperature, center, reach, inverse_reach, half;
    Regime regime;

    Frame(double maximum, double minimum, double parameter)
        : maximum(maximum),
          minimum(minimum),
          temperature(std::fabs(parameter)),
          center(static_cast<T>(maximum / 2 + minimum / 2)),
          reach(maximum / 2 - minimum / 2 > kSmallest ? maximum / 2 - minimum / 2 : kSmallest),
          inverse_reach(1 / reach),
          half(temperature * reach),
          regime(half <= kLimit4    ? Regime::kSeries4
                 : half <= kLimit6  ? Regime::kSeries6
                 : half <= kLimit10 ? Regime::kSeries10
                 : half <= 30       ? Regime::kMiddle
                                    : Regime::kLarge) {}

    // Where what the series leave out is below the rounding of T: docs/derivation.md.
    static constexpr double kLimit4 = sizeof(T) == sizeof(float) ? 0.03 : 1e-4;
    static constexpr double kLimit6 = sizeof(T) == sizeof(float) ? 0.2 : 0.002;
    static constexpr double kLimit10 = sizeof(T) == sizeof(float) ? 1 : 0.1;

    // Whether lanes of type T hold the distances, their squares and the temperature without overflow or loss. Where
    // they do not, a chunk is computed in float64.
    bool is_representable() const {
      return (reach > kSmallest || maximum == minimum) && reach <= kLargest && temperature <= kLargest * kLargest;
    }
    static constexpr double kLargest = sizeof(T) == sizeof(float) ? 1e15 : 1e150;
    static constexpr double kSmallest = sizeof(T) == sizeof(float) ? 1e-30 : 1e-290;

    // Whether the series up to `limit` hold for entries up to there, too, none of the powers overflowing.
    bool holds_up_to(double maximum, double minimum, double limit) const {
      const double above = maximum - center, below = center - minimum;
      const double farthest = above > below ? above : below;
      return temperature * farthest <= limit && farthest <= 64 * reach;
    }
  };

  template <class V, int kCount>
  struct AdditiveSums {
    static constexpr bool kIsFirstLook = false;

    V fields[kCount];

    R2_INLINE AdditiveSums() {
      for (int i = 0; i < kCount; ++i) fields[i] = V{};
    }
    R2_INLINE void merge(const AdditiveSums& other) {
      for (int i = 0; i < kCount; ++i) fields[i] = fields[i] + other.fields[i];
    }
  };

  template <int kOrder, class V>
  static R2_INLINE void add_powers(V* sums, V x) {
    V powers[kOrder / 2 + 1];
    powers[1] = x;
    for (int k = 2; k <= kOrder / 2; ++k) powers[k] = powers[k / 2] * powers[k - k / 2];
    sums[0] = sums[0] + x;
    for (int k = 2; k <= kOrder; ++k) sums[k - 1] = powers[k / 2] * powers[k - k / 2] + sums[k - 1];
  }

  // x, x², ... to the power kOrder.
  template <class V, int kOrder>
  struct PowerSums : AdditiveSums<V, kOrder> {
    V center, inverse_reach;

    template <class AnyFrame>
    R2_INLINE explicit PowerSums(const AnyFrame& frame)
        : center(broadcast<V>(frame.center)), inverse_reach(broadcast<V>(frame.inverse_reach)) {}

    R2_INLINE void add(V w) { add_powers<kOrder>(this->fields, (w - center) * inverse_reach); }
  };
  template <class V>
  using PowerSums4 = PowerSums<V, 4>;
  template <class V>
  using PowerSums6 = PowerSums<V, 6>;
  template <class V>
  using PowerSums10 = PowerSums<V, 10>;

  // The sums of powers, and the extremes, in one look.
  template <class V, int kOrder>
  struct PowerSumsAndExtent {
    static constexpr bool kIsFirstLook = true;

    V fields[kOrder + 2];  // the sums, the maximum, the minimum
    V center, inverse_reach;

    template <class T>
    R2_INLINE explicit PowerSumsAndExtent(const Frame<T>& frame)
        : center(broadcast<V>(frame.center)), inverse_reach(broadcast<V>(frame.inverse_reach)) {
      for (int i = 0; i < kOrder; ++i) fields[i] = V{};
      fields[kOrder] = broadcast<V>(-std::numeric_limits<double>::infinity());
      fields[kOrder + 1] = broadcast<V>(std::numeric_limits<double>::infinity());
    }
    R2_INLINE void add(V w) {
      add_powers<kOrder>(fields, (w - center) * inverse_reach);
      include(w, w);
    }
    R2_INLINE void merge(const PowerSumsAndExtent& other) {
      for (int i = 0; i < kOrder; ++i) fields[i] = fields[i] + other.fields[i];
      include(other.fields[kOrder], other.fields[kOrder + 1]);
    }

   private:
    R2_INLINE void include(V maximum, V minimum) { Extent<V>::include(fields + kOrder, maximum, minimum); }
  };
  template <class V>
  using PowerSumsAndExtent4 = PowerSumsAndExtent<V, 4>;
  template <class V>
  using PowerSumsAndExtent6 = PowerSumsAndExtent<V, 6>;

  // exp(±|a|·(w - center)) times 1, u and u², u being the distance to the maximum (first three) or to the minimum.
  template <class V>
  struct MiddleSums : AdditiveSums<V, 6> {
    V center, temperature, maximum, minimum;

    template <class AnyFrame>
    R2_INLINE explicit MiddleSums(const AnyFrame& frame)
        : center(broadcast<V>(frame.center)),
          temperature(broadcast<V>(frame.temperature * kLog2E)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)) {}

    R2_INLINE void add(V w) {
      const PowersOfTwo<V> exponential((w - center) * temperature);
      add_moments(this->fields, w - maximum, exponential.up);
      add_moments(this->fields + 3, w - minimum, exponential.down);
    }
  };

  // The same with exp(|a|·(w - maximum)) and exp(-|a|·(w - minimum)).
  template <class V>
  struct LargeSums : AdditiveSums<V, 6> {
    V temperature, maximum, minimum;

    template <class AnyFrame>
    R2_INLINE explicit LargeSums(const AnyFrame& frame)
        : temperature(broadcast<V>(frame.temperature * kLog2E)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)) {}

    R2_INLINE void add(V w) {
      const V upper = finite(w - maximum), lower = finite(w - minimum);
      add_moments(this->fields, upper, negative_power_of_two(temperature * upper));
      add_moments(this->fields + 3, lower, negative_power_of_two(-temperature * lower));
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

  // What follows is computed for one segment, D being double, or for one a lane of D.

  // Sums of exp, d·exp and d²·exp over the entries, d being the distance to some point.
  template <class D>
  struct MomentsOf {
    D z, s, q;

    // The sums after every d has grown by `distance`, if exp is exp(a·d).
    MomentsOf shifted(D distance, D a) const {
      if constexpr (sizeof(D) == sizeof(double)) {
        if (distance == 0) return *this;
      }
      return scaled(exponential(a * distance)).moved(distance);
    }
    MomentsOf moved(D distance) const { return {z, s + distance * z, q + distance * (2.0 * s + distance * z)}; }
    MomentsOf scaled(D factor) const { return {factor * z, factor * s, factor * q}; }
    MomentsOf operator+(const MomentsOf& other) const { return {z + other.z, s + other.s, q + other.q}; }
    D mean() const { return s / z; }
    D variance() const { return q / z - mean() * mean(); }
  };
  using Moments = MomentsOf<double>;

  // The extremes, and the moments of the distances to them. What the exponentials are relative to does not matter here.
  template <class D>
  struct EndsOf {
    D maximum, minimum;
    MomentsOf<D> upper, lower;

    D soft_range() const { return (maximum - minimum) + (upper.mean() - lower.mean()); }
    D variance() const { return upper.variance() + lower.variance(); }
  };

  // The exponentials are exp(|a|·distance) and exp(-|a|·distance).
  struct Row : EndsOf<double> {
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
      // A negative temperature makes the soft maximum the mean near the minimum, and the soft minimum that near the
      // maximum.
      return {(parameter < 0 ? -soft_range() : soft_range()) + remainder, variance() - remainder};
    }
  };

  // The slope p·(1 + |a|·(w - s_max)) - q·(1 - |a|·(w - s_min)), negated for a negative a, in terms of the distances
  // t = |a|·(w - top) and |a|·(w - bottom) to two points: p_scale·exp(t)·(upper + t) - q_scale·exp(-t)·(lower - t).
  template <class D>
  struct SlopeConstantsOf {
    D p_scale, q_scale, upper, lower;

    SlopeConstantsOf() {}
    // Where the moments' exponentials are relative to these points.
    SlopeConstantsOf(const EndsOf<D>& ends, D temperature, D top, D bottom, D coefficient)
        : p_scale(coefficient / ends.upper.z),
          q_scale(coefficient / ends.lower.z),
          upper(1.0 + temperature * (top - ends.maximum - ends.upper.mean())),
          lower(1.0 - temperature * (bottom - ends.minimum - ends.lower.mean())) {}
    // Where they are relative to the extremes.
    SlopeConstantsOf(const EndsOf<D>& ends, D temperature, D center, D coefficient)
        : SlopeConstantsOf(ends, temperature, center, center, coefficient) {
      p_scale = p_scale * exponential(temperature * (center - ends.maximum));
      q_scale = q_scale * exponential(temperature * (ends.minimum - center));
    }
  };
  using SlopeConstants = SlopeConstantsOf<double>;

  // The coefficients of its series in x = (w - center) / reach. They are differences of nearly equal numbers as a goes
  // to 0, so they are taken in float64.
  template <class D, int kOrder>
  struct SeriesOf {
    D coefficients[kOrder + 1];

    SeriesOf(const SlopeConstantsOf<D>& constants, D half) {
      D p = constants.p_scale, q = constants.q_scale;  // times (±half)^k / k!
      for (int k = 0; k <= kOrder; ++k) {
        coefficients[k] = p * (constants.upper + double(k)) - q * (constants.lower + double(k));
        p = p * half * (1.0 / (k + 1));
        q = q * half * (-1.0 / (k + 1));
      }
    }
    double operator[](int k) const { return coefficients[k]; }
  };

  template <class V, int kOrder>
  struct SeriesSlope {
    V center, inverse_reach, coefficients[kOrder + 1];

    template <class AnyFrame, class Series>
    R2_INLINE SeriesSlope(const AnyFrame& frame, const Series& series)
        : center(broadcast<V>(frame.center)), inverse_reach(broadcast<V>(frame.inverse_reach)) {
      for (int k = 0; k <= kOrder; ++k) coefficients[k] = broadcast<V>(series[k]);
    }

    R2_INLINE V operator()(V w) const {
      const V x = (w - center) * inverse_reach;
      V slope = coefficients[kOrder];
      for (int k = kOrder - 1; k >= 0; --k) slope = slope * x + coefficients[k];
      return slope;
    }
  };
  template <class V>
  using SeriesSlope4 = SeriesSlope<V, 4>;
  template <class V>
  using SeriesSlope6 = SeriesSlope<V, 6>;
  template <class V>
  using SeriesSlope10 = SeriesSlope<V, 10>;

  template <class V>
  struct MiddleSlope {
    V center, temperature, p_scale, q_scale, upper, lower;

    template <class AnyFrame, class Constants>
    R2_INLINE MiddleSlope(const AnyFrame& frame, const Constants& constants)
        : center(broadcast<V>(frame.center)),
          temperature(broadcast<V>(frame.temperature * kLog2E)),
          p_scale(broadcast<V>(constants.p_scale * kLn2)),
          q_scale(broadcast<V>(constants.q_scale * kLn2)),
          upper(broadcast<V>(constants.upper * kLog2E)),
          lower(broadcast<V>(constants.lower * kLog2E)) {}

    R2_INLINE V operator()(V w) const {
      const V t = (w - center) * temperature;
      const PowersOfTwo<V> exponential(t);
      return (p_scale * (upper + t)) * exponential.up - (q_scale * (lower - t)) * exponential.down;
    }
  };

  template <class V>
  struct LargeSlope {
    V temperature, maximum, minimum, p_scale, q_scale, upper, lower;

    template <class AnyFrame, class Constants>
    R2_INLINE LargeSlope(const AnyFrame& frame, const Constants& constants)
        : temperature(broadcast<V>(frame.temperature * kLog2E)),
          maximum(broadcast<V>(frame.maximum)),
          minimum(broadcast<V>(frame.minimum)),
          p_scale(broadcast<V>(constants.p_scale * kLn2)),
          q_scale(broadcast<V>(constants.q_scale * kLn2)),
          upper(broadcast<V>(constants.upper * kLog2E)),
          lower(broadcast<V>(constants.lower * kLog2E)) {}

    R2_INLINE V operator()(V w) const {
      const V above = bounded((w - maximum) * temperature), below = bounded((minimum - w) * temperature);
      return (p_scale * (upper + above)) * negative_power_of_two(above) -
             (q_scale * (lower + below)) * negative_power_of_two(below);
    }

    // Below -115 the power is 0, and 0 times an infinite distance must be 0.
    static R2_INLINE V bounded(V t) { return select(t < broadcast<V>(-120), broadcast<V>(-120), t); }
  };

  // The moments of the distances to the center, from the sums of the powers of these distances over `reach`.
  template <int kOrder, class D>
  static void series_moments(D half, D reach, double count, const D* sums, MomentsOf<D>& up, MomentsOf<D>& down) {
    const D zero = broadcast<D>(0);
    up = down = {zero, zero, zero};
    D weight = broadcast<D>(1);  // half^k / k!
    for (int k = 0; k <= kOrder; ++k) {
      const MomentsOf<D> term{k == 0 ? broadcast<D>(count) : sums[k - 1], k + 1 <= kOrder ? sums[k] : zero,
                              k + 2 <= kOrder ? sums[k + 1] : zero};
      up = up + term.scaled(weight);
      down = down + term.scaled(k % 2 == 0 ? weight : -weight);
      weight = weight * half * (1.0 / (k + 1));
    }
    up = {up.z, reach * up.s, reach * reach * up.q};
    down = {down.z, reach * down.s, reach * reach * down.q};
  }

  template <class Chunk>
  static Row reduce(const Chunk& chunk, double parameter) {
    using ChunkFrame = Frame<typename Chunk::Scalar>;
    // The series hold around any center: where the first entries suggest that they are enough, one look is enough.
    constexpr int64_t kFirst = 1024;
    const Extent<double> first = chunk.part(0, kFirst).template sum<Extent>();
    const ChunkFrame guess(first.fields[0], first.fields[1], parameter);
    if (chunk.size() > kFirst && guess.is_representable()) {
      Row row;
      if (guess.half <= ChunkFrame::kLimit4 / 2) {
        if (reduce_around<4, PowerSumsAndExtent4>(guess, chunk, ChunkFrame::kLimit4, row)) return row;
      } else if (guess.half <= ChunkFrame::kLimit6 / 2) {
        if (reduce_around<6, PowerSumsAndExtent6>(guess, chunk, ChunkFrame::kLimit6, row)) return row;
      }
    }
    const Extent<double> extent = chunk.template sum<Extent>();
    const ChunkFrame frame(extent.fields[0], extent.fields[1], parameter);
    if (frame.is_representable()) return reduce_in(frame, chunk);
    return reduce_in(Frame<double>(frame.maximum, frame.minimum, parameter), chunk.in_float64());
  }

  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& row, double parameter, double coefficient) {
    const Frame<typename Chunk::Scalar> frame(row.maximum, row.minimum, parameter);
    const double signed_coefficient = parameter < 0 ? -coefficient : coefficient;
    if (frame.is_representable()) return apply_in(frame, chunk, row, signed_coefficient);
    apply_in(Frame<double>(frame.maximum, frame.minimum, parameter), chunk.in_float64(), row, signed_coefficient);
  }

 private:
  // Whether the series around the guess hold for the whole chunk, and its row if they do.
  template <int kOrder, template <class> class Sums, class T, class Chunk>
  static bool reduce_around(const Frame<T>& guess, const Chunk& chunk, double limit, Row& row) {
    const Sums<double> sums = chunk.template sum<Sums>(guess);
    const double maximum = sums.fields[kOrder], minimum = sums.fields[kOrder + 1];
    row = series_row<kOrder>(guess, chunk.size(), sums.fields, maximum, minimum);
    return guess.holds_up_to(maximum, minimum, limit);
  }

  template <class T, class Chunk>
  static Row reduce_in(const Frame<T>& frame, const Chunk& chunk) {
    const double maximum = frame.maximum, minimum = frame.minimum;
    switch (frame.regime) {
      case Regime::kSeries4:
        return series_row<4>(frame, chunk.size(), chunk.template sum<PowerSums4>(frame).fields, maximum, minimum);
      case Regime::kSeries6:
        return series_row<6>(frame, chunk.size(), chunk.template sum<PowerSums6>(frame).fields, maximum, minimum);
      case Regime::kSeries10:
        return series_row<10>(frame, chunk.size(), chunk.template sum<PowerSums10>(frame).fields, maximum, minimum);
      case Regime::kMiddle:
        return middle_row(frame, chunk.template sum<MiddleSums>(frame).fields);
      default:
        return large_row(frame, chunk.template sum<LargeSums>(frame).fields);
    }
  }

  template <class T, class Chunk>
  static void apply_in(const Frame<T>& frame, const Chunk& chunk, const Row& row, double coefficient) {
    const double a = frame.temperature;
    if (frame.regime == Regime::kLarge) {
      const SlopeConstants constants(row, a, row.maximum, row.minimum, coefficient);
      return chunk.template apply<LargeSlope>(frame, constants);
    }
    const SlopeConstants constants(row, a, frame.center, coefficient);
    switch (frame.regime) {
      case Regime::kSeries4:
        return chunk.template apply<SeriesSlope4>(frame, SeriesOf<double, 4>(constants, frame.half));
      case Regime::kSeries6:
        return chunk.template apply<SeriesSlope6>(frame, SeriesOf<double, 6>(constants, frame.half));
      case Regime::kSeries10:
        return chunk.template apply<SeriesSlope10>(frame, SeriesOf<double, 10>(constants, frame.half));
      default:
        return chunk.template apply<MiddleSlope>(frame, constants);
    }
  }

  // The moments of d = w - center are power series in ±half whose coefficients are the sums of powers.
  template <int kOrder, class T>
  static Row series_row(const Frame<T>& frame, int64_t count, const double* sums, double maximum, double minimum) {
    Moments up, down;
    series_moments<kOrder>(frame.half, frame.reach, static_cast<double>(count), sums, up, down);
    return {maximum, minimum, up.shifted(frame.center - maximum, frame.temperature),
            down.shifted(frame.center - minimum, -frame.temperature)};
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

// ---- kurtosis: (K - 1.8)² ------------------------------------------------------------------------------------------

// With c the middle of the extremes and r the distance from there to either, the sums are of powers of x = (w - c) / r.
// All of it is computed in float64: of weights with outliers, the variance is a small part of these sums.
struct Kurtosis {
  static constexpr const char* kName = "kurtosis";
  static constexpr bool kHasParameter = false;
  static constexpr bool kIsSparse = false;
  static constexpr bool kIsOnePass = false;

  static constexpr double kUniform = 1.8;  // the kurtosis that is aimed at

  struct Frame {
    double center, reach, inverse;

    Frame(double maximum, double minimum)
        : center(maximum / 2 + minimum / 2),
          reach(maximum / 2 - minimum / 2),
          // Equal extremes are all there is: x is zero, or a NaN.
          inverse(reach >= std::numeric_limits<double>::min() ? 1 / reach : 0) {}
  };

  template <class V>
  struct Powers {
    static constexpr bool kIsFirstLook = false;

    V fields[4];
    V center, inverse;

    R2_INLINE explicit Powers(const Frame& frame)
        : fields{V{}, V{}, V{}, V{}}, center(broadcast<V>(frame.center)), inverse(broadcast<V>(frame.inverse)) {}

    R2_INLINE void add(V w) {
      const V x = (w - center) * inverse, square = x * x;
      fields[0] = fields[0] + x;
      fields[1] = fields[1] + square;
      fields[2] = fields[2] + square * x;
      fields[3] = fields[3] + square * square;
    }
    R2_INLINE void merge(const Powers& other) {
      for (int i = 0; i < 4; ++i) fields[i] = fields[i] + other.fields[i];
    }
  };

  // Of x over a segment: the mean, the central moments and the kurtosis; whether all entries are equal.
  struct Moments {
    double mean, variance, third, kurtosis;
    bool is_flat;
  };

  struct Row {
    double maximum, minimum, count, first, second, third, fourth;

    static Row empty() {
      return {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity(), 0, 0, 0, 0, 0};
    }
    void merge(const Row& other, double /*parameter*/) {
      double merged[] = {maximum, minimum};
      Extent<double>::include(merged, other.maximum, other.minimum);
      const Frame whole(merged[0], merged[1]);
      const Row a = moved(whole), b = other.moved(whole);
      *this = {merged[0],           merged[1],         a.count + b.count,  a.first + b.first,
               a.second + b.second, a.third + b.third, a.fourth + b.fourth};
    }
    // The sums of powers of shift + scale·x, which is what x is in the frame of the whole.
    Row moved(const Frame& whole) const {
      if (count == 0) return empty();  // whose frame is none
      const Frame own(maximum, minimum);
      const double shift = (own.center - whole.center) * whole.inverse, scale = own.reach * whole.inverse;
      const double x1 = scale * first, x2 = scale * scale * second, x3 = scale * scale * scale * third;
      const double x4 = scale * scale * scale * scale * fourth;
      return {maximum,
              minimum,
              count,
              x1 + shift * count,
              x2 + shift * (2 * x1 + shift * count),
              x3 + shift * (3 * x2 + shift * (3 * x1 + shift * count)),
              x4 + shift * (4 * x3 + shift * (6 * x2 + shift * (4 * x1 + shift * count)))};
    }
    Moments moments() const {
      if (second == 0) return {0, 1, 0, 0, true};
      const double mean = first / count, square = second / count, cube = third / count;
      const double variance = square - mean * mean;
      const double fourth_moment = fourth / count - 4 * mean * cube + 6 * mean * mean * square - 3 * power(mean, 4);
      return {mean, variance, cube - 3 * mean * square + 2 * power(mean, 3), fourth_moment / (variance * variance),
              false};
    }
    Value finalize(double /*parameter*/) const {
      const Moments of = moments();
      return {of.is_flat ? 0 : power(of.kurtosis - kUniform, 2), 0};
    }
  };

  // A cubic in x minus its mean.
  template <class V>
  struct Slope {
    V center, inverse, mean, cubic, linear, constant;

    R2_INLINE explicit Slope(const Row& row, double coefficient) {
      const Frame frame(row.maximum, row.minimum);
      const Moments of = row.moments();
      const double deviation = std::sqrt(of.variance), variance = of.variance;
      const double scale =
          of.is_flat ? 0 : coefficient * 8 * (of.kurtosis - kUniform) * frame.inverse / (row.count * deviation);
      center = broadcast<V>(frame.center);
      inverse = broadcast<V>(frame.inverse);
      mean = broadcast<V>(of.mean);
      cubic = broadcast<V>(scale / (variance * deviation));
      linear = broadcast<V>(scale * of.kurtosis / deviation);
      constant = broadcast<V>(scale * of.third / (variance * deviation));
    }

    R2_INLINE V operator()(V w) const {
      const V y = (w - center) * inverse - mean;
      return y * (y * y * cubic - linear) - constant;
    }
  };

  template <class Chunk>
  static Row reduce(const Chunk& chunk, double /*parameter*/) {
    if (chunk.size() == 0) return Row::empty();
    const Extent<double> extent = chunk.template sum<Extent>();
    const double maximum = extent.fields[0], minimum = extent.fields[1];
    const Powers<double> sums = chunk.widened().template sum<Powers>(Frame(maximum, minimum));
    return {maximum,        minimum,       static_cast<double>(chunk.size()), sums.fields[0], sums.fields[1],
            sums.fields[2], sums.fields[3]};
  }
  template <class Chunk>
  static void apply(const Chunk& chunk, const Row& row, double /*parameter*/, double coefficient) {
    chunk.widened().template apply<Slope>(row, coefficient);
  }
};

// ---- all of them ----------------------------------------------------------------------------------------------------

template <class... Of>
struct PenaltyList {
  static constexpr int kCount = sizeof...(Of);
};
// What every table goes over. Their numbers are those of this list, their names what the operators take.
using Penalties = PenaltyList<LInf, Margin, SoftMinMax, Kurtosis>;

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
