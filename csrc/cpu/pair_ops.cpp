// SPDX-License-Identifier: Apache-2.0
// The operators of pairs on CPU, in one thread: pairs are few.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

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

// Of float64 where `wide`, otherwise float32. Read and written through these, the pairs of rows need no code for
// float32 of their own.
double read(const Tensor& values, bool wide, int64_t i) {
  const void* data = values.const_data_ptr();
  return wide ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
}

void write(Tensor& values, bool wide, int64_t i, double value) {
  void* data = values.mutable_data_ptr();
  if (wide) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// pair_head of the sums of padded rows, chosen ones before rejected ones or each before its own: the sum of the losses
// over `divisor`, losses, rewards, sums and slopes of the former by row, and the means.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pair_rows(Tensor logp, Tensor target, int64_t ignore_index,
                                                                     std::optional<Tensor> ref_logps, bool interleaved,
                                                                     bool per_token, double divisor, int64_t link,
                                                                     double scale, double shift, double flipped,
                                                                     double reward_scale, bool rewards_per_token) {
  STD_TORCH_CHECK(logp.dim() == 2 && logp.size(0) % 2 == 0, "logp must have shape (2 P, T), got ", logp.dim(),
                  " dimensions and ", logp.dim() > 0 ? logp.size(0) : 0, " rows");
  STD_TORCH_CHECK(logp.is_contiguous(), "logp must be contiguous; call .contiguous() first");
  const int64_t* id = fastpref::checked_target(logp, target, logp.numel());
  STD_TORCH_CHECK(divisor > 0, "divisor must be greater than 0, got ", divisor);
  const int64_t rows = logp.size(0), tokens = logp.size(1), pairs = rows / 2;
  auto [call, losses, rewards, slopes, means] =
      fastpref::linked_call(logp, "logp", pairs, {rows}, link, scale, shift, flipped, reward_scale, rewards_per_token);
  Tensor logps = fastpref::uninitialised(logp, {rows});
  if (ref_logps.has_value()) fastpref::check_column(logps, *ref_logps, "ref_logps", logp.scalar_type());
  Tensor loss = fastpref::uninitialised(logp, {});
  const bool wide = logp.scalar_type() == fastpref::ScalarType::Double;

  // Of all chosen sides and then the rejected ones.
  std::vector<double> sums(rows), refs(rows), rewards_of(rows), slopes_of(rows), losses_of(pairs);
  std::vector<int64_t> lengths(rows);
  double means_of[fastpref::kMeans];
  const auto place_of = [&](int64_t row) { return interleaved ? row % 2 * pairs + row / 2 : row; };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = place_of(row);
    for (int64_t i = row * tokens; i < (row + 1) * tokens; ++i) {
      if (id[i] == ignore_index) continue;
      sums[place] += read(logp, wide, i);
      ++lengths[place];
    }
    write(logps, wide, row, sums[place]);
    if (ref_logps.has_value()) refs[place] = read(*ref_logps, wide, row * ref_logps->stride(0));
  }
  for (int64_t side = 0; side < 2; ++side) {
    call.policy[side] = {sums.data() + side * pairs, 1};
    call.ref[side] = {refs.data() + side * pairs, 1};
    call.lengths[side] = per_token ? lengths.data() + side * pairs : nullptr;
  }
  call.losses = losses_of.data();
  call.rewards = rewards_of.data();
  call.slopes = slopes_of.data();
  call.means = means_of;
  settle_pairs<double>(call);
  double sum = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    sum += losses_of[i];
    write(losses, wide, i, losses_of[i]);
  }
  write(loss, wide, 0, sum / divisor);
  for (int64_t row = 0; row < rows; ++row) {
    write(rewards, wide, row, rewards_of[place_of(row)]);
    write(slopes, wide, row, slopes_of[place_of(row)] / divisor);
  }
  for (int64_t k = 0; k < fastpref::kMeans; ++k) write(means, wide, k, means_of[k]);
  return {loss, losses, rewards, logps, slopes, means};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("pair_head", TORCH_BOX(&pair_head));
  m.impl("pair_rows", TORCH_BOX(&pair_rows));
}
