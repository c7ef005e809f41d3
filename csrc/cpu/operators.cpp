// The operators of r2_kernels/ops.py for the CPU dispatch key: what they check, and which pass they make over the
// chunks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "penalty_table.h"
#include "schedule.h"
#include "segments.h"

namespace r2 {

namespace {

using torch::headeronly::DeviceType;

Tensor new_tensor(std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, torch::stable::Device(DeviceType::CPU));
}

// Values or parameter gradients, stored as the dtype asks.
class ValueTensor {
 public:
  ValueTensor(int64_t count, ScalarType dtype) : tensor(new_tensor({count}, dtype)), dtype_(dtype) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "dtype: expected float32 or float64");
    data_ = tensor.mutable_data_ptr();
  }
  void set(int64_t i, double value) {
    if (dtype_ == ScalarType::Double) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }

  Tensor tensor;

 private:
  ScalarType dtype_;
  void* data_;
};

struct Values {
  ValueTensor values, parameter_gradients;
  const PenaltyEntry& penalty;

  Values(const PenaltyEntry& penalty, int64_t count, ScalarType dtype)
      : values(count, dtype), parameter_gradients(penalty.has_parameter ? count : 0, dtype), penalty(penalty) {}
  void set(int64_t segment, const double* row, double parameter) {
    const Value value = penalty.finalize(row, parameter);
    values.set(segment, value.value);
    if (penalty.has_parameter) parameter_gradients.set(segment, value.parameter_gradient);
  }
};

// What one chunk is, of the flat list of all.
struct Work {
  const Segment& segment;
  int64_t offset, size;

  Work(const Segments& segments, const ChunkPlace& place)
      : segment(segments.all()[place.segment]), offset(place.index * kChunkSize), size(segments.entries(place)) {}
  const void* weight() const { return segment.weight + offset * segment.entry_bytes(); }
  void* gradient() const { return segment.gradient + offset * segment.entry_bytes(); }
};

// The passes of one penalty over a list of segments; rows of chunks in `chunk_rows`, of segments in `rows`.
class Passes {
 public:
  Passes(PenaltyIndex index, const Segments& segments, std::vector<double> parameter, double* rows)
      : penalty_(kPenalties[index]),
        kernels_(instruction_set().kernels[index]),
        segments_(segments),
        parameter_(std::move(parameter)),
        rows_(rows),
        ranges_(cut_into_ranges(segments)) {}

  void reduce(Values& values) {
    start_reduction(values);
    run_in_order(ranges_.size(), [&](int64_t i) { reduce_range(ranges_[i], values, nullptr); });
  }

  // `maxima`: for a sparse penalty, the chunks' own maxima, of segments that are in their own order.
  template <bool kAccumulate>
  void apply(const std::vector<double>& coefficients, const double* maxima) {
    run_in_order(ranges_.size(), [&](int64_t i) { apply_range<kAccumulate>(ranges_[i], coefficients, maxima, 1); });
  }

  void reduce_and_add(Values& values, const std::vector<double>& coefficients) {
    start_reduction(values);
    if (penalty_.is_one_pass) {
      run_in_order(ranges_.size(), [&](int64_t i) { reduce_range(ranges_[i], values, &coefficients); });
      return;
    }
    const std::vector<Step> steps = reduce_then_apply(segments_, ranges_);
    const double* maxima = penalty_.is_sparse ? chunk_rows_.data() : nullptr;
    run_in_order(steps.size(), [&](int64_t i) {
      if (steps[i].is_apply) {
        apply_range<true>(ranges_[steps[i].range], coefficients, maxima, penalty_.row_size);
      } else {
        reduce_range(ranges_[steps[i].range], values, nullptr);
      }
    });
  }

  Tensor chunk_maxima() const {
    const int64_t count = penalty_.is_sparse ? static_cast<int64_t>(segments_.chunks().size()) : 0;
    Tensor maxima = new_tensor({count}, ScalarType::Double);
    double* data = static_cast<double*>(maxima.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) data[i] = chunk_rows_[i * penalty_.row_size];
    return maxima;
  }

 private:
  void start_reduction(Values& values) {
    chunk_rows_.resize(segments_.chunks().size() * penalty_.row_size);
    countdown_.emplace(segments_);
    for (int64_t i = 0; i < segments_.count(); ++i) {
      if (segments_.all()[i].size == 0) finish_segment(i, values);
    }
  }

  // With coefficients, adds the gradients in the same pass.
  void reduce_range(const ChunkRange& range, Values& values, const std::vector<double>* coefficients) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t index = segments_.chunks()[i].segment;
      const Work work(segments_, segments_.chunks()[i]);
      const ChunkKernels& kernels = kernels_[work.segment.storage];
      double* row = &chunk_rows_[i * penalty_.row_size];
      if (coefficients == nullptr) {
        kernels.reduce(work.weight(), work.size, parameter_[index], row);
      } else {
        kernels.reduce_and_add(work.weight(), work.gradient(), work.size, parameter_[index], (*coefficients)[index],
                               row);
      }
      if (countdown_->is_last(index)) finish_segment(index, values);
    }
  }

  void finish_segment(int64_t index, Values& values) {
    const Segment& segment = segments_.all()[index];
    double* row = rows_ + index * penalty_.row_size;
    penalty_.set_empty(row);
    for (int64_t chunk = 0; chunk < segment.chunks(); ++chunk) {
      penalty_.merge(row, &chunk_rows_[(segment.first_chunk + chunk) * penalty_.row_size], parameter_[index]);
    }
    values.set(index, row, parameter_[index]);
    countdown_->mark_ready(index);
  }

  template <bool kAccumulate>
  void apply_range(const ChunkRange& range, const std::vector<double>& coefficients, const double* maxima,
                   int64_t maxima_stride) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t index = segments_.chunks()[i].segment;
      if (countdown_.has_value()) countdown_->wait_until_ready(index);
      const Work work(segments_, segments_.chunks()[i]);
      const double* row = rows_ + index * penalty_.row_size;
      // The first statistic of a sparse penalty is the maximum.
      if (maxima != nullptr && maxima[i * maxima_stride] < row[0]) {
        if (!kAccumulate) std::memset(work.gradient(), 0, work.size * work.segment.entry_bytes());
        continue;
      }
      const ChunkKernels& kernels = kernels_[work.segment.storage];
      (kAccumulate ? kernels.add : kernels.write)(work.weight(), work.gradient(), work.size, row, parameter_[index],
                                                  coefficients[index]);
    }
  }

  const PenaltyEntry& penalty_;
  const ChunkKernels* kernels_;
  const Segments& segments_;
  const std::vector<double> parameter_;
  double* rows_;
  const std::vector<ChunkRange> ranges_;
  std::vector<double> chunk_rows_;
  std::optional<Countdown> countdown_;
};

ScalarType value_dtype(const Segments& segments) {
  return segments.has_float64() ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(std::string name, std::vector<Tensor> weights,
                                                  std::optional<Tensor> parameter) {
  const PenaltyIndex index = penalty_index(name);
  const Segments segments(weights);
  const PenaltyEntry& penalty = kPenalties[index];
  Tensor statistics = new_tensor({segments.count(), penalty.row_size}, ScalarType::Double);
  Values values(penalty, segments.count(), value_dtype(segments));
  Passes passes(index, segments, read_parameter(parameter, penalty, segments.count()),
                static_cast<double*>(statistics.mutable_data_ptr()));
  passes.reduce(values);
  return {values.values.tensor, values.parameter_gradients.tensor, statistics, passes.chunk_maxima()};
}

// Statistics (count, S) as a contiguous block of rows.
Doubles read_statistics(const Tensor& statistics, const PenaltyEntry& penalty, int64_t count) {
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == count && statistics.size(1) == penalty.row_size,
                  "statistics: expected shape (", count, ", ", penalty.row_size, ")");
  return Doubles(statistics, "statistics");
}

std::tuple<Tensor, Tensor> finalize(std::string name, Tensor statistics, std::optional<Tensor> parameter,
                                    ScalarType dtype) {
  const PenaltyEntry& penalty = kPenalties[penalty_index(name)];
  STD_TORCH_CHECK(statistics.dim() == 2, "statistics: expected shape (N, ", penalty.row_size, ")");
  const int64_t count = statistics.size(0);
  const Doubles rows = read_statistics(statistics, penalty, count);
  const std::vector<double> scalars = read_parameter(parameter, penalty, count);
  Values values(penalty, count, dtype);
  for (int64_t i = 0; i < count; ++i) values.set(i, rows.data() + i * penalty.row_size, scalars[i]);
  return {values.values.tensor, values.parameter_gradients.tensor};
}

// apply and apply_ differ in whether the gradients are there already.
template <bool kAccumulate>
void apply_to(const std::string& name, const Segments& segments, const std::optional<Tensor>& parameter,
              const Tensor& statistics, const Tensor& partials, const Tensor& coefficients) {
  const PenaltyIndex index = penalty_index(name);
  const PenaltyEntry& penalty = kPenalties[index];
  const Doubles rows = read_statistics(statistics, penalty, segments.count());
  const Doubles maxima(partials, "partials");
  const int64_t expected = penalty.is_sparse ? static_cast<int64_t>(segments.chunks().size()) : 0;
  STD_TORCH_CHECK(partials.dim() == 1 && partials.size(0) == expected, "partials: expected shape (", expected, ",)");
  Passes passes(index, segments, read_parameter(parameter, penalty, segments.count()),
                const_cast<double*>(rows.data()));
  passes.apply<kAccumulate>(read_scalars(coefficients, segments.count(), "coefficients"),
                            penalty.is_sparse && !segments.is_reordered() ? maxima.data() : nullptr);
}

std::vector<Tensor> apply(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter,
                          Tensor statistics, Tensor partials, Tensor coefficients) {
  Segments segments(weights);
  std::vector<Tensor> gradients = segments.new_gradients();
  apply_to<false>(name, segments, parameter, statistics, partials, coefficients);
  return gradients;
}

void apply_(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter, Tensor statistics,
            Tensor partials, Tensor coefficients, std::vector<Tensor> gradients) {
  Segments segments(weights);
  segments.accumulate_into(gradients);
  apply_to<true>(name, segments, parameter, statistics, partials, coefficients);
  segments.finish_gradients();
}

std::tuple<Tensor, Tensor> reduce_apply_(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter,
                                         Tensor coefficients, std::vector<Tensor> gradients) {
  const PenaltyIndex index = penalty_index(name);
  const PenaltyEntry& penalty = kPenalties[index];
  Segments segments(weights);
  std::vector<double> scalars = read_parameter(parameter, penalty, segments.count());
  const std::vector<double> factors = read_scalars(coefficients, segments.count(), "coefficients");
  segments.accumulate_into(gradients);
  Values values(penalty, segments.count(), value_dtype(segments));
  std::vector<double> rows(segments.count() * penalty.row_size);
  Passes(index, segments, std::move(scalars), rows.data()).reduce_and_add(values, factors);
  segments.finish_gradients();
  return {values.values.tensor, values.parameter_gradients.tensor};
}

std::string cpu_instruction_set() { return instruction_set().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r2_kernels, CPU, library) {
  library.impl("reduce", TORCH_BOX(&reduce));
  library.impl("finalize", TORCH_BOX(&finalize));
  library.impl("apply", TORCH_BOX(&apply));
  library.impl("apply_", TORCH_BOX(&apply_));
  library.impl("reduce_apply_", TORCH_BOX(&reduce_apply_));
}

STABLE_TORCH_LIBRARY_FRAGMENT(r2_kernels, library) { library.def("cpu_instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(r2_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

}  // namespace r2
