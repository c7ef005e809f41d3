// The operators of r2_kernels/dkm_ops.py for the CPU dispatch key: a parallel region per pass over the weight.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "arguments.h"
#include "dkm_kernels.h"
#include "one_tensor.h"

namespace r2 {

namespace {

constexpr auto kCpu = torch::headeronly::DeviceType::CPU;

Tensor as_tensor(const std::vector<double>& numbers, int64_t rows, bool is_double) {
  const int64_t columns = static_cast<int64_t>(numbers.size()) / rows;
  Tensor tensor = torch::stable::empty({rows, columns}, is_double ? ScalarType::Double : ScalarType::Float,
                                       std::nullopt, torch::stable::Device(kCpu));
  if (is_double) {
    std::copy(numbers.begin(), numbers.end(), static_cast<double*>(tensor.mutable_data_ptr()));
  } else {
    std::copy(numbers.begin(), numbers.end(), static_cast<float*>(tensor.mutable_data_ptr()));
  }
  return tensor;
}

std::vector<double> read_rows(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  ": expected a tensor of shape (", rows, ", ", columns, ")");
  return read_scalars(torch::stable::flatten(tensor, 0, 1), rows * columns, name);
}

void check_temperature(double temperature) {
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), "temperature: expected a positive number, got ",
                  temperature);
}

void check_clusters(int64_t clusters) {
  STD_TORCH_CHECK(clusters >= 1 && clusters <= kMostClusters, "centroids: expected 1 to ", kMostClusters, ", got ",
                  clusters);
}

// What work(first entry, size, sums) leaves in `count` sums per chunk, added up in the order of the chunks.
template <class Work>
std::vector<double> sum_chunks(int64_t size, int64_t count, const Work& work) {
  std::vector<double> rows(chunk_count(size) * count), total(count);
  run_chunks(size, [&](int64_t chunk, int64_t begin, int64_t entries) { work(begin, entries, &rows[chunk * count]); });
  for (size_t i = 0; i < rows.size(); ++i) total[i % count] += rows[i];
  return total;
}

std::tuple<Tensor, Tensor, Tensor> dkm_forward(Tensor given, Tensor centroids, double temperature, int64_t iterations) {
  const Storage storage = storage_of(given, "weight", 0);
  STD_TORCH_CHECK(centroids.dim() == 1, "centroids: expected a tensor of shape (K,)");
  const int64_t clusters = centroids.size(0), bytes = bytes_of(storage);
  check_clusters(clusters);
  check_temperature(temperature);
  STD_TORCH_CHECK(iterations >= 1, "iterations: expected 1 or more, got ", iterations);
  const Tensor weight = dense(given);
  const int64_t size = weight.numel();
  Tensor outputs = new_like(weight, bytes);
  const DkmKernels& kernels = instruction_set().dkm[storage];
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(outputs.mutable_data_ptr());

  const bool is_double = storage == kFloat64;
  const std::vector<double> starts = read_scalars(centroids, clusters, "centroids");
  std::vector<double> history((iterations + 1) * clusters), totals(iterations * clusters);
  const auto set_centroid = [&](int64_t step, int64_t j, double value) {
    history[step * clusters + j] = is_double ? value : static_cast<float>(value);
  };
  for (int64_t j = 0; j < clusters; ++j) set_centroid(0, j, starts[j]);
  DkmIteration iteration{clusters, temperature, history.data(), nullptr, nullptr, true, true};
  int64_t step = 0;
  for (double before = 0; size > 0 && step < iterations; ++step) {
    iteration.centroids = &history[step * clusters];
    const std::vector<double> sums =
        sum_chunks(size, dkm_sums(clusters), [&](int64_t begin, int64_t entries, double* row) {
          kernels.sum(from + begin * bytes, entries, iteration, row);
        });
    for (int64_t j = 0; j < clusters; ++j) {
      totals[step * clusters + j] = sums[j];
      set_centroid(step + 1, j, iteration.centroids[j] + sums[clusters + j] / sums[j]);
    }
    const double inertia = sums[2 * clusters];
    // A sum of zero, as in coremltools, settles nothing.
    const bool is_settled = before != 0 && std::abs(before - inertia) <= kSettled;
    before = inertia;
    if (is_settled) {
      ++step;
      break;
    }
  }
  for (int64_t rest = (step + 1) * clusters; rest < (iterations + 1) * clusters; ++rest) {
    history[rest] = history[rest - clusters];
  }
  iteration.updated = &history[iterations * clusters];
  run_chunks(size, [&](int64_t, int64_t begin, int64_t entries) {
    kernels.output(from + begin * bytes, to + begin * bytes, entries, iteration);
  });
  return {outputs, as_tensor(history, iterations + 1, is_double), as_tensor(totals, iterations, true)};
}

Tensor dkm_backward(Tensor given, Tensor history_tensor, Tensor totals_tensor, Tensor output_gradient,
                    double temperature) {
  const Storage storage = storage_of(given, "weight", 0);
  STD_TORCH_CHECK(storage_of(output_gradient, "gradient", 0) == storage, "gradient: expected the dtype of the weight");
  STD_TORCH_CHECK(have_same_shape(output_gradient, given), "gradient: expected the shape of the weight");
  STD_TORCH_CHECK(totals_tensor.dim() == 2, "totals: expected a tensor of shape (iterations, K)");
  const int64_t iterations = totals_tensor.size(0), clusters = totals_tensor.size(1), bytes = bytes_of(storage);
  check_clusters(clusters);
  check_temperature(temperature);
  const std::vector<double> totals = read_rows(totals_tensor, iterations, clusters, "totals");
  const std::vector<double> history = read_rows(history_tensor, iterations + 1, clusters, "history");
  const Tensor weight = dense(given), gradient = in_order_of(output_gradient, weight);
  const int64_t size = weight.numel();
  Tensor result = new_like(weight, bytes);
  // Between iterations the gradient is of float or double: itself, or apart where the storage is narrower.
  const bool is_narrow = storage == kBFloat16 || storage == kFloat16;
  const int64_t carried_bytes = is_narrow ? int64_t{sizeof(float)} : bytes;
  Tensor carried = result;
  if (is_narrow) {
    carried = torch::stable::empty({size}, ScalarType::Float, std::nullopt, torch::stable::Device(kCpu));
    ask_for_huge_pages(carried.mutable_data_ptr(), size * carried_bytes);
  }
  const DkmKernels& kernels = instruction_set().dkm[storage];
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  const char* of_outputs = static_cast<const char*>(gradient.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  char* between = static_cast<char*>(carried.mutable_data_ptr());

  int64_t last = iterations - 1;
  while (last > 0 && totals[last * clusters] == 0) --last;
  std::vector<double> shares(clusters), of_centroids;
  for (int64_t step = last; step >= 0; --step) {
    DkmIteration iteration{clusters,  temperature, &history[step * clusters], &history[(step + 1) * clusters], nullptr,
                           step == 0, step == last};
    if (step == last) {
      of_centroids = sum_chunks(size, clusters, [&](int64_t begin, int64_t entries, double* row) {
        kernels.sum_of_outputs(from + begin * bytes, of_outputs + begin * bytes, entries, iteration, row);
      });
    }
    for (int64_t j = 0; j < clusters; ++j) shares[j] = of_centroids[j] / totals[step * clusters + j];
    iteration.shares = shares.data();
    of_centroids = sum_chunks(size, clusters, [&](int64_t begin, int64_t entries, double* row) {
      kernels.backward(from + begin * bytes, of_outputs + begin * bytes, between + begin * carried_bytes,
                       to + begin * bytes, entries, iteration, row);
    });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r2_kernels, CPU, library) {
  library.impl("dkm_forward", TORCH_BOX(&dkm_forward));
  library.impl("dkm_backward", TORCH_BOX(&dkm_backward));
}

}  // namespace r2
