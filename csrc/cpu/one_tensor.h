// Operators on the entries of one tensor, in the order of memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "huge_pages.h"
#include "schedule.h"
#include "segments.h"

namespace r2 {

// The entries of `tensor` in the order of `like`, which is dense: itself, or a copy.
inline Tensor in_order_of(const Tensor& tensor, const Tensor& like) {
  if (is_dense(tensor) && have_same_order(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline Tensor dense(const Tensor& tensor) { return is_dense(tensor) ? tensor : torch::stable::contiguous(tensor); }

// Uninitialized, as `values`, which is dense.
inline Tensor new_like(const Tensor& values, int64_t entry_bytes) {
  Tensor tensor = torch::stable::empty_like(values);
  ask_for_huge_pages(tensor.mutable_data_ptr(), values.numel() * entry_bytes);
  return tensor;
}

inline int64_t chunk_count(int64_t size) { return (size + kChunkSize - 1) / kChunkSize; }

// Calls work(chunk's number, its first entry, its size) for all chunks.
template <class Work>
void run_chunks(int64_t size, const Work& work) {
  run_in_order(chunk_count(size), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunkSize;
    work(chunk, begin, std::min(kChunkSize, size - begin));
  });
}

}  // namespace r2
