// Differentiable k-means (DKM: Cho et al., arXiv 2108.12659): the attention that an entry pays to all centroids, what
// it adds to their sums, and its gradients. Written once for all C++ backends; docs/palettization.md derives the
// formulas, r2_kernels/attention.py has the same in PyTorch.
#pragma once

#include "penalties.h"

namespace r2 {

inline constexpr int64_t kMostClusters = 256;
// As in r2_kernels/attention.py.
inline constexpr double kAttentionFloor = 1e-7, kHeadStart = 1e-7, kSettled = 1e-4;

// One iteration; the arrays have a number per cluster.
struct DkmIteration {
  int64_t clusters;
  double temperature;
  const double* centroids;  // those that the attention goes to
  const double* updated;    // those after the iteration; for all but sums
  const double* shares;     // the gradients of these, over the totals of the attention; for gradients only
  bool is_first, is_last;
};

// The sums of one iteration over some entries: totals of the attention, then its moments about the centroids, then the
// sum of the least distances.
inline int64_t dkm_sums(int64_t clusters) { return 2 * clusters + 1; }

inline namespace R2_INSTRUCTION_SET {

// V is a scalar or a vector of float or double, of as many entries.
template <class V>
class DkmEntries {
 public:
  R2_INLINE explicit DkmEntries(const DkmIteration& iteration)
      : clusters_(iteration.clusters), exponent_(broadcast<V>(kLog2E / iteration.temperature)) {
    copy(iteration.centroids, centroids_);
    copy(iteration.updated, updated_);
    copy(iteration.shares, shares_);
  }

  R2_INLINE void add_to(V* sums, V entry) {
    const V least = attend(entry);
    for (int64_t j = 0; j < clusters_; ++j) {
      const V attention = raised(powers_[j] * inverse_total_);
      sums[j] = sums[j] + attention;
      sums[clusters_ + j] = sums[clusters_ + j] + attention * (entry - centroids_[j]);
    }
    sums[2 * clusters_] = sums[2 * clusters_] + least;
  }

  R2_INLINE V output(V entry) {
    attend(entry);
    V sum = broadcast<V>(0);
    for (int64_t j = 0; j < clusters_; ++j) sum = sum + raised(powers_[j] * inverse_total_) * updated_[j];
    return sum;
  }

  // Adds to the gradients of the updated centroids what comes from the outputs alone.
  R2_INLINE void add_of_outputs(V* of_updated, V entry, V output_gradient) {
    attend(entry);
    for (int64_t j = 0; j < clusters_; ++j) {
      of_updated[j] = of_updated[j] + output_gradient * raised(powers_[j] * inverse_total_);
    }
  }

  // Adds to the gradients of the centroids, and returns the entry's from the updated centroids through the attention
  // without its second part, which is to be subtracted: both still without the factor 2 / temperature.
  struct Slope {
    V through_moments, through_attention;
  };
  // `output_gradient` is zero but in the last iteration.
  R2_INLINE Slope slope(V entry, V output_gradient, V* of_centroids) {
    attend(entry);
    const V zero = broadcast<V>(0), one = broadcast<V>(1), floor = broadcast<V>(kAttentionFloor);
    // The gradients of the attention, from here on less that of the nearest centroid, so that what the softmax cancels
    // is not lost in its rounding: where one centroid has it all, only small numbers are left.
    V nearest = zero;
    for (int64_t j = 0; j < clusters_; ++j) {
      slopes_[j] = (shares_[j] - output_gradient) * (entry - updated_[j]);
      nearest = select(powers_[j] == one, slopes_[j], nearest);
    }
    const V of_nearest = nearest + output_gradient * entry;
    V mean = zero, floored = zero, through_moments = zero;
    for (int64_t j = 0; j < clusters_; ++j) {
      const V probability = powers_[j] * inverse_total_, difference = slopes_[j] - nearest;
      const auto is_floored = probability < floor;
      powers_[j] = probability;
      slopes_[j] = select(is_floored, -of_nearest, difference);
      mean = mean + select(is_floored, zero, probability * difference);
      floored = floored + select(is_floored, probability, zero);
      through_moments = through_moments + select(is_floored, floor, probability) * shares_[j];
    }
    const V shift = floored * of_nearest - mean;
    V through_attention = zero;
    for (int64_t j = 0; j < clusters_; ++j) {
      const V term = powers_[j] * (shift + slopes_[j]) * (entry - centroids_[j]);
      through_attention = through_attention + term;
      of_centroids[j] = of_centroids[j] + term;
    }
    return {through_moments, through_attention};
  }

 private:
  using T = lane_t<V>;

  R2_INLINE void copy(const double* from, T* to) const {
    if (from == nullptr) return;
    for (int64_t j = 0; j < clusters_; ++j) to[j] = static_cast<T>(from[j]);
  }

  // Sets powers_ and inverse_total_, whose products are the softmax, and returns the least distance. The power of the
  // nearest centroid is exactly 1.
  R2_INLINE V attend(V entry) {
    const V first = entry - centroids_[0];
    V least = powers_[0] = first * first - broadcast<V>(kHeadStart);
    for (int64_t j = 1; j < clusters_; ++j) {
      const V offset = entry - centroids_[j];
      const V distance = offset * offset;
      least = select(distance < least, distance, least);
      powers_[j] = distance;
    }
    V total = least - least;  // NaN where no distance is finite
    for (int64_t j = 0; j < clusters_; ++j) {
      powers_[j] = negative_power_of_two((least - powers_[j]) * exponent_);
      total = total + powers_[j];
    }
    inverse_total_ = broadcast<V>(1) / total;
    return least;
  }

  // A NaN stays.
  R2_INLINE static V raised(V probability) {
    const V floor = broadcast<V>(kAttentionFloor);
    return select(probability < floor, floor, probability);
  }

  const int64_t clusters_;
  const V exponent_;
  V inverse_total_;
  T centroids_[kMostClusters], updated_[kMostClusters], shares_[kMostClusters];
  V powers_[kMostClusters], slopes_[kMostClusters];
};

}  // namespace R2_INSTRUCTION_SET
}  // namespace r2
