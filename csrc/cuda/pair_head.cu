// SPDX-License-Identifier: Apache-2.0
// Instantiates the pair head. No header of torch here: they would be compiled once more for each architecture.

#include "pair_head.cuh"
#include "pair_launcher.h"

namespace fastpref::cuda {

cudaError_t launch_pair_head(cpu::Element element, const PairHead& call, cudaStream_t stream) {
  const auto kernel = element == cpu::Element::float64 ? pair_head_kernel<double> : pair_head_kernel<float>;
  kernel<<<1, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace fastpref::cuda
