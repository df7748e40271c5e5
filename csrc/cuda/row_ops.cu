// SPDX-License-Identifier: Apache-2.0
// The CUDA implementations of the row operators that ops.cpp defines.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "launch.cuh"
#include "row_kernels.h"

namespace {

using fastpref::cuda::on_device_of;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> exp_rows(Tensor tile, Tensor target, Tensor anchor, std::optional<Tensor> bias, double scale,
                                    double cap, std::optional<Tensor> factor, bool write, bool statistics) {
  const auto element = fastpref::element_of(tile, "tile");
  auto call = fastpref::exp_rows_call(tile, target, anchor, bias, scale, cap, factor, write);
  auto outputs = fastpref::exp_rows_outputs(call, target, anchor, statistics);
  on_device_of(tile, [&](cudaStream_t stream) { return fastpref::cuda::launch_exp_rows(element, call, stream); });
  return outputs;
}

void logit_grad(Tensor tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp,
                std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy,
                std::optional<Tensor> bias, double scale, double cap, std::optional<Tensor> factor) {
  const auto element = fastpref::element_of(tile, "tile");
  const auto call = fastpref::logit_grad_call(tile, target, anchor, norm, logp, grad_logp, grad_lse, grad_entropy,
                                              entropy, bias, scale, cap, factor);
  on_device_of(tile, [&](cudaStream_t stream) { return fastpref::cuda::launch_logit_grad(element, call, stream); });
}

std::tuple<Tensor, Tensor, Tensor> target_logits(Tensor hidden, Tensor weight, Tensor target,
                                                 std::optional<Tensor> bias, double scale, double cap) {
  const auto element = fastpref::element_of(hidden, "hidden");
  const auto [call, column, raw, logit] = fastpref::target_logits_call(hidden, weight, target, bias, scale, cap);
  on_device_of(hidden, [&, &call = call](cudaStream_t stream) {
    return fastpref::cuda::launch_target_logits(element, call, hidden.size(0), stream);
  });
  return {column, raw, logit};
}

Tensor settle_rows(std::optional<Tensor> exps, Tensor anchor, Tensor sum, Tensor offset, std::optional<Tensor> best,
                   Tensor column, Tensor raw, Tensor logit, double scale, double cap) {
  const auto element = exps.has_value() ? fastpref::element_of(*exps, "exps") : fastpref::element_of(anchor, "anchor");
  const auto [call, scores] =
      fastpref::settle_rows_call(exps, anchor, sum, offset, best, column, raw, logit, scale, cap);
  on_device_of(anchor, [&, &call = call](cudaStream_t stream) {
    return fastpref::cuda::launch_settle_rows(element, call, stream);
  });
  return scores;
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
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("settle_rows_", TORCH_BOX(&settle_rows));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
}
