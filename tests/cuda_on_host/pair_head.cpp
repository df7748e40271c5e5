// SPDX-License-Identifier: Apache-2.0
// The pair head as a function of the host.

#include "cuda/pair_head.cuh"

using namespace fastpref;

extern "C" void pair_head(int element, const PairHead* call, bool backwards) {
  const auto kernel = element == 0 ? cuda::pair_head_kernel<double> : cuda::pair_head_kernel<float>;
  host::run_grid(1, cuda::kThreads, backwards, [=] { kernel(*call); });
}
