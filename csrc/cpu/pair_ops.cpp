// SPDX-License-Identifier: Apache-2.0
// The operator of the pair head on CPU, in one thread: pairs are few.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "pair_arguments.h"

namespace {

using torch::stable::Tensor;

template <class T>
void settle_pairs(const fastpref::PairHead& call) {
  double sums[fastpref::kMeans] = {};
  for (int64_t i = 0; i < call.pairs; ++i) fastpref::settle_pair<T>(call, i, sums);
  for (int k = 0; k < fastpref::kMeans; ++k) {
    static_cast<T*>(call.means)[k] = static_cast<T>(sums[k] / static_cast<double>(call.pairs));
  }
}

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
  const bool wide = policy_chosen_logps.scalar_type() == fastpref::ScalarType::Double;
  (wide ? settle_pairs<double> : settle_pairs<float>)(call);
  return {losses, rewards, slopes, means};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) { m.impl("pair_head", TORCH_BOX(&pair_head)); }
