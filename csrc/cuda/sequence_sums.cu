// SPDX-License-Identifier: Apache-2.0
// Instantiates the sums over sequences for every element type. No header of torch here: they would be compiled once
// more for each architecture.

#include "sequence_sums.cuh"
#include "sequence_sums.h"

namespace fastpref::cuda {

cudaError_t launch_sequence_sums(cpu::Element element, const SequenceSums& call, int64_t sequences,
                                 cudaStream_t stream) {
  // In the order of cpu::Element.
  constexpr void (*kernels[cpu::kElements])(SequenceSums) = {sequence_sums_kernel<double>, sequence_sums_kernel<float>,
                                                             sequence_sums_kernel<__nv_bfloat16>,
                                                             sequence_sums_kernel<__half>};
  kernels[static_cast<int>(element)]<<<static_cast<unsigned>(sequences), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace fastpref::cuda
