// SPDX-License-Identifier: Apache-2.0
// The operator of the pair head on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.cuh"
#include "pair_arguments.h"
#include "pair_launcher.h"

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_head(Tensor policy_chosen_logps, Tensor policy_rejected_logps,
                                                     std::optional<Tensor> ref_chosen_logps,
                                                     std::optional<Tensor> ref_rejected_logps,
                                                     std::optional<Tensor> chosen_lengths,
                                                     std::optional<Tensor> rejected_lengths, int64_t link, double scale,
                                                     double shift, double flipped, double reward_scale,
                                                     bool rewards_per_token) {
  const auto [call, losses, rewards, slopes, means] = fastpref::pair_head_call(
      policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths,
      rejected_lengths, link, scale, shift, flipped, reward_scale, rewards_per_token);
  const auto element = fastpref::element_of(policy_chosen_logps, "policy_chosen_logps");
  // The means are never empty, and of no pairs they are NaN, as torch has it.
  fastpref::cuda::on_device_of(means, [element, &call = call](cudaStream_t stream) {
    return fastpref::cuda::launch_pair_head(element, call, stream);
  });
  return {losses, rewards, slopes, means};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("pair_head", TORCH_BOX(&pair_head)); }
