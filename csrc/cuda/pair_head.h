// SPDX-License-Identifier: Apache-2.0
// The launcher of the pair head: pointers of the current device, no synchronisation.
//
// For the chosen (w) and the rejected (l) response of each pair, with the lengths n where the gap is one a token:
//     x = policy - ref,   gap = x_w - x_l  or  x_w / n_w - x_l / n_l,   m = scale gap - shift
//     logistic: log(1 + exp(-m)) + flipped m      square: m^2      hinge: max(0, 1 - m)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/row_kernels.h"

namespace fastpref::cuda {

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

cudaError_t launch_pair_head(cpu::Element element, const PairHead& call, cudaStream_t stream);

}  // namespace fastpref::cuda
