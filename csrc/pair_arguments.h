// SPDX-License-Identifier: Apache-2.0
// Checks the arguments of the operators of pairs and makes the kernels' call of them, for tensors of any device.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "pair_head.h"

namespace fastpref {

inline void check_column(const Tensor& like, const Tensor& values, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == like.size(0), name, " must have shape (", like.size(0),
                  ",), got ", values.dim(), " dimensions and ", values.numel(), " elements");
  STD_TORCH_CHECK(values.scalar_type() == dtype, name,
                  " must have the dtype of the log-probs, and lengths int64; cast it first");
  STD_TORCH_CHECK(values.device() == like.device(), name,
                  " must be on the device of the log-probs; move it there first");
}

inline Column checked_column(const Tensor& like, const std::optional<Tensor>& values, const char* name) {
  if (!values.has_value()) return {nullptr, 0};
  check_column(like, *values, name, like.scalar_type());
  return {values->const_data_ptr(), values->stride(0)};
}

inline const int64_t* checked_lengths(const Tensor& like, const std::optional<Tensor>& values, const char* name) {
  if (!values.has_value()) return nullptr;
  check_column(like, *values, name, ScalarType::Long);
  STD_TORCH_CHECK(values->is_contiguous(), name, " must be contiguous; call .contiguous() first");
  return static_cast<const int64_t*>(values->const_data_ptr());
}

// The call but for its columns and lengths, with (losses, rewards, slopes, means), which are new and uninitialised; of
// rewards and slopes, shaped `both`, the chosen side comes first.
inline std::tuple<PairHead, Tensor, Tensor, Tensor, Tensor> linked_call(const Tensor& like, const char* name,
                                                                        int64_t pairs, std::vector<int64_t> both,
                                                                        int64_t link, double scale, double shift,
                                                                        double flipped, double reward_scale,
                                                                        bool rewards_per_token) {
  const auto element = element_of(like, name);
  STD_TORCH_CHECK(element == cpu::Element::float64 || element == cpu::Element::float32, name,
                  " must be float64 or float32, got a half; sums over a response need float32");
  STD_TORCH_CHECK(link >= 0 && link <= static_cast<int64_t>(Link::hinge),
                  "link must be 0 (logistic), 1 (square) or 2 (hinge), got ", link);
  PairHead call{};
  call.link = static_cast<Link>(link);
  call.scale = scale;
  call.shift = shift;
  call.flipped = flipped;
  call.reward_scale = reward_scale;
  call.rewards_per_token = rewards_per_token;
  call.pairs = pairs;
  Tensor losses = uninitialised(like, {pairs});
  Tensor rewards = uninitialised(like, both);
  Tensor slopes = uninitialised(like, both);
  Tensor means = uninitialised(like, {kMeans});
  call.losses = losses.mutable_data_ptr();
  call.rewards = rewards.mutable_data_ptr();
  call.slopes = slopes.mutable_data_ptr();
  call.means = means.mutable_data_ptr();
  return {call, losses, rewards, slopes, means};
}

// The call of pair_head, with its outputs.
inline std::tuple<PairHead, Tensor, Tensor, Tensor, Tensor> pair_head_call(
    const Tensor& policy_chosen_logps, const Tensor& policy_rejected_logps,
    const std::optional<Tensor>& ref_chosen_logps, const std::optional<Tensor>& ref_rejected_logps,
    const std::optional<Tensor>& chosen_lengths, const std::optional<Tensor>& rejected_lengths, int64_t link,
    double scale, double shift, double flipped, double reward_scale, bool rewards_per_token) {
  const Tensor& like = policy_chosen_logps;
  const int64_t pairs = like.size(0);
  auto made = linked_call(like, "policy_chosen_logps", pairs, {2, pairs}, link, scale, shift, flipped, reward_scale,
                          rewards_per_token);
  PairHead& call = std::get<0>(made);
  call.policy[0] = checked_column(like, policy_chosen_logps, "policy_chosen_logps");
  call.policy[1] = checked_column(like, policy_rejected_logps, "policy_rejected_logps");
  call.ref[0] = checked_column(like, ref_chosen_logps, "ref_chosen_logps");
  call.ref[1] = checked_column(like, ref_rejected_logps, "ref_rejected_logps");
  call.lengths[0] = checked_lengths(like, chosen_lengths, "chosen_lengths");
  call.lengths[1] = checked_lengths(like, rejected_lengths, "rejected_lengths");
  return made;
}

}  // namespace fastpref
