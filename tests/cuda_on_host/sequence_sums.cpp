// SPDX-License-Identifier: Apache-2.0
// The CUDA sums over sequences as a function of the host, a block at a time.

#include "cuda/sequence_sums.cuh"

using namespace fastpref;
using namespace fastpref::cuda;

extern "C" void sequence_sums(int element, const SequenceSums* call, int64_t sequences, bool backwards) {
  void (*const kernels[])(SequenceSums) = {sequence_sums_kernel<double>, sequence_sums_kernel<float>,
                                           sequence_sums_kernel<__nv_bfloat16>, sequence_sums_kernel<__half>};
  host::run_grid(sequences, kThreads, backwards, [=] { kernels[element](*call); });
}
