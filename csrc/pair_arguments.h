// SPDX-License-Identifier: Apache-2.0
// Checks the arguments of pair_head and makes the kernels' call of them, for tensors of any device.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "pair_head.h"

namespace fastpref {

inline void check_column(const Tensor& like, const Tensor& values, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == like.size(0), name, " must have shape (", like.size(0),
                  ",), got ", values.dim(), " dimensions and ", values.numel(), " elements");
  STD_TORCH_CHECK(values.scalar_type() == dtype, name,
                  " must have the dtype of policy_chosen_logps, and lengths int64; cast it first");
  STD_TORCH_CHECK(values.device() == like.device(), name,
                  " must be on the device of policy_chosen_logps; move it there first");
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

// The call with (losses, rewards, slopes, means), which are new and uninitialised.
inline std::tuple<PairHead, Tensor, Tensor, Tensor, Tensor> pair_head_call(
    const Tensor& policy_chosen_logps, const Tensor& policy_rejected_logps,
    const std::optional<Tensor>& ref_chosen_logps, const std::optional<Tensor>& ref_rejected_logps,
    const std::optional<Tensor>& chosen_lengths, const std::optional<Tensor>& rejected_lengths, int64_t link,
    double scale, double shift, double flipped, double reward_scale, bool rewards_per_token) {
  const Tensor& like = policy_chosen_logps;
  const auto element = element_of(like, "policy_chosen_logps");
  STD_TORCH_CHECK(element == cpu::Element::float64 || element == cpu::Element::float32,
                  "policy_chosen_logps must be float64 or float32, got a half; sums over a response need float32");
  STD_TORCH_CHECK(link >= 0 && link <= static_cast<int64_t>(Link::hinge),
                  "link must be 0 (logistic), 1 (square) or 2 (hinge), got ", link);
  PairHead call{};
  call.policy[0] = checked_column(like, policy_chosen_logps, "policy_chosen_logps");
  call.policy[1] = checked_column(like, policy_rejected_logps, "policy_rejected_logps");
  call.ref[0] = checked_column(like, ref_chosen_logps, "ref_chosen_logps");
  call.ref[1] = checked_column(like, ref_rejected_logps, "ref_rejected_logps");
  call.lengths[0] = checked_lengths(like, chosen_lengths, "chosen_lengths");
  call.lengths[1] = checked_lengths(like, rejected_lengths, "rejected_lengths");
  call.link = static_cast<Link>(link);
  call.scale = scale;
  call.shift = shift;
  call.flipped = flipped;
  call.reward_scale = reward_scale;
  call.rewards_per_token = rewards_per_token;
  call.pairs = like.size(0);
  Tensor losses = torch::stable::new_empty(like, {call.pairs});
  Tensor rewards = torch::stable::new_empty(like, {2, call.pairs});
  Tensor slopes = torch::stable::new_empty(like, {2, call.pairs});
  Tensor means = torch::stable::new_empty(like, {kMeans});
  call.losses = losses.mutable_data_ptr();
  call.rewards = rewards.mutable_data_ptr();
  call.slopes = slopes.mutable_data_ptr();
  call.means = means.mutable_data_ptr();
  return {call, losses, rewards, slopes, means};
}

}  // namespace fastpref
