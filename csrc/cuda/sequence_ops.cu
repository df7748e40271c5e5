// SPDX-License-Identifier: Apache-2.0
// The operator of sums over sequences on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.cuh"
#include "launchers.h"
#include "sequence_arguments.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> sequence_sums(Tensor logp, std::optional<Tensor> token_weights, std::optional<Tensor> mask,
                                         std::optional<Tensor> order, std::optional<Tensor> boundaries, bool mean) {
  const auto element = fastpref::element_of(logp, "logp");
  const auto [call, sums, counts] = fastpref::sequence_sums_call(logp, token_weights, mask, order, boundaries, mean);
  fastpref::cuda::on_device_of(sums, [element, &call = call, &sums = sums](cudaStream_t stream) {
    return fastpref::cuda::launch_sequence_sums(element, call, sums.size(0), stream);
  });
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("sequence_sums", TORCH_BOX(&sequence_sums)); }
