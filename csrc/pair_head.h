// SPDX-License-Identifier: Apache-2.0
// The pair head: what it takes and returns, and one pair of it, on any device.
//
// For the chosen (w) and the rejected (l) response of each pair, with the lengths n where the gap is one a token:
//     x = policy - ref,   gap = x_w - x_l  or  x_w / n_w - x_l / n_l,   m = scale gap - shift
//     logistic: log(1 + exp(-m)) + flipped m      square: m^2      hinge: max(0, 1 - m)
// Everything is computed in double and rounded once.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTPREF_ANY_DEVICE __host__ __device__
#else
#define FASTPREF_ANY_DEVICE
#endif

namespace fastpref {

// In the order of fastpref/units/pair_head.py.
enum class Link : int { logistic = 0, square = 1, hinge = 2 };

struct Column {
  const void* data;  // (P,), null: there is none
  int64_t stride;
};

// Means over the pairs: the loss, both rewards, their margin, its sign, both log-probs of the policy.
constexpr int kMeans = 7;

struct PairHead {
  Column policy[2], ref[2];   // of the chosen and of the rejected responses
  const int64_t* lengths[2];  // (P,) or null: the gap is one of sums
  Link link;
  double scale, shift, flipped;
  double reward_scale;
  bool rewards_per_token;
  int64_t pairs;
  // All of the element type: (P,); (2, P) each; (kMeans,).
  void* losses;
  void* rewards;
  void* slopes;  // d loss / d policy
  void* means;
};

struct LossAndSlope {
  double loss, slope;  // slope: d loss / d margin
};

FASTPREF_ANY_DEVICE inline LossAndSlope loss_of_margin(const PairHead& call, double m) {
  if (call.link == Link::square) return {m * m, 2 * m};
  // At the kink the slope is 0; a NaN stays one.
  if (call.link == Link::hinge) return m >= 1 ? LossAndSlope{0, 0} : LossAndSlope{1 - m, m < 1 ? -1.0 : m};
  const double e = exp(-fabs(m));
  const double sigmoid_of_minus = (m > 0 ? e : 1.0) / (1 + e);
  return {(m < 0 ? -m : 0.0) + log1p(e) + call.flipped * m, call.flipped - sigmoid_of_minus};
}

// Writes loss, rewards and slopes of pair i, and adds to `sums` what the means are made of.
template <class T>
FASTPREF_ANY_DEVICE inline void settle_pair(const PairHead& call, int64_t i, double (&sums)[kMeans]) {
  const auto at = [](const Column& column, int64_t i) {
    return column.data == nullptr ? 0.0 : static_cast<double>(static_cast<const T*>(column.data)[i * column.stride]);
  };
  const auto out = [](void* to, int64_t i) -> T& { return static_cast<T*>(to)[i]; };
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
  const double terms[kMeans] = {
      loss, reward[0], reward[1], reward[0] - reward[1], reward[0] > reward[1] ? 1.0 : 0.0, policy[0], policy[1]};
  for (int k = 0; k < kMeans; ++k) sums[k] += terms[k];
}

}  // namespace fastpref
