// SPDX-License-Identifier: Apache-2.0
// The launchers of the CUDA row kernels: pointers of the current device, no synchronisation.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/row_kernels.h"

namespace fastpref::cuda {

// A row is a block, and a grid has no more blocks than this along x.
constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;
// Columns are counted in 32 bits: the registers of 64 are missed elsewhere.
constexpr int64_t kMostColumns = (int64_t{1} << 31) - 1;

cudaError_t launch_exp_rows(cpu::Element element, const cpu::ExpRows& call, cudaStream_t stream);
cudaError_t launch_logit_grad(cpu::Element element, const cpu::LogitGrad& call, cudaStream_t stream);
cudaError_t launch_target_logits(cpu::Element element, const cpu::TargetLogits& call, int64_t rows,
                                 cudaStream_t stream);
cudaError_t launch_settle_rows(cpu::Element element, const cpu::SettleRows& call, cudaStream_t stream);
cudaError_t launch_scale_rows(cpu::Element element, const cpu::ScaleRows& call, int64_t rows, cudaStream_t stream);

}  // namespace fastpref::cuda
