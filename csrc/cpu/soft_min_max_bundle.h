// Soft-min-max of as many short segments as a vector has lanes: the sums, slopes and formulas of penalties.h, of which
// those that follow from a segment's sums are computed for a vector of segments.
#pragma once

#include "../penalties.h"
#include "bundle.h"

namespace r2 {
inline namespace R2_INSTRUCTION_SET {

// `Bundle` is the skeleton's: it offers sum(make) and apply(make), make(i) being the sums or the slope of segment i.
template <class Bundle>
class SoftMinMaxBundle {
  using S = SoftMinMax;
  using T = typename Bundle::Scalar;
  using V = typename Bundle::Vector;
  using D = typename Bundle::Doubles;
  using Regime = S::Regime;
  using TypeFrame = S::Frame<T>;
  static constexpr int kWidth = Bundle::kWidth, kStep = Bundle::kDoubles, kSteps = kWidth / kStep;

 public:
  // Parameters and coefficients of as many segments as the bundle has.
  SoftMinMaxBundle(const Bundle& bundle, const double* parameters) : bundle_(bundle) {
    for (int i = 0; i < kWidth; ++i) {
      parameter_[i] = parameters[i < bundle.count() ? i : bundle.count() - 1];
      temperature_[i] = std::fabs(parameter_[i]);
    }
  }

  // Each of these returns whether it could do it: where not, the segments are too different from one another, or not
  // representable, and nothing has been done.
  bool reduce(S::Row* rows, double* values, double* parameter_gradients) {
    find_extremes();
    if (!find_regime()) return false;
    add_up();
    write_values(values, parameter_gradients);
    write_rows(rows);
    return true;
  }
  bool apply(const S::Row* rows, const double* coefficients) {
    read_rows(rows);
    if (!find_regime()) return false;
    add_slopes(coefficients, false);
    return true;
  }
  bool reduce_and_apply(const double* coefficients, double* values, double* parameter_gradients) {
    find_extremes();
    if (!find_regime()) return false;
    add_up();
    write_values(values, parameter_gradients);
    add_slopes(coefficients, true);
    return true;
  }

 private:
  // What sums and slopes ask of a frame.
  struct Lane {
    T maximum, minimum, center, inverse_reach;
    double temperature;
  };
  Lane lane(int i) const { return {maximum_[i], minimum_[i], center_[i], inverse_reach_[i], temperature_[i]}; }

  template <class Number>
  static D at(const Number* numbers, int step) {
    return load_doubles(numbers + step * kStep);
  }

  void find_extremes() {
    const auto extremes = bundle_.sum([](int) { return Extent<V>(); });
    store(maximum_, extremes.fields[0]);
    store(minimum_, extremes.fields[1]);
  }

  // The frames, as SoftMinMax::Frame has them, and one regime for all: series of a higher order, or exponentials where
  // they do not cancel yet, serve segments that would do with less.
  bool find_regime() {
    for (int k = 0; k < kSteps; ++k) {
      const D maximum = at(maximum_, k), minimum = at(minimum_, k), temperature = at(temperature_, k);
      const D smallest = broadcast<D>(TypeFrame::kSmallest);
      const D distance = maximum * 0.5 - minimum * 0.5;
      const D reach = select(distance > smallest, distance, smallest);
      store_doubles(center_ + k * kStep, maximum * 0.5 + minimum * 0.5);
      store_doubles(inverse_reach_ + k * kStep, 1.0 / reach);
      store_doubles(reach_ + k * kStep, reach);
      store_doubles(half_ + k * kStep, temperature * reach);
    }
    double largest = 0, least = std::numeric_limits<double>::infinity();
    bool is_representable = true;
    for (int i = 0; i < kWidth; ++i) {
      const bool is_constant = maximum_[i] == minimum_[i];
      is_representable &= (is_constant || reach_[i] > TypeFrame::kSmallest) && reach_[i] <= TypeFrame::kLargest &&
                          temperature_[i] <= TypeFrame::kLargest * TypeFrame::kLargest;
      largest = half_[i] > largest ? half_[i] : largest;
      least = !is_constant && half_[i] < least ? half_[i] : least;
    }
    constexpr double kLeastExponential = 0.25;
    regime_ = largest <= TypeFrame::kLimit4    ? Regime::kSeries4
              : largest <= TypeFrame::kLimit6  ? Regime::kSeries6
              : largest <= TypeFrame::kLimit10 ? Regime::kSeries10
              : largest <= 30                  ? Regime::kMiddle
                                               : Regime::kLarge;
    return is_representable && (largest <= TypeFrame::kLimit10 || least >= kLeastExponential * TypeFrame::kLimit10);
  }

  void add_up() {
    switch (regime_) {
      case Regime::kSeries4:
        return add_up_powers<4, S::PowerSums4>();
      case Regime::kSeries6:
        return add_up_powers<6, S::PowerSums6>();
      case Regime::kSeries10:
        return add_up_powers<10, S::PowerSums10>();
      case Regime::kMiddle:
        return add_up_exponentials<S::MiddleSums>();
      default:
        return add_up_exponentials<S::LargeSums>();
    }
  }
  template <int kOrder, template <class> class Sums>
  void add_up_powers() {
    const auto sums = bundle_.sum([&](int i) { return Sums<V>(lane(i)); });
    T fields[kOrder][kWidth];
    __builtin_memcpy(fields, sums.fields, sizeof(fields));
    for (int k = 0; k < kSteps; ++k) {
      D of_step[kOrder];
      for (int field = 0; field < kOrder; ++field) of_step[field] = at(fields[field], k);
      const D maximum = at(maximum_, k), minimum = at(minimum_, k), center = at(center_, k);
      S::MomentsOf<D> up, down;
      S::series_moments<kOrder>(at(half_, k), at(reach_, k), static_cast<double>(bundle_.size()), of_step, up, down);
      ends_[k] = {maximum, minimum, up.moved(center - maximum), down.moved(center - minimum)};
    }
  }
  template <template <class> class Sums>
  void add_up_exponentials() {
    const auto sums = bundle_.sum([&](int i) { return Sums<V>(lane(i)); });
    T fields[6][kWidth];
    __builtin_memcpy(fields, sums.fields, sizeof(fields));
    for (int k = 0; k < kSteps; ++k) {
      ends_[k] = {at(maximum_, k),
                  at(minimum_, k),
                  {at(fields[0], k), at(fields[1], k), at(fields[2], k)},
                  {at(fields[3], k), at(fields[4], k), at(fields[5], k)}};
    }
  }

  void write_values(double* values, double* parameter_gradients) {
    double remainder[kWidth], all_values[kWidth], all_gradients[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const bool is_known = i > 0 && parameter_[i] == parameter_[i - 1];
      remainder[i] = is_known ? remainder[i - 1] : std::exp(-parameter_[i]);
    }
    for (int k = 0; k < kSteps; ++k) {
      const D range = ends_[k].soft_range(), zero = broadcast<D>(0);
      const D signed_range = select(at(parameter_, k) < zero, -range, range);
      store_doubles(all_values + k * kStep, signed_range + at(remainder, k));
      store_doubles(all_gradients + k * kStep, ends_[k].variance() - at(remainder, k));
    }
    for (int i = 0; i < bundle_.count(); ++i) {
      values[i] = all_values[i];
      parameter_gradients[i] = all_gradients[i];
    }
  }

  // With the exponentials relative to the extremes.
  void write_rows(S::Row* rows) {
    double fields[8][kWidth];
    for (int k = 0; k < kSteps; ++k) {
      S::EndsOf<D> ends = ends_[k];
      if (regime_ != Regime::kLarge) {
        const D temperature = at(temperature_, k), center = at(center_, k);
        ends.upper = ends.upper.scaled(exponential(temperature * (center - ends.maximum)));
        ends.lower = ends.lower.scaled(exponential(temperature * (ends.minimum - center)));
      }
      const D in_order[8] = {ends.maximum, ends.minimum, ends.upper.z, ends.upper.s,
                             ends.upper.q, ends.lower.z, ends.lower.s, ends.lower.q};
      for (int field = 0; field < 8; ++field) store_doubles(fields[field] + k * kStep, in_order[field]);
    }
    for (int i = 0; i < bundle_.count(); ++i) {
      double row[8];
      for (int field = 0; field < 8; ++field) row[field] = fields[field][i];
      __builtin_memcpy(rows + i, row, sizeof(row));
    }
  }
  void read_rows(const S::Row* rows) {
    double fields[8][kWidth];
    for (int i = 0; i < kWidth; ++i) {
      double row[8];
      __builtin_memcpy(row, rows + (i < bundle_.count() ? i : bundle_.count() - 1), sizeof(row));
      for (int field = 0; field < 8; ++field) fields[field][i] = row[field];
      maximum_[i] = static_cast<T>(row[0]);
      minimum_[i] = static_cast<T>(row[1]);
    }
    for (int k = 0; k < kSteps; ++k) {
      ends_[k] = {at(fields[0], k),
                  at(fields[1], k),
                  {at(fields[2], k), at(fields[3], k), at(fields[4], k)},
                  {at(fields[5], k), at(fields[6], k), at(fields[7], k)}};
    }
  }

  // `is_fresh`: the ends come from add_up(), and not from rows, whose exponentials are relative to the extremes.
  void add_slopes(const double* coefficients, bool is_fresh) {
    double coefficient[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const double given = coefficients[i < bundle_.count() ? i : bundle_.count() - 1];
      coefficient[i] = parameter_[i] < 0 ? -given : given;
    }
    S::SlopeConstantsOf<D>* constants = constants_;
    for (int k = 0; k < kSteps; ++k) {
      const S::EndsOf<D>& ends = ends_[k];
      const D temperature = at(temperature_, k), center = at(center_, k), c = at(coefficient, k);
      if (regime_ == Regime::kLarge) {
        constants[k] = S::SlopeConstantsOf<D>(ends, temperature, ends.maximum, ends.minimum, c);
      } else if (is_fresh) {
        constants[k] = S::SlopeConstantsOf<D>(ends, temperature, center, center, c);
      } else {
        constants[k] = S::SlopeConstantsOf<D>(ends, temperature, center, c);
      }
    }
    switch (regime_) {
      case Regime::kSeries4:
        return apply_series<4, S::SeriesSlope4>();
      case Regime::kSeries6:
        return apply_series<6, S::SeriesSlope6>();
      case Regime::kSeries10:
        return apply_series<10, S::SeriesSlope10>();
      case Regime::kMiddle:
        return apply_exponentials<S::MiddleSlope>();
      default:
        return apply_exponentials<S::LargeSlope>();
    }
  }
  template <int kOrder, template <class> class Slope>
  void apply_series() const {
    T coefficients[kOrder + 1][kWidth];
    for (int k = 0; k < kSteps; ++k) {
      const S::SeriesOf<D, kOrder> series(constants_[k], at(half_, k));
      for (int i = 0; i <= kOrder; ++i) store_doubles(coefficients[i] + k * kStep, series.coefficients[i]);
    }
    struct OfLane {
      const T (*coefficients)[kWidth];
      int lane;
      T operator[](int k) const { return coefficients[k][lane]; }
    };
    bundle_.apply([&](int i) { return Slope<V>(lane(i), OfLane{coefficients, i}); });
  }
  template <template <class> class Slope>
  void apply_exponentials() const {
    double fields[4][kWidth];
    for (int k = 0; k < kSteps; ++k) {
      const S::SlopeConstantsOf<D>& of_step = constants_[k];
      const D in_order[4] = {of_step.p_scale, of_step.q_scale, of_step.upper, of_step.lower};
      for (int field = 0; field < 4; ++field) store_doubles(fields[field] + k * kStep, in_order[field]);
    }
    struct OfLane {
      double p_scale, q_scale, upper, lower;
    };
    bundle_.apply(
        [&](int i) { return Slope<V>(lane(i), OfLane{fields[0][i], fields[1][i], fields[2][i], fields[3][i]}); });
  }

  const Bundle& bundle_;
  double parameter_[kWidth], temperature_[kWidth], reach_[kWidth], half_[kWidth];
  T maximum_[kWidth], minimum_[kWidth], center_[kWidth], inverse_reach_[kWidth];
  S::EndsOf<D> ends_[kSteps];
  S::SlopeConstantsOf<D> constants_[kSteps];
  Regime regime_;
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
