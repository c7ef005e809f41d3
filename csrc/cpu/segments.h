// A list of tensors as flat segments, long segments as chunks, and runs of short ones: what the operators compute on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace r2 {

using torch::stable::Tensor;

// Entries per chunk, as CHUNK_SIZE in r2_kernels/penalties.py.
inline constexpr int64_t kChunkSize = 16384;

inline int64_t bytes_of(Storage storage) { return storage == kFloat64 ? 8 : storage == kFloat32 ? 4 : 2; }

// What a segment is, as group_size in r2_kernels/granularity.py: a weight, a channel of it, or a group of so many.
inline constexpr int64_t kPerTensor = 0, kPerChannel = -1;

// One weight: its entries in the order of its storage.
struct Stored {
  const char* weight;
  char* gradient;  // in the weight's order; null where none is asked for
  Storage storage;
};

// A whole weight, or a channel or group of more than a chunk.
struct Segment {
  int32_t weight;  // its index
  int64_t number;  // among the segments of all weights, short ones included
  int64_t offset, size;
  int64_t first_chunk;  // among the chunks of all segments
  Storage storage;

  int64_t chunks() const { return (size + kChunkSize - 1) / kChunkSize; }
  int64_t entry_bytes() const { return bytes_of(storage); }
};

// One chunk of a segment.
struct ChunkPlace {
  int32_t segment;
  int32_t index;  // within the segment
};

// About a chunk of channels or groups, each of them a chunk at most.
struct Run {
  int32_t weight;
  int64_t first_number;  // of the weight's first segment
  int64_t begin, end;    // among the segments of the weight
};

// How the entries of a weight are cut into channels, and these into segments.
struct Cut {
  int64_t channel_size, size;  // the last segment of a channel may be shorter

  int64_t per_channel() const { return (channel_size + size - 1) / size; }
};

// How a tensor is stored; an error that calls it name[index] where no kernel reads it.
Storage storage_of(const Tensor& tensor, const char* name, size_t index);

// Whether the entries fill a contiguous range of memory without overlap, in any order of dimensions.
bool is_dense(const Tensor& tensor);
bool have_same_shape(const Tensor& a, const Tensor& b);
// Whether entries of the same index lie at the same offset, of tensors of the same shape.
bool have_same_order(const Tensor& a, const Tensor& b);

// Checks a list of weights, copies those that are not dense, and cuts all into chunks.
class Segments {
 public:
  explicit Segments(const std::vector<Tensor>& weights, int64_t group_size = kPerTensor);

  // Gradients to be added to, of the weights' shapes. One that lies in another order than its weight gets a copy of
  // the weight in its own; one that is not dense is accumulated apart and copied back by finish_gradients().
  void accumulate_into(const std::vector<Tensor>& gradients);
  void finish_gradients();

  // Fresh gradients, uninitialized, in the order of the weights.
  std::vector<Tensor> new_gradients();

  // Whether a gradient's order replaced its weight's, so that chunks are not those of reduce() without gradients.
  bool is_reordered() const { return is_reordered_; }

  // How many entries a chunk has: all but a segment's last are full.
  int64_t entries(const ChunkPlace& place) const {
    return std::min(kChunkSize, segments_[place.segment].size - place.index * kChunkSize);
  }

  // Segments that are weights, or longer than a chunk.
  const std::vector<Segment>& all() const { return segments_; }
  const std::vector<ChunkPlace>& chunks() const { return chunks_; }
  bool has_float64() const { return has_float64_; }
  int64_t count() const { return static_cast<int64_t>(segments_.size()); }

  // All others, and how their weights are cut.
  const std::vector<Run>& runs() const { return runs_; }
  const Cut& cut(const Run& run) const { return cuts_[run.weight]; }

  const Stored& stored(int64_t weight) const { return stored_[weight]; }
  int64_t weight_count() const { return static_cast<int64_t>(weights_.size()); }
  // How many partials reduce() leaves: the chunks' maxima of a sparse penalty whose segments are weights.
  int64_t partial_count(bool is_sparse) const {
    return is_sparse && group_size_ == kPerTensor ? static_cast<int64_t>(chunks_.size()) : 0;
  }
  // How many segments there are of either kind.
  int64_t total() const { return total_; }

 private:
  void add_weight(int32_t weight);
  // Whether channels and groups are consecutive in memory.
  bool are_consecutive(const Tensor& tensor) const;

  const int64_t group_size_;
  std::vector<Tensor> weights_;  // dense
  std::vector<Stored> stored_;
  std::vector<Cut> cuts_;
  std::vector<Segment> segments_;
  std::vector<Run> runs_;
  int64_t total_ = 0;
  std::vector<ChunkPlace> chunks_;
  std::vector<std::pair<Tensor, Tensor>> apart_;  // a gradient that is not dense, and its dense stand-in
  bool has_float64_ = false;
  bool is_reordered_ = false;
};

}  // namespace r2
