// The optimizers' operators of r2_kernels/optimizer_ops.py for the CPU dispatch key: what they check, and one pass over
// the chunks, which steps and then gathers the statistics of the new weights while they are in the cache.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "arguments.h"
#include "schedule.h"
#include "step_kernels.h"

namespace r2 {

namespace {

using Tensors = std::vector<Tensor>;

// What the operators share: docstring of r2_kernels/optimizer_ops.py.
struct Regularization {
  std::optional<std::string> penalty;
  std::optional<Tensor> parameter, next_parameter;
  Tensor statistics, partials, coefficients;
  bool is_decoupled;
};

// A number in a tensor of one, or the default where there is none.
double read_scalar(const std::optional<Tensor>& tensor, const char* name, double otherwise) {
  if (!tensor.has_value()) return otherwise;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->numel() == 1, name, ": expected one number on the CPU");
  const void* data = tensor->const_data_ptr();
  switch (tensor->scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(data);
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32 or float64");
  }
}

// The weights, their gradients and states, checked, as arrays.
class StepTensors {
 public:
  StepTensors(const Tensors& weights, const Tensors& gradients, const std::vector<const Tensors*>& states,
              const std::vector<const char*>& names)
      : segments_(checked_weights(weights)) {
    check_list(weights, gradients, "gradients");
    arrays_.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      arrays_.push_back({static_cast<char*>(weights[i].mutable_data_ptr()),
                         static_cast<const char*>(gradients[i].const_data_ptr()),
                         {},
                         segments_.all()[i].storage,
                         storage_of(gradients[i], "gradients", i),
                         kFloat32,
                         weights[i].numel()});
    }
    for (size_t s = 0; s < states.size(); ++s) {
      check_list(weights, *states[s], names[s]);
      for (size_t i = 0; i < weights.size(); ++i) {
        const Storage storage = storage_of((*states[s])[i], names[s], i);
        STD_TORCH_CHECK(s == 0 || storage == arrays_[i].state_storage, names[s], "[", i, "]: expected the dtype of ",
                        names[0]);
        arrays_[i].state_storage = storage;
        arrays_[i].states[s] = static_cast<char*>((*states[s])[i].mutable_data_ptr());
      }
    }
  }

  const Segments& segments() const { return segments_; }
  int64_t count() const { return static_cast<int64_t>(arrays_.size()); }

  // Of a chunk.
  StepArrays at(const ChunkPlace& place) const {
    StepArrays arrays = arrays_[place.segment];
    const int64_t offset = place.index * kChunkSize;
    arrays.size = std::min(kChunkSize, arrays.size - offset);
    arrays.weight += offset * bytes_of(arrays.weight_storage);
    arrays.gradient += offset * bytes_of(arrays.gradient_storage);
    for (char*& state : arrays.states) {
      if (state != nullptr) state += offset * bytes_of(arrays.state_storage);
    }
    return arrays;
  }

 private:
  static const Tensors& checked_weights(const Tensors& weights) {
    for (size_t i = 0; i < weights.size(); ++i) {
      storage_of(weights[i], "weights", i);
      STD_TORCH_CHECK(is_dense(weights[i]), "weights[", i, "]: expected a dense layout");
    }
    return weights;
  }
  static void check_list(const Tensors& weights, const Tensors& list, const char* name) {
    STD_TORCH_CHECK(list.size() == weights.size(), name, ": expected ", weights.size(), " tensors, got ", list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      storage_of(list[i], name, i);
      STD_TORCH_CHECK(have_same_shape(list[i], weights[i]) && have_same_order(list[i], weights[i]), name, "[", i,
                      "]: expected the shape and the strides of its weight");
    }
  }

  const Segments segments_;
  std::vector<StepArrays> arrays_;
};

// Float64 that is updated in place.
double* mutable_doubles(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous(), name,
                  ": expected a contiguous float64 tensor on the CPU");
  return static_cast<double*>(tensor.mutable_data_ptr());
}

// The penalty of the first tensors of a list: the slopes' statistics, and those that are gathered for the next step.
class Watch {
 public:
  Watch(const Regularization& given, const StepTensors& tensors, double sign)
      : tensors_(tensors), watched_(given.statistics.dim() == 2 ? given.statistics.size(0) : -1) {
    const int64_t watched = given.penalty.has_value() ? watched_ : 0;
    STD_TORCH_CHECK(watched_ >= 0 && watched_ == watched && watched <= tensors.count(),
                    "statistics: expected shape (W, S), W at most ", tensors.count(), ", and 0 without a penalty");
    if (watched == 0) return;
    index_ = penalty_index(*given.penalty);
    penalty_ = &kPenalties[index_];
    reduce_ = instruction_set().kernels[index_];
    STD_TORCH_CHECK(given.statistics.size(1) == penalty_->row_size, "statistics: expected ", penalty_->row_size,
                    " columns");
    rows_ = mutable_doubles(given.statistics, "statistics");
    const auto& chunks = tensors.segments().chunks();
    chunk_count_ =
        std::count_if(chunks.begin(), chunks.end(), [&](const ChunkPlace& place) { return place.segment < watched; });
    const int64_t expected = penalty_->is_sparse ? chunk_count_ : 0;
    STD_TORCH_CHECK(given.partials.dim() == 1 && given.partials.size(0) == expected, "partials: expected shape (",
                    expected, ",)");
    if (penalty_->is_sparse) maxima_ = mutable_doubles(given.partials, "partials");
    parameter_ = read_parameter(given.parameter, *penalty_, watched);
    next_parameter_ = read_parameter(given.next_parameter, *penalty_, watched);
    coefficients_ = read_scalars(given.coefficients, watched, "coefficients");
    for (double& coefficient : coefficients_) coefficient *= sign;
    chunk_rows_.resize(chunk_count_ * penalty_->row_size);
    countdown_.emplace(tensors.segments());
    is_decoupled_ = given.is_decoupled;
  }

  // Which kernels step a segment.
  int kernels_of(int32_t segment) const { return segment < watched_ ? index_ : int{kPenaltyCount}; }
  StepPenalty penalty_of(int64_t chunk, int32_t segment) const {
    if (segment >= watched_) return {};
    const double* row = rows_ + segment * penalty_->row_size;
    const bool has_slope = maxima_ == nullptr || !(maxima_[chunk] < row[0]);
    return {row, parameter_[segment], coefficients_[segment], is_decoupled_, has_slope, next_parameter_[segment]};
  }
  // Where the row of a chunk's new weights goes, null if it is not watched.
  double* row_of(int64_t chunk, int32_t segment) {
    return segment < watched_ ? &chunk_rows_[chunk * penalty_->row_size] : nullptr;
  }

  // The rows of tensors without entries, to which no chunk leads: they may hold those of a whole that others are part
  // of.
  void gather_empty() {
    for (int64_t i = 0; i < watched_; ++i) {
      if (tensors_.segments().all()[i].chunks() == 0) merge(static_cast<int32_t>(i));
    }
  }
  // After a watched chunk's step, which may have written its row. The last of a segment merges them, nobody reading the
  // old row then.
  void gather(int64_t chunk, int32_t segment, const StepArrays& stepped, bool has_row) {
    if (segment >= watched_) return;
    double* row = row_of(chunk, segment);
    if (!has_row) {
      reduce_[stepped.weight_storage].reduce(stepped.weight, stepped.size, next_parameter_[segment], row);
    }
    if (maxima_ != nullptr) maxima_[chunk] = row[0];
    if (countdown_->is_last(segment)) merge(segment);
  }

 private:
  void merge(int32_t index) {
    const Segment& segment = tensors_.segments().all()[index];
    double* row = rows_ + index * penalty_->row_size;
    penalty_->set_empty(row);
    for (int64_t chunk = 0; chunk < segment.chunks(); ++chunk) {
      penalty_->merge(row, &chunk_rows_[(segment.first_chunk + chunk) * penalty_->row_size], next_parameter_[index]);
    }
  }

  const StepTensors& tensors_;
  const int64_t watched_;
  int index_ = kPenaltyCount;
  const PenaltyEntry* penalty_ = nullptr;
  const ChunkKernels* reduce_ = nullptr;
  double* rows_ = nullptr;
  double* maxima_ = nullptr;
  int64_t chunk_count_ = 0;
  bool is_decoupled_ = false;
  std::vector<double> parameter_, next_parameter_, coefficients_, chunk_rows_;
  std::optional<Countdown> countdown_;
};

// Keys of one chunk's random bits apart from another's: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA
// 2014).
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

RoundingKey rounding_key(const std::optional<int64_t>& seed, const ChunkPlace& place) {
  if (!seed.has_value()) return {false, 0, 0};
  const uint64_t key = mixed(mixed(mixed(static_cast<uint64_t>(*seed)) + place.segment) + place.index);
  return {true, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// One pass: `scalars` of each tensor, `kernel` the rule's of a table entry.
template <class Scalars>
void step_all(const StepTensors& tensors, const std::vector<Scalars>& scalars, StepKernel<Scalars> StepKernels::* rule,
              double gradient_scale, Watch& watch, const std::optional<int64_t>& seed) {
  watch.gather_empty();
  const Segments& segments = tensors.segments();
  const std::vector<ChunkRange> ranges = cut_into_ranges(segments);
  run_in_order(ranges.size(), [&](int64_t range) {
    for (int64_t i = ranges[range].begin; i < ranges[range].end; ++i) {
      const ChunkPlace& place = segments.chunks()[i];
      const StepArrays arrays = tensors.at(place);
      const auto kernel = instruction_set().steps->kernels[watch.kernels_of(place.segment)].*rule;
      const bool has_row = kernel(arrays, scalars[place.segment], gradient_scale, watch.penalty_of(i, place.segment),
                                  rounding_key(seed, place), watch.row_of(i, place.segment));
      watch.gather(i, place.segment, arrays, has_row);
    }
  });
}

// The steps that were taken of each tensor, counted in the tensors that the checkpoint holds.
class StepCounts {
 public:
  explicit StepCounts(const Tensors& steps, size_t count) : steps_(steps) {
    STD_TORCH_CHECK(steps.size() == count, "steps: expected ", count, " tensors, got ", steps.size());
    for (size_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(steps[i].is_cpu() && steps[i].numel() == 1, "steps[", i, "]: expected one number on the CPU");
      STD_TORCH_CHECK(steps[i].scalar_type() == ScalarType::Double || steps[i].scalar_type() == ScalarType::Float,
                      "steps[", i, "]: expected dtype float32 or float64");
    }
  }
  // Counts one more of tensor i, and returns how many there are.
  double advance(size_t i) {
    void* data = steps_[i].mutable_data_ptr();
    if (steps_[i].scalar_type() == ScalarType::Double) return *static_cast<double*>(data) += 1;
    return *static_cast<float*>(data) += 1;
  }

 private:
  const Tensors& steps_;
};

double gradient_scale_of(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& clip_coefficient) {
  return read_scalar(clip_coefficient, "clip_coefficient", 1) / read_scalar(grad_scale, "grad_scale", 1);
}

void adamw_step_(Tensors weights, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                 Tensors steps, Tensor lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                 std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                 std::optional<Tensor> clip_coefficient, std::optional<int64_t> rounding_seed,
                 std::optional<std::string> penalty, std::optional<Tensor> parameter,
                 std::optional<Tensor> next_parameter, Tensor statistics, Tensor partials, Tensor coefficients,
                 bool is_decoupled) {
  const bool is_amsgrad = !max_exp_avg_sqs.empty();
  std::vector<const Tensors*> states{&exp_avgs, &exp_avg_sqs};
  if (is_amsgrad) states.push_back(&max_exp_avg_sqs);
  const StepTensors tensors(weights, gradients, states, {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"});
  StepCounts counts(steps, weights.size());
  const double learning_rate = read_scalar(lr, "lr", 0);
  const double sign = maximize ? -1 : 1;
  const double gradient_scale = sign * gradient_scale_of(grad_scale, clip_coefficient);
  Watch watch({penalty, parameter, next_parameter, statistics, partials, coefficients, is_decoupled}, tensors,
              is_decoupled ? learning_rate : sign);
  if (read_scalar(found_inf, "found_inf", 0) != 0) return;
  std::vector<AdamWScalars> scalars;
  scalars.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const double step = counts.advance(i);
    scalars.push_back({1 - learning_rate * weight_decay, beta1, beta2, eps, learning_rate / (1 - std::pow(beta1, step)),
                       1 / std::sqrt(1 - std::pow(beta2, step)), is_amsgrad});
  }
  step_all(tensors, scalars, &StepKernels::adamw, gradient_scale, watch, rounding_seed);
}

void sgd_step_(Tensors weights, Tensors gradients, Tensors momentum_buffers, std::vector<int64_t> started, Tensor lr,
               double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
               std::optional<Tensor> clip_coefficient, std::optional<int64_t> rounding_seed,
               std::optional<std::string> penalty, std::optional<Tensor> parameter,
               std::optional<Tensor> next_parameter, Tensor statistics, Tensor partials, Tensor coefficients,
               bool is_decoupled) {
  std::vector<const Tensors*> states;
  if (momentum != 0) states.push_back(&momentum_buffers);
  const StepTensors tensors(weights, gradients, states, {"momentum_buffers"});
  STD_TORCH_CHECK(momentum == 0 || started.size() == weights.size(), "started: expected ", weights.size(),
                  " entries, got ", started.size());
  const double learning_rate = read_scalar(lr, "lr", 0);
  const double sign = maximize ? -1 : 1;
  const double gradient_scale = sign * gradient_scale_of(grad_scale, clip_coefficient);
  Watch watch({penalty, parameter, next_parameter, statistics, partials, coefficients, is_decoupled}, tensors,
              is_decoupled ? learning_rate : sign);
  if (read_scalar(found_inf, "found_inf", 0) != 0) return;
  std::vector<SgdScalars> scalars;
  scalars.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool is_first = momentum != 0 && started[i] == 0;
    scalars.push_back({learning_rate, weight_decay, momentum, is_first ? 1 : 1 - dampening, nesterov});
  }
  step_all(tensors, scalars, &StepKernels::sgd, gradient_scale, watch, rounding_seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r2_kernels, CPU, library) {
  library.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  library.impl("sgd_step_", TORCH_BOX(&sgd_step_));
}

}  // namespace r2
