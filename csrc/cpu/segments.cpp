#include "segments.h"

#include <algorithm>
#include <string>

#include "huge_pages.h"

namespace r2 {

namespace {

using torch::headeronly::ScalarType;

// (stride, size) of the dimensions that are not 1, the smallest stride first.
std::vector<std::pair<int64_t, int64_t>> dimensions_by_stride(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  return dimensions;
}

// Whether some entries share memory; where it says no, none do.
bool overlaps_itself(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t reach = 1;
  for (const auto& [stride, size] : dimensions_by_stride(tensor)) {
    if (stride < reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

}  // namespace

Storage storage_of(const Tensor& tensor, const char* name, size_t index) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, "[", index, "]: expected a tensor on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, name, "[", index, "]: expected dtype float32, bfloat16, float16 or float64");
  }
}

bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions_by_stride(tensor)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool have_same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

bool have_same_order(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

Segments::Segments(const std::vector<Tensor>& weights, int64_t group_size)
    : group_size_(group_size), weights_(weights) {
  STD_TORCH_CHECK(!weights.empty(), "weights: expected at least one tensor");
  STD_TORCH_CHECK(group_size >= kPerChannel, "group_size: expected 0, -1 or the size of a group, got ", group_size);
  stored_.reserve(weights.size());
  segments_.reserve(weights.size());
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Storage storage = storage_of(weights_[i], "weights", i);
    if (!are_consecutive(weights_[i])) weights_[i] = torch::stable::contiguous(weights_[i]);
    has_float64_ |= storage == kFloat64;
    stored_.push_back({static_cast<const char*>(weights_[i].const_data_ptr()), nullptr, storage});
    add_weight(static_cast<int32_t>(i));
  }
  int64_t chunk_count = 0;
  for (Segment& segment : segments_) {
    segment.first_chunk = chunk_count;
    chunk_count += segment.chunks();
  }
  chunks_.reserve(chunk_count);
  for (size_t i = 0; i < segments_.size(); ++i) {
    for (int64_t chunk = 0; chunk < segments_[i].chunks(); ++chunk) {
      chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(chunk)});
    }
  }
}

void Segments::add_weight(int32_t weight) {
  const Tensor& tensor = weights_[weight];
  const Storage storage = stored_[weight].storage;
  const int64_t numel = tensor.numel();
  if (group_size_ == kPerTensor || numel == 0) {
    cuts_.push_back({numel, numel});
    segments_.push_back({weight, total_++, 0, numel, 0, storage});
    return;
  }
  int64_t channel_size = numel / (tensor.dim() >= 2 ? tensor.size(0) : 1);
  const int64_t size = group_size_ == kPerChannel ? channel_size : std::min(group_size_, channel_size);
  if (channel_size % size == 0) channel_size = numel;  // all segments are equal
  const Cut cut{channel_size, size};
  cuts_.push_back(cut);
  const int64_t count = numel / channel_size * cut.per_channel();
  if (size > kChunkSize) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i % cut.per_channel() * size;
      segments_.push_back({weight, total_ + i, i / cut.per_channel() * channel_size + begin,
                           std::min(size, channel_size - begin), 0, storage});
    }
  } else {
    const int64_t fitting = kChunkSize / size;
    const int64_t step = fitting < kSpan ? fitting : fitting / kSpan * kSpan;
    for (int64_t begin = 0; begin < count; begin += step) {
      runs_.push_back({weight, total_, begin, std::min(begin + step, count)});
    }
  }
  total_ += count;
}

bool Segments::are_consecutive(const Tensor& tensor) const {
  if (group_size_ == kPerTensor) return is_dense(tensor);
  if (tensor.is_contiguous() || tensor.numel() == 0 || tensor.dim() < 2) return tensor.is_contiguous();
  return group_size_ == kPerChannel && is_dense(tensor) &&
         (tensor.size(0) == 1 || tensor.stride(0) == tensor.numel() / tensor.size(0));
}

void Segments::accumulate_into(const std::vector<Tensor>& gradients) {
  STD_TORCH_CHECK(gradients.size() == weights_.size(), "gradients: expected ", weights_.size(), " tensors, got ",
                  gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Storage storage = storage_of(gradients[i], "gradients", i);
    STD_TORCH_CHECK(storage == stored_[i].storage, "gradients[", i, "]: expected the dtype of its weight");
    STD_TORCH_CHECK(have_same_shape(gradients[i], weights_[i]), "gradients[", i, "]: expected the shape of its weight");
    STD_TORCH_CHECK(!overlaps_itself(gradients[i]), "gradients[", i, "]: expected one memory location per entry");
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    Tensor gradient = gradients[i];
    if (!are_consecutive(gradient)) {
      gradient = torch::stable::contiguous(gradient);
      apart_.emplace_back(gradients[i], gradient);
    }
    if (!have_same_order(weights_[i], gradient)) {
      Tensor reordered = torch::stable::empty_like(gradient);
      torch::stable::copy_(reordered, weights_[i]);
      weights_[i] = reordered;
      stored_[i].weight = static_cast<const char*>(reordered.const_data_ptr());
      is_reordered_ = true;
    }
    stored_[i].gradient = static_cast<char*>(gradient.mutable_data_ptr());
  }
}

void Segments::finish_gradients() {
  for (auto& [gradient, dense] : apart_) torch::stable::copy_(gradient, dense);
}

std::vector<Tensor> Segments::new_gradients() {
  std::vector<Tensor> gradients;
  gradients.reserve(weights_.size());
  for (size_t i = 0; i < weights_.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(weights_[i]));
    stored_[i].gradient = static_cast<char*>(gradients.back().mutable_data_ptr());
    ask_for_huge_pages(stored_[i].gradient, weights_[i].numel() * bytes_of(stored_[i].storage));
  }
  return gradients;
}

}  // namespace r2
