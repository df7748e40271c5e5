// SPDX-License-Identifier: Apache-2.0
// The launcher of the pair head: pointers of the current device, no synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/row_kernels.h"
#include "pair_head.h"

namespace fastpref::cuda {

cudaError_t launch_pair_head(cpu::Element element, const PairHead& call, cudaStream_t stream);

}  // namespace fastpref::cuda
