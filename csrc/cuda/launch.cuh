// SPDX-License-Identifier: Apache-2.0
// What the operators launch through. Only torch's stable ABI and the static CUDA runtime are used, so that the library
// also loads where torch has no CUDA.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "row_kernels.h"

// Weak, because a torch without CUDA does not have it; visible, because a hidden one would be null everywhere.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastpref::cuda {

inline void check(cudaError_t error) {
  // The runtime remembers an error until it is asked; the next launch would answer with this one.
  if (error != cudaSuccess) (void)cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "the CUDA runtime of fastpref answered: ", cudaGetErrorString(error),
                  "; backend='torch' scores without it");
}

// Calls launch(stream) on the device of a matrix, or of a vector, with torch's current stream of it.
template <class Launch>
void on_device_of(const torch::stable::Tensor& matrix, Launch launch) {
  const int64_t rows = matrix.size(0);
  const int64_t cols = matrix.dim() > 1 ? matrix.size(1) : 1;
  // A grid of no blocks is an error.
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= kMostRows && cols <= kMostColumns,
                  "a matrix must have fewer than 2^31 rows and columns, got ", rows, " and ", cols, "; split it");
  const int32_t device = matrix.get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch names no CUDA stream to fastpref; use backend='torch'");
  const torch::stable::accelerator::DeviceGuard guard(device);
  // The runtime linked into this library is not the one that torch's guard tells.
  check(cudaSetDevice(device));
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check(launch(static_cast<cudaStream_t>(stream)));
}

}  // namespace fastpref::cuda
