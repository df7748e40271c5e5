// SPDX-License-Identifier: Apache-2.0
// The pair head in one block, whose threads take the pairs in turn: pairs are few, and the means need no second launch.
// Everything is computed in double and rounded once.
#pragma once

#include "elements.cuh"
#include "pair_head.h"
#include "teams.cuh"

namespace fastpref::cuda {

struct LossAndSlope {
  double loss, slope;  // slope: d loss / d margin
};

__device__ inline LossAndSlope loss_of_margin(const PairHead& call, double m) {
  if (call.link == Link::square) return {m * m, 2 * m};
  // At the kink the slope is 0; a NaN stays one.
  if (call.link == Link::hinge) return m >= 1 ? LossAndSlope{0, 0} : LossAndSlope{1 - m, m < 1 ? -1.0 : m};
  const double e = exp(-fabs(m));
  const double sigmoid_of_minus = (m > 0 ? e : 1.0) / (1 + e);
  return {(m < 0 ? -m : 0.0) + log1p(e) + call.flipped * m, call.flipped - sigmoid_of_minus};
}

template <class T>
__global__ void __launch_bounds__(kThreads) pair_head_kernel(PairHead call) {
  const auto at = [](const Column& column, int64_t i) {
    return column.data == nullptr ? 0.0 : static_cast<double>(static_cast<const T*>(column.data)[i * column.stride]);
  };
  const auto out = [&](void* to, int64_t i) -> T& { return static_cast<T*>(to)[i]; };
  double sums[kMeans] = {};
  for (int64_t i = threadIdx.x; i < call.pairs; i += kThreads) {
    double policy[2], gap[2], per_logp[2], reward[2];
    for (int side = 0; side < 2; ++side) {
      policy[side] = at(call.policy[side], i);
      const double ratio = policy[side] - at(call.ref[side], i);
      const int64_t* lengths = call.lengths[side];
      // An empty response has mean 0.
      per_logp[side] = lengths == nullptr ? 1.0 : lengths[i] > 0 ? 1.0 / static_cast<double>(lengths[i]) : 0.0;
      gap[side] = per_logp[side] == 0 ? 0.0 : ratio * per_logp[side];
      reward[side] = call.reward_scale * (call.rewards_per_token ? gap[side] : ratio);
      out(call.rewards, side * call.pairs + i) = static_cast<T>(reward[side]);
    }
    const auto [loss, slope] = loss_of_margin(call, call.scale * (gap[0] - gap[1]) - call.shift);
    out(call.losses, i) = static_cast<T>(loss);
    out(call.slopes, i) = static_cast<T>(slope * call.scale * per_logp[0]);
    out(call.slopes, call.pairs + i) = static_cast<T>(-slope * call.scale * per_logp[1]);
    const double means[kMeans] = {
        loss, reward[0], reward[1], reward[0] - reward[1], reward[0] > reward[1] ? 1.0 : 0.0, policy[0], policy[1]};
    for (int k = 0; k < kMeans; ++k) sums[k] += means[k];
  }
  for (int k = 0; k < kMeans; ++k) {
    const double sum = block_reduce(sums[k], Sum{});
    if (threadIdx.x == 0) out(call.means, k) = static_cast<T>(sum / static_cast<double>(call.pairs));
  }
}

}  // namespace fastpref::cuda
