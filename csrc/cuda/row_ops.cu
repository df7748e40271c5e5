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

// Calls launch(stream) on the device of a matrix with torch's current stream of it.
template <class Launch>
void on_device_of(const Tensor& matrix, Launch launch) {
  const int64_t rows = matrix.size(0);
  // A grid of no blocks is an error.
  if (rows == 0) return;
  STD_TORCH_CHECK(rows <= fastpref::cuda::kMostRows, "a matrix must have fewer than 2^31 rows, got ", rows,
                  "; split it");
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

Tensor gather_dot(Tensor hidden, Tensor weight, Tensor index) {
  const auto element = fastpref::element_of(hidden, "hidden");
  const auto [call, out] = fastpref::gather_dot_call(hidden, weight, index);
  on_device_of(hidden, [&, &call = call](cudaStream_t stream) {
    return fastpref::cuda::launch_gather_dot(element, call, hidden.size(0), weight.size(0), stream);
  });
  return out;
}

void scale_rows(Tensor out, Tensor input, Tensor factor) {
  const auto element = fastpref::element_of(input, "input");
  const auto call = fastpref::scale_rows_call(out, input, factor);
  on_device_of(input, [&](cudaStream_t stream) {
    return fastpref::cuda::launch_scale_rows(element, call, input.size(0), stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) {
  m.impl("exp_rows_", TORCH_BOX(&exp_rows));
  m.impl("logit_grad_", TORCH_BOX(&logit_grad));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
}
