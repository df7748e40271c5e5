// SPDX-License-Identifier: Apache-2.0
// The operator of sums over sequences on CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "sequence_arguments.h"

namespace {

using fastpref::SequenceSums;
using torch::stable::Tensor;

#include "elements.inl"

// The scored tokens of sequence b in their order, added up in double.
template <class T>
void sum_sequence(const SequenceSums& call, int64_t b) {
  using A = typename AccumulateType<T>::type;
  const auto inside = [&](int64_t place) { return place < 0 ? 0 : place < call.tokens ? place : call.tokens; };
  const int64_t begin = call.boundaries == nullptr ? 0 : inside(call.boundaries[b]);
  const int64_t end = call.boundaries == nullptr ? call.tokens : inside(call.boundaries[b + 1]);
  const T* values = static_cast<const T*>(call.values) + b * call.values_stride;
  const T* weights = call.weights == nullptr ? nullptr : static_cast<const T*>(call.weights) + b * call.weights_stride;
  const bool* scored = call.scored == nullptr ? nullptr : call.scored + b * call.scored_stride;
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = call.order == nullptr ? i : call.order[i];
    if (token < 0 || token >= call.tokens || (scored != nullptr && !scored[token])) continue;
    const double value = load(values[token]);
    const double weight = weights == nullptr ? 1.0 : static_cast<double>(load(weights[token]));
    sum += weight == 0 ? 0 : value * weight;  // whatever the value
    ++count;
  }
  static_cast<A*>(call.sums)[b] = static_cast<A>(call.mean && count > 0 ? sum / static_cast<double>(count) : sum);
  call.counts[b] = count;
}

// Tokens per thread below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

std::tuple<Tensor, Tensor> sequence_sums(Tensor logp, std::optional<Tensor> token_weights, std::optional<Tensor> mask,
                                         std::optional<Tensor> order, std::optional<Tensor> boundaries, bool mean) {
  // In the order of cpu::Element.
  constexpr void (*kernels[fastpref::cpu::kElements])(const SequenceSums&, int64_t) = {
      sum_sequence<double>, sum_sequence<float>, sum_sequence<BFloat16>, sum_sequence<Float16>};
  const auto kernel = kernels[static_cast<int>(fastpref::element_of(logp, "logp"))];
  const auto [call, sums, counts] = fastpref::sequence_sums_call(logp, token_weights, mask, order, boundaries, mean);
  const int64_t sequences = sums.size(0);
  const int64_t grain = 1 + kGrain * sequences / (logp.numel() + 1);
  torch::stable::parallel_for(0, sequences, grain, [kernel, &call = call](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) kernel(call, b);
  });
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) { m.impl("sequence_sums", TORCH_BOX(&sequence_sums)); }
