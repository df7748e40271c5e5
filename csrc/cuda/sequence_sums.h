// SPDX-License-Identifier: Apache-2.0
// The launcher of the sums over sequences: pointers of the current device, no synchronisation.
//     sums[b] = sum over the scored tokens t of b of  weights[t] * values[t],  over their number for a mean
// A weight of 0 makes 0 of any value, NaN too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/row_kernels.h"

namespace fastpref::cuda {

// Sequences are the rows of a padded (B, T) batch, or with boundaries the segments of (N,) packed tokens.
struct SequenceSums {
  const void* values;
  const void* weights;        // like values, or null: all 1
  const bool* scored;         // like values, or null: every token
  const int64_t* order;       // (N,), the tokens as the boundaries count them, or null: as they lie
  const int64_t* boundaries;  // (B + 1,), or null: padded
  void* sums;                 // (B,), double for double values and float otherwise
  int64_t* counts;            // (B,), the number of scored tokens
  int64_t tokens;             // T or N
  int64_t values_stride, weights_stride, scored_stride;  // between padded rows
  bool mean;
};

cudaError_t launch_sequence_sums(cpu::Element element, const SequenceSums& call, int64_t sequences,
                                 cudaStream_t stream);

}  // namespace fastpref::cuda
