// How the operators read and check their arguments that are not weights.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "penalty_table.h"
#include "segments.h"

namespace r2 {

using torch::headeronly::ScalarType;

// In the order of Penalties.
inline int penalty_index(const std::string& name) {
  std::string known;
  for (int i = 0; i < kPenaltyCount; ++i) {
    if (name == kPenalties[i].name) return i;
    known += (i == 0 ? "'" : ", '") + std::string(kPenalties[i].name) + "'";
  }
  STD_TORCH_CHECK(false, "penalty: expected one of ", known, ", got '", name, "'");
}

// The entries of a tensor of shape (count,), float32 or float64.
inline std::vector<double> read_scalars(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == count, name,
                  ": expected a tensor of shape (", count, ",) on the CPU");
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  ": expected dtype float32 or float64");
  const int64_t stride = tensor.stride(0);
  const void* data = tensor.const_data_ptr();
  std::vector<double> scalars(count);
  for (int64_t i = 0; i < count; ++i) {
    scalars[i] = dtype == ScalarType::Double ? static_cast<const double*>(data)[i * stride]
                                             : static_cast<const float*>(data)[i * stride];
  }
  return scalars;
}

inline std::vector<double> read_parameter(const std::optional<Tensor>& parameter, const PenaltyEntry& penalty,
                                          int64_t count) {
  STD_TORCH_CHECK(parameter.has_value() == penalty.has_parameter, "parameter: expected ",
                  penalty.has_parameter ? "a tensor" : "None", " for penalty '", penalty.name, "'");
  return parameter.has_value() ? read_scalars(*parameter, count, "parameter") : std::vector<double>(count);
}

// One number per segment, or one per weight that all its segments share, or none, which counts as 0; read in place.
class PerSegment {
 public:
  PerSegment() = default;
  PerSegment(const Tensor& tensor, const Segments& segments, const char* name) : tensor_(tensor) {
    const int64_t shared = segments.weight_count(), own = segments.total();
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && (tensor.size(0) == shared || tensor.size(0) == own), name,
                    ": expected a tensor of shape (", shared, ",)",
                    shared == own ? "" : ", or (" + std::to_string(own) + ",), on the CPU");
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                    ": expected dtype float32 or float64");
    is_double_ = dtype == ScalarType::Double;
    is_shared_ = tensor.size(0) == shared;
    stride_ = tensor.stride(0);
    data_ = tensor.const_data_ptr();
  }

  // Of the segment of that number, which belongs to that weight.
  double at(int64_t number, int64_t weight) const {
    if (data_ == nullptr) return 0;
    const int64_t i = (is_shared_ ? weight : number) * stride_;
    return is_double_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }

 private:
  std::optional<Tensor> tensor_;
  bool is_double_ = false, is_shared_ = false;
  int64_t stride_ = 0;
  const void* data_ = nullptr;
};

inline PerSegment read_parameter(const std::optional<Tensor>& parameter, const PenaltyEntry& penalty,
                                 const Segments& segments) {
  STD_TORCH_CHECK(parameter.has_value() == penalty.has_parameter, "parameter: expected ",
                  penalty.has_parameter ? "a tensor" : "None", " for penalty '", penalty.name, "'");
  return parameter.has_value() ? PerSegment(*parameter, segments, "parameter") : PerSegment();
}

// The entries of a tensor of float64, contiguous or copied.
class Doubles {
 public:
  Doubles(const Tensor& tensor, const char* name) : tensor_(tensor) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double, name,
                    ": expected a float64 tensor on the CPU");
    if (!tensor_.is_contiguous()) tensor_ = torch::stable::contiguous(tensor_);
    data_ = static_cast<const double*>(tensor_.const_data_ptr());
  }
  const double* data() const { return data_; }

 private:
  Tensor tensor_;
  const double* data_;
};

}  // namespace r2
