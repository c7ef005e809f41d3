// The operators of r2_kernels/ewgs_ops.py for the CPU dispatch key.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "ewgs_kernels.h"
#include "one_tensor.h"

namespace r2 {

namespace {

EwgsEnds read_ends(const Tensor& ends) {
  const std::vector<double> numbers = read_scalars(ends, 4, "ends");
  return {numbers[0], numbers[1], numbers[2], numbers[3]};
}

void check_levels(int64_t levels) {
  STD_TORCH_CHECK(levels >= 2 && levels <= 65536, "levels: expected 2 to 65536, got ", levels);
}

Tensor ewgs_forward(Tensor given, Tensor ends_tensor, int64_t levels) {
  const Storage storage = storage_of(given, "values", 0);
  const EwgsEnds ends = read_ends(ends_tensor);
  check_levels(levels);
  const Tensor values = dense(given);
  Tensor outputs = new_like(values, bytes_of(storage));
  const EwgsKernels& kernels = instruction_set().ewgs[storage];
  const char* from = static_cast<const char*>(values.const_data_ptr());
  char* to = static_cast<char*>(outputs.mutable_data_ptr());
  const int64_t bytes = bytes_of(storage);
  run_chunks(values.numel(), [&](int64_t, int64_t begin, int64_t size) {
    kernels.forward(from + begin * bytes, to + begin * bytes, size, ends, levels);
  });
  return outputs;
}

std::tuple<Tensor, Tensor> ewgs_backward(Tensor given, Tensor ends_tensor, Tensor output_gradient, int64_t levels,
                                         double delta) {
  const Storage storage = storage_of(given, "values", 0);
  const EwgsEnds ends = read_ends(ends_tensor);
  check_levels(levels);
  STD_TORCH_CHECK(storage_of(output_gradient, "gradient", 0) == storage, "gradient: expected the dtype of the values");
  STD_TORCH_CHECK(have_same_shape(output_gradient, given), "gradient: expected the shape of the values");
  const Tensor values = dense(given), gradient = in_order_of(output_gradient, values);
  Tensor result = new_like(values, bytes_of(storage));
  Tensor ends_gradient = torch::stable::empty({4}, ScalarType::Double, std::nullopt,
                                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const EwgsKernels& kernels = instruction_set().ewgs[storage];
  const char* from = static_cast<const char*>(values.const_data_ptr());
  const char* of_outputs = static_cast<const char*>(gradient.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const int64_t bytes = bytes_of(storage);
  std::vector<double> sums(chunk_count(values.numel()) * 4);
  run_chunks(values.numel(), [&](int64_t chunk, int64_t begin, int64_t size) {
    kernels.backward(from + begin * bytes, of_outputs + begin * bytes, to + begin * bytes, size, ends, levels, delta,
                     &sums[4 * chunk]);
  });
  // In the order of the chunks, whoever computed them.
  double* total = static_cast<double*>(ends_gradient.mutable_data_ptr());
  std::fill(total, total + 4, 0.0);
  for (size_t i = 0; i < sums.size(); ++i) total[i % 4] += sums[i];
  const double width = ends.upper - ends.lower;
  total[0] /= width;
  total[1] /= width;
  return {result, ends_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r2_kernels, CPU, library) {
  library.impl("ewgs_forward", TORCH_BOX(&ewgs_forward));
  library.impl("ewgs_backward", TORCH_BOX(&ewgs_backward));
}

}  // namespace r2
