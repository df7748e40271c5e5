// SPDX-License-Identifier: Apache-2.0
// The launchers of the sums over sequences and of the pair head: pointers of the current device, no synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/row_kernels.h"
#include "pair_head.h"
#include "sequence_sums.h"

namespace fastpref::cuda {

cudaError_t launch_sequence_sums(cpu::Element element, const SequenceSums& call, int64_t sequences,
                                 cudaStream_t stream);

cudaError_t launch_pair_head(cpu::Element element, const PairHead& call, cudaStream_t stream);

}  // namespace fastpref::cuda
