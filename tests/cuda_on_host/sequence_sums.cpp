// SPDX-License-Identifier: Apache-2.0
// The CUDA sums over sequences as a function of the host, a block at a time.

#include "cuda/sequence_sums.cuh"

using namespace fastpref;
using namespace fastpref::cuda;

extern "C" void sequence_sums(int element, const SequenceSums* call, int64_t sequences, bool backwards) {
  void (*const kernels[])(SequenceSums) = {sequence_sums_kernel<double>, sequence_sums_kernel<float>,
                                           sequence_sums_kernel<__nv_bfloat16>, sequence_sums_kernel<__half>};
  for (int64_t b = 0; b < sequences; ++b) {
    host::run_block(b, kThreads, backwards, [=] { kernels[element](*call); });
  }
}
