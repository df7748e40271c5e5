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

// Returns the sum of the losses.
template <class T>
double settle_pairs(const fastpref::PairHead& call) {
  double sums[fastpref::kMeans] = {};
  for (int64_t i = 0; i < call.pairs; ++i) fastpref::settle_pair<T>(call, i, sums);
  for (int k = 0; k < fastpref::kMeans; ++k) {
    static_cast<T*>(call.means)[k] = static_cast<T>(sums[k] / static_cast<double>(call.pairs));
  }
  return sums[0];
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

// Where a row's number lies among those of the chosen sides and then the rejected ones.
int64_t place_of(int64_t row, int64_t pairs, bool interleaved) { return interleaved ? row % 2 * pairs + row / 2 : row; }

// Sums of the scored tokens of each row, in double, and how many they are, by place.
template <class T>
std::vector<int64_t> sum_tokens(const Tensor& logp, const Tensor& target, int64_t ignore_index, bool interleaved,
                                T* sums) {
  const auto* value = static_cast<const T*>(logp.const_data_ptr());
  const auto* id = static_cast<const int64_t*>(target.const_data_ptr());
  const int64_t rows = logp.size(0), tokens = logp.size(1);
  std::vector<int64_t> lengths(rows);
  for (int64_t row = 0; row < rows; ++row, value += tokens, id += tokens) {
    double sum = 0;
    int64_t length = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (id[t] == ignore_index) continue;
      sum += static_cast<double>(value[t]);
      ++length;
    }
    sums[row] = static_cast<T>(sum);
    lengths[place_of(row, rows / 2, interleaved)] = length;
  }
  return lengths;
}

// From the order of places to that of rows, times `factor`.
template <class T>
void to_rows(T* values, int64_t rows, bool interleaved, double factor) {
  const std::vector<T> placed(values, values + rows);
  for (int64_t row = 0; row < rows; ++row) {
    values[row] = static_cast<T>(static_cast<double>(placed[place_of(row, rows / 2, interleaved)]) * factor);
  }
}

template <class T>
void settle_rows(fastpref::PairHead& call, const Tensor& logp, const Tensor& target, int64_t ignore_index,
                 const std::optional<Tensor>& ref_logps, bool interleaved, bool per_token, double divisor, void* logps,
                 void* loss) {
  T* sums = static_cast<T*>(logps);
  const std::vector<int64_t> lengths = sum_tokens<T>(logp, target, ignore_index, interleaved, sums);
  const int64_t apart = interleaved ? 1 : call.pairs, stride = interleaved ? 2 : 1;
  for (int64_t side = 0; side < 2; ++side) {
    call.policy[side] = {sums + side * apart, stride};
    if (ref_logps.has_value()) {
      const int64_t between = ref_logps->stride(0);
      call.ref[side] = {static_cast<const T*>(ref_logps->const_data_ptr()) + side * apart * between, stride * between};
    }
    call.lengths[side] = per_token ? lengths.data() + side * call.pairs : nullptr;
  }
  const double sum = settle_pairs<T>(call);
  *static_cast<T*>(loss) = static_cast<T>(sum / divisor);
  to_rows(static_cast<T*>(call.rewards), 2 * call.pairs, interleaved, 1);
  to_rows(static_cast<T*>(call.slopes), 2 * call.pairs, interleaved, 1 / divisor);
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
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == logp.size(0) && target.size(1) == logp.size(1),
                  "target must have the shape of logp, got ", target.dim(), " dimensions and ", target.numel(),
                  " elements");
  STD_TORCH_CHECK(target.scalar_type() == fastpref::ScalarType::Long, "target must be int64; cast it first");
  STD_TORCH_CHECK(logp.is_contiguous() && target.is_contiguous(),
                  "logp and target must be contiguous; call .contiguous() first");
  STD_TORCH_CHECK(divisor > 0, "divisor must be greater than 0, got ", divisor);
  const int64_t rows = logp.size(0);
  auto [call, losses, rewards, slopes, means] = fastpref::linked_call(logp, "logp", rows / 2, {rows}, link, scale,
                                                                      shift, flipped, reward_scale, rewards_per_token);
  Tensor logps = torch::stable::new_empty(logp, {rows});
  if (ref_logps.has_value()) fastpref::check_column(logps, *ref_logps, "ref_logps", logp.scalar_type());
  Tensor loss = torch::stable::new_empty(logp, {});
  const bool wide = logp.scalar_type() == fastpref::ScalarType::Double;
  (wide ? settle_rows<double> : settle_rows<float>)(call, logp, target, ignore_index, ref_logps, interleaved, per_token,
                                                    divisor, logps.mutable_data_ptr(), loss.mutable_data_ptr());
  return {loss, losses, rewards, logps, slopes, means};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("pair_head", TORCH_BOX(&pair_head));
  m.impl("pair_rows", TORCH_BOX(&pair_rows));
}
