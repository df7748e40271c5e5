// SPDX-License-Identifier: Apache-2.0
// The operator library: schemas and the CPU implementations. Only torch's stable ABI is used, so one
// build serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "cpu/row_kernels.h"
#include "cpu_features.h"

namespace {

using torch::stable::Tensor;

const fastpref::cpu::RowKernels& row_kernels() {
#if defined(__x86_64__)
  switch (fastpref::cpu_capability()) {
    case fastpref::CpuCapability::avx512:
      return fastpref::cpu::row_kernels_avx512;
    case fastpref::CpuCapability::avx2:
      return fastpref::cpu::row_kernels_avx2;
    case fastpref::CpuCapability::baseline:
      break;
  }
#endif
  return fastpref::cpu::row_kernels_baseline;
}

// Rows per thread below which a second thread costs more than it brings.
int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t rows, int64_t width) {
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> exp_rows(Tensor tile, Tensor target, Tensor anchor, std::optional<Tensor> bias, double scale,
                                    double cap, std::optional<Tensor> factor, bool write, bool statistics) {
  const auto kernel = row_kernels().exp_rows[static_cast<int>(fastpref::element_of(tile, "tile"))];
  auto call = fastpref::exp_rows_call(tile, target, anchor, bias, scale, cap, factor, write);
  auto outputs = fastpref::exp_rows_outputs(call, target, anchor, statistics);
  run(kernel, call, call.tile.rows, call.tile.cols);
  return outputs;
}

void logit_grad(Tensor tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp,
                std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy,
                std::optional<Tensor> bias, double scale, double cap, std::optional<Tensor> factor) {
  const auto kernel = row_kernels().logit_grad[static_cast<int>(fastpref::element_of(tile, "tile"))];
  const auto call = fastpref::logit_grad_call(tile, target, anchor, norm, logp, grad_logp, grad_lse, grad_entropy,
                                              entropy, bias, scale, cap, factor);
  run(kernel, call, call.tile.rows, call.tile.cols);
}

std::tuple<Tensor, Tensor, Tensor> target_logits(Tensor hidden, Tensor weight, Tensor target,
                                                 std::optional<Tensor> bias, double scale, double cap) {
  const auto kernel = row_kernels().target_logits[static_cast<int>(fastpref::element_of(hidden, "hidden"))];
  const auto [call, column, raw, logit] = fastpref::target_logits_call(hidden, weight, target, bias, scale, cap);
  run(kernel, call, hidden.size(0), call.width);
  return {column, raw, logit};
}

// What settling a row takes, in columns of the other kernels.
constexpr int64_t kSettleWidth = 64;

Tensor settle_rows(std::optional<Tensor> exps, Tensor anchor, Tensor sum, Tensor offset, std::optional<Tensor> best,
                   Tensor column, Tensor raw, Tensor logit, double scale, double cap) {
  const auto element = exps.has_value() ? fastpref::element_of(*exps, "exps") : fastpref::element_of(anchor, "anchor");
  const auto [call, scores] =
      fastpref::settle_rows_call(exps, anchor, sum, offset, best, column, raw, logit, scale, cap);
  run(row_kernels().settle_rows[static_cast<int>(element)], call, call.rows, kSettleWidth);
  return scores;
}

void scale_rows(Tensor out, Tensor input, Tensor factor) {
  const auto kernel = row_kernels().scale_rows[static_cast<int>(fastpref::element_of(input, "input"))];
  const auto call = fastpref::scale_rows_call(out, input, factor);
  run(kernel, call, input.size(0), call.width);
}

Tensor divergence_rows(Tensor student, Tensor teacher, std::optional<Tensor> student_bias,
                       std::optional<Tensor> teacher_bias, double scale, double cap, std::optional<Tensor> factor,
                       int64_t kind, double beta, bool write) {
  const auto kernel = row_kernels().divergence_rows[static_cast<int>(fastpref::element_of(student, "student"))];
  const auto [call, out] = fastpref::divergence_rows_call(student, teacher, student_bias, teacher_bias, scale, cap,
                                                          factor, kind, beta, write);
  run(kernel, call, call.rows, call.cols);
  return out;
}

int64_t capability() { return static_cast<int64_t>(fastpref::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY(fastpref, m) {
  m.def(
      "exp_rows_(Tensor(a!) tile, Tensor target, Tensor anchor, Tensor? bias, float scale, float cap, Tensor? "
      "factor, bool write, bool statistics) -> (Tensor, Tensor)");
  m.def(
      "logit_grad_(Tensor(a!) tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp, Tensor? "
      "grad_lse, "
      "Tensor? grad_entropy, Tensor? entropy, Tensor? bias, float scale, float cap, Tensor? factor) -> ()");
  m.def(
      "target_logits(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float scale, float cap) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "settle_rows_(Tensor(a!)? exps, Tensor anchor, Tensor sum, Tensor offset, Tensor? best, Tensor column, Tensor "
      "raw, Tensor logit, float scale, float cap) -> Tensor");
  m.def("scale_rows_(Tensor(a!) out, Tensor input, Tensor factor) -> ()");
  m.def(
      "divergence_rows_(Tensor(a!) student, Tensor teacher, Tensor? student_bias, Tensor? teacher_bias, float scale, "
      "float cap, Tensor? factor, int kind, float beta, bool write) -> Tensor");
  m.def(
      "sequence_sums(Tensor logp, Tensor? token_weights, Tensor? mask, Tensor? order, Tensor? boundaries, "
      "bool mean) -> (Tensor, Tensor)");
  m.def(
      "pair_head(Tensor policy_chosen_logps, Tensor policy_rejected_logps, Tensor? ref_chosen_logps, "
      "Tensor? ref_rejected_logps, Tensor? chosen_lengths, Tensor? rejected_lengths, int link, float scale, "
      "float shift, float flipped, float reward_scale, bool rewards_per_token) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("exp_rows_", TORCH_BOX(&exp_rows));
  m.impl("logit_grad_", TORCH_BOX(&logit_grad));
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("settle_rows_", TORCH_BOX(&settle_rows));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
  m.impl("divergence_rows_", TORCH_BOX(&divergence_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&capability)); }
