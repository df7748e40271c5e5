// SPDX-License-Identifier: Apache-2.0
// The operator of sums over sequences, which is on CUDA only: elsewhere fastpref/sequences/sums.py adds up with torch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "launch.cuh"
#include "sequence_sums.h"

namespace {

using fastpref::ScalarType;
using torch::stable::Tensor;

// Checks a tensor with one element a token.
void check_per_token(const Tensor& logp, const Tensor& values, const char* name) {
  bool same = values.dim() == logp.dim();
  for (int64_t i = 0; same && i < logp.dim(); ++i) same = values.size(i) == logp.size(i);
  STD_TORCH_CHECK(same, name, " must be shaped like logp, got ", values.dim(), " dimensions and ", values.numel(),
                  " elements");
  STD_TORCH_CHECK(values.device() == logp.device(), name, " must be on the device of logp; move it there first");
  const int64_t last = values.dim() - 1;
  STD_TORCH_CHECK(values.size(last) <= 1 || values.stride(last) == 1, name, " must have contiguous rows, got a stride ",
                  "of ", values.stride(last), " between tokens; call .contiguous() first");
}

const int64_t* checked_indices(const Tensor& logp, const Tensor& indices, const char* name) {
  STD_TORCH_CHECK(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long && indices.is_contiguous(), name,
                  " must be one contiguous row of int64, got ", indices.dim(), " dimensions or another dtype");
  STD_TORCH_CHECK(indices.device() == logp.device(), name, " must be on the device of logp; move it there first");
  return static_cast<const int64_t*>(indices.const_data_ptr());
}

std::tuple<Tensor, Tensor> sequence_sums(Tensor logp, std::optional<Tensor> token_weights, std::optional<Tensor> mask,
                                         std::optional<Tensor> order, std::optional<Tensor> boundaries, bool mean) {
  const bool packed = boundaries.has_value();
  const auto element = fastpref::element_of(logp, "logp");
  STD_TORCH_CHECK(logp.dim() == (packed ? 1 : 2), "logp must be (N,) with boundaries and (B, T) without, got ",
                  logp.dim(), " dimensions");
  check_per_token(logp, logp, "logp");
  const auto stride = [&](const Tensor& values) { return packed ? 0 : values.stride(0); };
  fastpref::cuda::SequenceSums call{};
  call.values = logp.const_data_ptr();
  call.values_stride = stride(logp);
  call.tokens = logp.size(logp.dim() - 1);
  call.mean = mean;
  if (token_weights.has_value()) {
    check_per_token(logp, *token_weights, "token_weights");
    call.weights = token_weights->const_data_ptr();
    call.weights_stride = stride(*token_weights);
    STD_TORCH_CHECK(token_weights->scalar_type() == logp.scalar_type(),
                    "token_weights must have the dtype of logp, got another; cast both to float64");
  }
  if (mask.has_value()) {
    check_per_token(logp, *mask, "mask");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool, got another dtype; compare it with 0");
    call.scored = static_cast<const bool*>(mask->const_data_ptr());
    call.scored_stride = stride(*mask);
  }
  if (order.has_value()) {
    STD_TORCH_CHECK(packed && order->numel() == logp.numel(), "order must be (N,), and come with boundaries, got ",
                    order->numel(), " elements");
    call.order = checked_indices(logp, *order, "order");
  }
  if (packed) {
    call.boundaries = checked_indices(logp, *boundaries, "boundaries");
    STD_TORCH_CHECK(boundaries->numel() > 0, "boundaries must be (B + 1,), got no elements");
  }
  const int64_t sequences = packed ? boundaries->numel() - 1 : logp.size(0);
  Tensor sums = fastpref::uninitialised(logp, {sequences}, fastpref::statistics_type(logp));
  Tensor counts = fastpref::uninitialised(logp, {sequences}, ScalarType::Long);
  call.sums = sums.mutable_data_ptr();
  call.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  fastpref::cuda::on_device_of(sums, [&](cudaStream_t stream) {
    return fastpref::cuda::launch_sequence_sums(element, call, sequences, stream);
  });
  return {sums, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CUDA, m) { m.impl("sequence_sums", TORCH_BOX(&sequence_sums)); }
