// What an instruction set offers the operators of DKM: one entry per storage type.
#pragma once

#include "../dkm.h"
#include "kernels.h"

namespace r2 {

// Over `size` entries of the storage type.
struct DkmKernels {
  // entries -> dkm_sums() numbers
  void (*sum)(const void* entries, int64_t size, const DkmIteration& iteration, double* sums);
  void (*output)(const void* entries, void* outputs, int64_t size, const DkmIteration& iteration);
  // -> the gradients of the updated centroids that come from the outputs, one per cluster
  void (*sum_of_outputs)(const void* entries, const void* output_gradients, int64_t size, const DkmIteration& iteration,
                         double* of_updated);
  // -> the gradients of the iteration's centroids. Those of the entries are added to `carried`, of float or double,
  // which the last iteration begins and the first hands to `gradients`, of the storage type.
  void (*backward)(const void* entries, const void* output_gradients, void* carried, void* gradients, int64_t size,
                   const DkmIteration& iteration, double* of_centroids);
};

}  // namespace r2
