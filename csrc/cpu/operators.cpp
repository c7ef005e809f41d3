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
  void set(int64_t first, const Span& span, const SpanValues& of_span) {
    for (int64_t i = 0; i < span.count; ++i) {
      values.set(first + i, of_span.values[i]);
      if (penalty.has_parameter) parameter_gradients.set(first + i, of_span.parameter_gradients[i]);
    }
  }
};

// What one chunk is, of the flat list of all.
struct Work {
  const Segment& segment;
  const Stored& stored;
  int64_t offset, size;

  Work(const Segments& segments, const ChunkPlace& place)
      : segment(segments.all()[place.segment]),
        stored(segments.stored(segment.weight)),
        offset(segment.offset + place.index * kChunkSize),
        size(segments.entries(place)) {}
  const void* weight() const { return stored.weight + offset * segment.entry_bytes(); }
  void* gradient() const { return stored.gradient + offset * segment.entry_bytes(); }
};

// The passes of one penalty over a list of segments; rows of chunks in `chunk_rows`, of segments in `rows`.
class Passes {
 public:
  Passes(int index, const Segments& segments, PerSegment parameter, double* rows)
      : penalty_(kPenalties[index]),
        kernels_(instruction_set().kernels[index]),
        span_kernels_(instruction_set().span_kernels[index]),
        segments_(segments),
        parameter_(std::move(parameter)),
        rows_(rows),
        ranges_(cut_into_ranges(segments)) {}

  void reduce(Values& values) {
    start_reduction(values);
    run_all(
        ranges_.size(), [&](int64_t i) { reduce_range(ranges_[i], values, nullptr); },
        [&](const SpanKernels& kernels, const Span& span, int64_t number) {
          SpanValues of_span;
          kernels.reduce(span, rows_ + number * penalty_.row_size, of_span);
          values.set(number, span, of_span);
        });
  }

  // `maxima`: for a sparse penalty, the chunks' own maxima, of segments that are in their own order.
  template <bool kAccumulate>
  void apply(const PerSegment& coefficients, const double* maxima) {
    coefficients_ = &coefficients;
    run_all(
        ranges_.size(), [&](int64_t i) { apply_range<kAccumulate>(ranges_[i], coefficients, maxima, 1); },
        [&](const SpanKernels& kernels, const Span& span, int64_t number) {
          (kAccumulate ? kernels.add : kernels.write)(span, rows_ + number * penalty_.row_size);
        });
  }

  void reduce_and_add(Values& values, const PerSegment& coefficients) {
    coefficients_ = &coefficients;
    // Nobody asks for the rows of the short segments: those of the long ones are kept here.
    long_rows_.resize(segments_.count() * penalty_.row_size);
    start_reduction(values);
    const auto reduce_and_add_span = [&](const SpanKernels& kernels, const Span& span, int64_t number) {
      SpanValues of_span;
      kernels.reduce_and_add(span, of_span);
      values.set(number, span, of_span);
    };
    if (penalty_.is_one_pass) {
      run_all(ranges_.size(), [&](int64_t i) { reduce_range(ranges_[i], values, &coefficients); }, reduce_and_add_span);
      return;
    }
    const std::vector<Step> steps = reduce_then_apply(segments_, ranges_);
    const double* maxima = penalty_.is_sparse ? chunk_rows_.data() : nullptr;
    const auto take_step = [&](int64_t i) {
      if (steps[i].is_apply) {
        apply_range<true>(ranges_[steps[i].range], coefficients, maxima, penalty_.row_size);
      } else {
        reduce_range(ranges_[steps[i].range], values, nullptr);
      }
    };
    run_all(steps.size(), take_step, reduce_and_add_span);
  }

  Tensor chunk_maxima() const {
    const int64_t count = segments_.partial_count(penalty_.is_sparse);
    Tensor maxima = new_tensor({count}, ScalarType::Double);
    double* data = static_cast<double*>(maxima.mutable_data_ptr());
    for (int64_t i = 0; i < count; ++i) data[i] = chunk_rows_[i * penalty_.row_size];
    return maxima;
  }

 private:
  // Calls take(i) for i below `count`, and work(kernels, span, number of its first segment) for the short segments.
  template <class Take, class Work>
  void run_all(int64_t count, const Take& take, const Work& work) const {
    const int64_t runs = static_cast<int64_t>(segments_.runs().size());
    run_in_order(count + runs, [&](int64_t i) { i < count ? take(i) : run_spans(segments_.runs()[i - count], work); });
  }

  template <class Work>
  void run_spans(const Run& run, const Work& work) const {
    const Cut& cut = segments_.cut(run);
    const Stored& stored = segments_.stored(run.weight);
    const int64_t whole = cut.channel_size / cut.size, per_channel = cut.per_channel();
    for (int64_t i = run.begin; i < run.end;) {
      const int64_t channel = i / per_channel, within = i % per_channel;
      const bool is_whole = within < whole;
      const int64_t offset = channel * cut.channel_size + within * cut.size;
      Span span;
      span.count = is_whole ? std::min({kSpan, whole - within, run.end - i}) : 1;
      span.size = is_whole ? cut.size : cut.channel_size - within * cut.size;
      span.weight = stored.weight + offset * bytes_of(stored.storage);
      span.gradient = stored.gradient == nullptr ? nullptr : stored.gradient + offset * bytes_of(stored.storage);
      for (int64_t k = 0; k < span.count; ++k) {
        const int64_t number = run.first_number + i + k;
        span.parameters[k] = parameter_.at(number, run.weight);
        span.coefficients[k] = coefficients_ == nullptr ? 0 : coefficients_->at(number, run.weight);
      }
      work(span_kernels_[stored.storage], span, run.first_number + i);
      i += span.count;
    }
  }

  // Of a segment that is cut into chunks.
  double* row_of(int64_t index) {
    return long_rows_.empty() ? rows_ + segments_.all()[index].number * penalty_.row_size
                              : &long_rows_[index * penalty_.row_size];
  }
  double parameter_of(const Segment& segment) const { return parameter_.at(segment.number, segment.weight); }

  void start_reduction(Values& values) {
    chunk_rows_.resize(segments_.chunks().size() * penalty_.row_size);
    countdown_.emplace(segments_);
    for (int64_t i = 0; i < segments_.count(); ++i) {
      if (segments_.all()[i].size == 0) finish_segment(i, values);
    }
  }

  // With coefficients, adds the gradients in the same pass.
  void reduce_range(const ChunkRange& range, Values& values, const PerSegment* coefficients) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t index = segments_.chunks()[i].segment;
      const Work work(segments_, segments_.chunks()[i]);
      const ChunkKernels& kernels = kernels_[work.segment.storage];
      double* row = &chunk_rows_[i * penalty_.row_size];
      if (coefficients == nullptr) {
        kernels.reduce(work.weight(), work.size, parameter_of(work.segment), row);
      } else {
        kernels.reduce_and_add(work.weight(), work.gradient(), work.size, parameter_of(work.segment),
                               coefficients->at(work.segment.number, work.segment.weight), row);
      }
      if (countdown_->is_last(index)) finish_segment(index, values);
    }
  }

  void finish_segment(int64_t index, Values& values) {
    const Segment& segment = segments_.all()[index];
    double* row = row_of(index);
    const double parameter = parameter_of(segment);
    penalty_.set_empty(row);
    for (int64_t chunk = 0; chunk < segment.chunks(); ++chunk) {
      penalty_.merge(row, &chunk_rows_[(segment.first_chunk + chunk) * penalty_.row_size], parameter);
    }
    values.set(segment.number, row, parameter);
    countdown_->mark_ready(index);
  }

  template <bool kAccumulate>
  void apply_range(const ChunkRange& range, const PerSegment& coefficients, const double* maxima,
                   int64_t maxima_stride) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t index = segments_.chunks()[i].segment;
      if (countdown_.has_value()) countdown_->wait_until_ready(index);
      const Work work(segments_, segments_.chunks()[i]);
      const double* row = row_of(index);
      // The first statistic of a sparse penalty is the maximum.
      if (maxima != nullptr && maxima[i * maxima_stride] < row[0]) {
        if (!kAccumulate) std::memset(work.gradient(), 0, work.size * work.segment.entry_bytes());
        continue;
      }
      const ChunkKernels& kernels = kernels_[work.segment.storage];
      (kAccumulate ? kernels.add : kernels.write)(work.weight(), work.gradient(), work.size, row,
                                                  parameter_of(work.segment),
                                                  coefficients.at(work.segment.number, work.segment.weight));
    }
  }

  const PenaltyEntry& penalty_;
  const ChunkKernels* kernels_;
  const SpanKernels* span_kernels_;
  const Segments& segments_;
  const PerSegment parameter_;
  const PerSegment* coefficients_ = nullptr;
  double* rows_;
  const std::vector<ChunkRange> ranges_;
  std::vector<double> chunk_rows_, long_rows_;
  std::optional<Countdown> countdown_;
};

ScalarType value_dtype(const Segments& segments) {
  return segments.has_float64() ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(std::string name, std::vector<Tensor> weights,
                                                  std::optional<Tensor> parameter, int64_t group_size) {
  const int index = penalty_index(name);
  const Segments segments(weights, group_size);
  const PenaltyEntry& penalty = kPenalties[index];
  Tensor statistics = new_tensor({segments.total(), penalty.row_size}, ScalarType::Double);
  Values values(penalty, segments.total(), value_dtype(segments));
  Passes passes(index, segments, read_parameter(parameter, penalty, segments),
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
  const int index = penalty_index(name);
  const PenaltyEntry& penalty = kPenalties[index];
  const Doubles rows = read_statistics(statistics, penalty, segments.total());
  const Doubles maxima(partials, "partials");
  const int64_t expected = segments.partial_count(penalty.is_sparse);
  STD_TORCH_CHECK(partials.dim() == 1 && partials.size(0) == expected, "partials: expected shape (", expected, ",)");
  Passes passes(index, segments, read_parameter(parameter, penalty, segments), const_cast<double*>(rows.data()));
  passes.apply<kAccumulate>(PerSegment(coefficients, segments, "coefficients"),
                            expected > 0 && !segments.is_reordered() ? maxima.data() : nullptr);
}

std::vector<Tensor> apply(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter,
                          Tensor statistics, Tensor partials, Tensor coefficients, int64_t group_size) {
  Segments segments(weights, group_size);
  std::vector<Tensor> gradients = segments.new_gradients();
  apply_to<false>(name, segments, parameter, statistics, partials, coefficients);
  return gradients;
}

void apply_(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter, Tensor statistics,
            Tensor partials, Tensor coefficients, std::vector<Tensor> gradients, int64_t group_size) {
  Segments segments(weights, group_size);
  segments.accumulate_into(gradients);
  apply_to<true>(name, segments, parameter, statistics, partials, coefficients);
  segments.finish_gradients();
}

std::tuple<Tensor, Tensor> reduce_apply_(std::string name, std::vector<Tensor> weights, std::optional<Tensor> parameter,
                                         Tensor coefficients, std::vector<Tensor> gradients, int64_t group_size) {
  const int index = penalty_index(name);
  const PenaltyEntry& penalty = kPenalties[index];
  Segments segments(weights, group_size);
  PerSegment scalars = read_parameter(parameter, penalty, segments);
  const PerSegment factors(coefficients, segments, "coefficients");
  segments.accumulate_into(gradients);
  Values values(penalty, segments.total(), value_dtype(segments));
  Passes(index, segments, std::move(scalars), nullptr).reduce_and_add(values, factors);
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
