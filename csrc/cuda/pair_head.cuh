// SPDX-License-Identifier: Apache-2.0
// The pair head in one block, whose threads take the pairs in turn: pairs are few, and the means need no second launch.
#pragma once

#include "elements.cuh"
#include "pair_head.h"
#include "teams.cuh"

namespace fastpref::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) pair_head_kernel(PairHead call) {
  double sums[kMeans] = {};
  for (int64_t i = threadIdx.x; i < call.pairs; i += kThreads) settle_pair<T>(call, i, sums);
  for (int k = 0; k < kMeans; ++k) {
    const double sum = block_reduce(sums[k], Sum{});
    if (threadIdx.x == 0) static_cast<T*>(call.means)[k] = static_cast<T>(sum / static_cast<double>(call.pairs));
  }
}

}  // namespace fastpref::cuda
