// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of the operators that ops.cpp defines. Only torch's stable ABI and the static CUDA runtime
// are used, so that the library also loads where torch has no CUDA.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "row_kernels.h"

// Weak, because a torch without CUDA does not have it; visible, because a hidden one would be null everywhere.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::stable::Tensor;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "the CUDA runtime of fastpref answered: ", cudaGetErrorString(error),
                  "; backend='torch' does without it");
}

// Calls launch(stream) with the tile's device and torch's current stream of it.
template <class Launch>
void on_device_of(const Tensor& tile, Launch launch) {
  const int32_t device = tile.get_device_index();
  // A grid of no blocks is an error.
  if (tile.size(0) == 0) return;
  STD_TORCH_CHECK(tile.size(0) <= fastpref::cuda::kMostRows, "tile must have fewer than 2^31 rows, got ", tile.size(0),
                  "; split it");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch names no CUDA stream to fastpref; use backend='torch'");
  const torch::stable::accelerator::DeviceGuard guard(device);
  // The runtime linked into this library is not the one that torch's guard tells.
  check(cudaSetDevice(device));
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check(launch(static_cast<cudaStream_t>(stream)));
}

std::tuple<Tensor, Tensor> exp_rows(Tensor tile, Tensor target, Tensor anchor, std::optional<Tensor> bias, double scale,
                                    double cap, bool write, bool statistics) {
  const auto element = fastpref::element_of(tile, "tile");
  auto call = fastpref::exp_rows_call(tile, target, anchor, bias, scale, cap, write);
  auto outputs = fastpref::exp_rows_outputs(call, target, anchor, statistics);
  on_device_of(tile, [&](cudaStream_t stream) { return fastpref::cuda::launch_exp_rows(element, call, stream); });
  return outputs;
}

void logit_grad(Tensor tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp,
                std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy,
                std::optional<Tensor> bias, double scale, double cap) {
  const auto element = fastpref::element_of(tile, "tile");
  const auto call = fastpref::logit_grad_call(tile, target, anchor, norm, logp, grad_logp, grad_lse, grad_entropy,
                                              entropy, bias, scale, cap);
  on_device_of(tile, [&](cudaStream_t stream) { return fastpref::cuda::launch_logit_grad(element, call, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) {
  m.impl("exp_rows_", TORCH_BOX(&exp_rows));
  m.impl("logit_grad_", TORCH_BOX(&logit_grad));
}
