// SPDX-License-Identifier: Apache-2.0
// Sums over sequences, one block a sequence. The threads take its tokens in turn and add them up in double; the order
// of all additions depends on the sequence's length alone.
#pragma once

#include "elements.cuh"
#include "sequence_sums.h"
#include "teams.cuh"

namespace fastpref::cuda {

// Checking boundaries or an order on the host would wait for the device: what points outside the tokens counts for
// nothing.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sequence_sums_kernel(SequenceSums call) {
  using A = typename AccumulateType<T>::type;
  const int64_t b = blockIdx.x;
  const auto inside = [&](int64_t place) { return place < 0 ? 0 : place < call.tokens ? place : call.tokens; };
  const int64_t begin = call.boundaries == nullptr ? 0 : inside(call.boundaries[b]);
  const int64_t end = call.boundaries == nullptr ? call.tokens : inside(call.boundaries[b + 1]);
  const T* values = static_cast<const T*>(call.values) + b * call.values_stride;
  const T* weights = static_cast<const T*>(call.weights) + b * call.weights_stride;
  double sum = 0;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t token = i;
    bool there = true;
    if (call.order != nullptr) {
      token = call.order[i];
      there = token >= 0 && token < call.tokens;
      if (!there) token = 0;
    }
    // Chosen from below: a load that waits for the mask would come after it.
    const bool scored = call.scored == nullptr || call.scored[b * call.scored_stride + token];
    double term = load(values[token]);
    if (call.weights != nullptr) {
      const A weight = load(weights[token]);
      term = weight == 0 ? 0 : term * weight;  // whatever the value
    }
    const bool counts = there && scored;
    sum += counts ? term : 0;
    count += counts ? 1 : 0;
  }
  sum = block_reduce(sum, Sum{});
  count = block_reduce(count, Sum{});
  if (threadIdx.x == 0) {
    static_cast<A*>(call.sums)[b] = static_cast<A>(call.mean && count > 0 ? sum / static_cast<double>(count) : sum);
    call.counts[b] = count;
  }
}

}  // namespace fastpref::cuda
