// SPDX-License-Identifier: Apache-2.0
// The operator library: schemas, and the CPU implementations of the operators of rows. Only torch's stable ABI is used,
// so one build serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "cpu/chosen.h"
#include "cpu/row_kernels.h"
#include "cpu_features.h"

namespace {

using torch::stable::Tensor;

using fastpref::cpu::row_kernels;

// Rows per thread below which a second thread costs more than it brings.
int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t rows, int64_t width) {
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> exp_rows(Tensor tile, Tensor target, Tensor anchor, std::optional<Tensor> bias, double scale,
                                    double cap, std::optional<Tensor> factor, bool write, bool statistics) {
  const auto kernel = row_kernels(fastpref::element_of(tile, "tile")).exp_rows;
  auto call = fastpref::exp_rows_call(tile, target, anchor, bias, scale, cap, factor, write);
  auto outputs = fastpref::exp_rows_outputs(call, target, anchor, statistics);
  run(kernel, call, call.tile.rows, call.tile.cols);
  return outputs;
}

void logit_grad(Tensor tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp,
                std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy,
                std::optional<Tensor> bias, double scale, double cap, std::optional<Tensor> factor) {
  const auto kernel = row_kernels(fastpref::element_of(tile, "tile")).logit_grad;
  const auto call = fastpref::logit_grad_call(tile, target, anchor, norm, logp, grad_logp, grad_lse, grad_entropy,
                                              entropy, bias, scale, cap, factor);
  run(kernel, call, call.tile.rows, call.tile.cols);
}

std::tuple<Tensor, Tensor, Tensor> target_logits(Tensor hidden, Tensor weight, Tensor target,
                                                 std::optional<Tensor> bias, double scale, double cap) {
  const auto kernel = row_kernels(fastpref::element_of(hidden, "hidden")).target_logits;
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
  run(row_kernels(element).settle_rows, call, call.rows, kSettleWidth);
  return scores;
}

// target_logits, exp_rows and settle_rows, of products whose every column is in the tile. Of each row, one after the
// other: the target's product and logit, the sums, the scores.
std::tuple<Tensor, Tensor> score_rows(Tensor tile, Tensor hidden, Tensor weight, Tensor target,
                                      std::optional<Tensor> bias, double scale, double cap, bool write,
                                      bool statistics) {
  fastpref::ScoreRows calls = fastpref::score_rows_call(tile, hidden, weight, target, bias, scale, cap, write);
  auto outputs = fastpref::score_rows_outputs(calls, tile, target, statistics);
  const auto& kernels = row_kernels(fastpref::element_of(tile, "tile"));
  const int64_t rows = calls.exp.tile.rows, cols = calls.exp.tile.cols;
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    kernels.target_logits(calls.target, begin, end);
    kernels.exp_rows(calls.exp, begin, end);
    kernels.settle_rows(calls.settle, begin, end);
  });
  return outputs;
}

const int64_t* checked_places(const Tensor& like, const Tensor& places) {
  const void* data = fastpref::checked_vector(like, places, "places", places.numel(), fastpref::ScalarType::Long);
  return static_cast<const int64_t*>(data);
}

int64_t checked_place(int64_t place, int64_t total) {
  STD_TORCH_CHECK(place >= 0 && place < total, "places must be in [0, ", total, "), got ", place);
  return place;
}

void check_vector(const Tensor& values, const char* name) {
  STD_TORCH_CHECK(values.dim() == 1, name, " must have shape (rows,), got ", values.dim(), " dimensions");
  fastpref::checked_vector(values, values, name, values.size(0), values.scalar_type());
}

// The targets at `places`, or all.
Tensor targets_at(const Tensor& target, const std::optional<Tensor>& places) {
  if (!places.has_value()) return target;
  const int64_t* place = checked_places(target, *places);
  const int64_t rows = places->size(0), total = target.numel();
  Tensor out = fastpref::uninitialised(target, {rows});
  const auto* from = static_cast<const int64_t*>(target.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < rows; ++i) to[i] = from[checked_place(place[i], total)];
  return out;
}

// `rows` values of T copied to `places` of `total`, 0 elsewhere, or as they are.
template <class T>
void spread(const void* rows, const std::optional<Tensor>& places, Tensor& out) {
  const auto* from = static_cast<const T*>(rows);
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t total = out.numel();
  if (!places.has_value()) {
    std::copy(from, from + total, to);
    return;
  }
  std::fill(to, to + total, T(0));
  const auto* place = static_cast<const int64_t*>(places->const_data_ptr());
  for (int64_t i = 0; i < places->size(0); ++i) to[place[i]] = from[i];
}

// score_rows without statistics, of rows that lie at `places` of a batch: log-probabilities like the batch's target, 0
// elsewhere, and the numbers of the rows.
std::tuple<Tensor, Tensor> score_batch(Tensor tile, Tensor hidden, Tensor weight, Tensor target,
                                       std::optional<Tensor> places, std::optional<Tensor> bias, double scale,
                                       double cap, bool write) {
  STD_TORCH_CHECK(target.scalar_type() == fastpref::ScalarType::Long, "target must be int64; cast it first");
  STD_TORCH_CHECK(target.is_contiguous(), "target must be contiguous; call .contiguous() first");
  const Tensor own = targets_at(target, places);
  auto [numbers, none] = score_rows(tile, hidden, weight, own, bias, scale, cap, write, false);
  const auto type = fastpref::statistics_type(tile);
  Tensor logp = fastpref::uninitialised(target, target.sizes(), type);
  const bool wide = type == fastpref::ScalarType::Double;
  const int64_t at = fastpref::kLogpRow * own.numel();
  if (wide) {
    spread<double>(static_cast<const double*>(numbers.const_data_ptr()) + at, places, logp);
  } else {
    spread<float>(static_cast<const float*>(numbers.const_data_ptr()) + at, places, logp);
  }
  return {logp, numbers};
}

bool is_wide(const Tensor& gradient) {
  const auto type = gradient.scalar_type();
  STD_TORCH_CHECK(type == fastpref::ScalarType::Float || type == fastpref::ScalarType::Double,
                  "gradient must be float32 or float64, got another dtype; cast it first");
  return type == fastpref::ScalarType::Double;
}

// The places of values other than `from`, and how many there are; no places where all values are.
template <class T>
std::tuple<Tensor, int64_t> places_other_than(T from, const Tensor& values) {
  const auto* data = static_cast<const T*>(values.const_data_ptr());
  const int64_t total = values.numel();
  int64_t count = 0;
  for (int64_t i = 0; i < total; ++i) count += data[i] != from;
  Tensor places = fastpref::uninitialised(values, {count == total ? 0 : count}, fastpref::ScalarType::Long);
  if (count < total) {
    auto* next = static_cast<int64_t*>(places.mutable_data_ptr());
    for (int64_t i = 0; i < total; ++i) {
      if (data[i] != from) *next++ = i;
    }
  }
  return {places, count};
}

std::tuple<Tensor, int64_t> scored_places(Tensor target, int64_t ignore_index) {
  fastpref::checked_target(target, target, target.numel());
  return places_other_than<int64_t>(ignore_index, target);
}

std::tuple<Tensor, int64_t> nonzero_places(Tensor gradient) {
  check_vector(gradient, "gradient");
  const bool wide = is_wide(gradient);
  return wide ? places_other_than<double>(0, gradient) : places_other_than<float>(0, gradient);
}

// Of each row of `out`: -rate gradient scale, of the gradient at its place, which lies anyhow, such as that of a sum.
// Returns how many of these gradients are not 0.
template <class T>
int64_t fill_factors(const Tensor& gradient, const int64_t* place, const void* scale, double rate, Tensor& out) {
  const T* g = static_cast<const T*>(gradient.const_data_ptr());
  const T* s = static_cast<const T*>(scale);
  T* factor = static_cast<T*>(out.mutable_data_ptr());
  const auto sizes = gradient.sizes(), strides = gradient.strides();
  const bool contiguous = gradient.is_contiguous();
  const int64_t total = gradient.numel(), rows = out.size(0);
  int64_t active = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t rest = place == nullptr ? i : checked_place(place[i], total);
    int64_t offset = contiguous ? rest : 0;
    for (size_t d = contiguous ? 0 : sizes.size(); d-- > 0; rest /= sizes[d]) offset += rest % sizes[d] * strides[d];
    // A row without upstream gradient gets none, whatever it holds.
    factor[i] = g[offset] == 0 ? T(0) : static_cast<T>(-rate) * g[offset] * s[i];
    active += g[offset] != 0;
  }
  return active;
}

Tensor gradient_factors(Tensor gradient, Tensor scale, double rate) {
  check_vector(gradient, "gradient");
  const bool wide = is_wide(gradient);
  const int64_t rows = gradient.size(0);
  const void* scales = fastpref::checked_vector(gradient, scale, "scale", rows, gradient.scalar_type());
  Tensor out = fastpref::uninitialised(gradient, {rows});
  (wide ? fill_factors<double> : fill_factors<float>)(gradient, nullptr, scales, rate, out);
  return out;
}

// The size of `matrix` (..., H) before its last dimension.
int64_t rows_of(const Tensor& matrix) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < matrix.dim(); ++d) rows *= matrix.size(d);
  return rows;
}

// Of the rows at `places` of a batch, or all: their gradient_factors by the `numbers` of score_batch_, these times
// `rows`, and how many gradients are not 0; where some are, no rows, which the caller will choose. They are the
// batch's, or where the places are fewer those at the places alone.
std::tuple<Tensor, Tensor, int64_t> gradient_rows(Tensor gradient, Tensor numbers, Tensor rows,
                                                  std::optional<Tensor> places, double rate) {
  const auto kernel = row_kernels(fastpref::element_of(rows, "rows")).scale_rows;
  const auto type = fastpref::statistics_type(rows);
  STD_TORCH_CHECK(gradient.scalar_type() == type, "gradient must have the statistics' dtype of rows; cast it first");
  STD_TORCH_CHECK(rows.dim() > 0 && rows.is_contiguous(), "rows must have shape (..., H) and be contiguous");
  const int64_t total = gradient.numel(), count = places.has_value() ? places->numel() : total;
  const int64_t width = rows.size(rows.dim() - 1), given = rows_of(rows);
  STD_TORCH_CHECK(given == count || given == total, "rows must be the ", total, " of gradient or the ", count,
                  " at places, got ", given);
  STD_TORCH_CHECK(numbers.dim() == 2 && numbers.size(0) == fastpref::kNumbers && numbers.size(1) == count,
                  "numbers must have shape (", fastpref::kNumbers, ", ", count, "), got ", numbers.dim(),
                  " dimensions and ", numbers.numel(), " elements");
  STD_TORCH_CHECK(numbers.scalar_type() == type && numbers.is_contiguous(),
                  "numbers must have the dtype of gradient and be contiguous");
  const int64_t* place = places.has_value() ? checked_places(gradient, *places) : nullptr;
  Tensor factor = fastpref::uninitialised(gradient, {count});
  const bool wide = type == fastpref::ScalarType::Double;
  const char* scales =
      static_cast<const char*>(numbers.const_data_ptr()) + fastpref::kScaleRow * count * (wide ? 8 : 4);
  const int64_t active = (wide ? fill_factors<double> : fill_factors<float>)(gradient, place, scales, rate, factor);
  if (active != count) return {factor, fastpref::uninitialised(rows, {0, width}), active};
  Tensor scaled = fastpref::uninitialised(rows, {count, width});
  fastpref::cpu::ScaleRows call{rows.const_data_ptr(),  scaled.mutable_data_ptr(), width, width, width,
                                factor.const_data_ptr()};
  if (given == total) call.from = place;
  run(kernel, call, count, width);
  return {factor, scaled, active};
}

// `factor` times `rows` at `places` of `out` (..., H), which are not its own, 0 elsewhere; no place comes twice.
void spread_rows(Tensor out, Tensor rows, Tensor factor, Tensor places) {
  const auto element = fastpref::element_of(rows, "rows");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "rows must have shape (rows, H) and be contiguous");
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == rows.scalar_type(),
                  "out must have the dtype of rows and be contiguous");
  const int64_t count = rows.size(0), width = rows.size(1), total = rows_of(out);
  STD_TORCH_CHECK(out.dim() > 0 && out.size(out.dim() - 1) == width, "out must have shape (..., ", width, "), got ",
                  out.dim(), " dimensions and ", out.numel(), " elements");
  STD_TORCH_CHECK(rows.numel() == 0 || out.const_data_ptr() != rows.const_data_ptr(), "out must not be rows");
  const int64_t* place = checked_places(rows, places);
  STD_TORCH_CHECK(places.size(0) == count, "places must be ", count, ", got ", places.size(0));
  for (int64_t i = 0; i < count; ++i) checked_place(place[i], total);
  fastpref::cpu::ScaleRows call{rows.const_data_ptr(),
                                out.mutable_data_ptr(),
                                width,
                                width,
                                width,
                                fastpref::checked_per_row(rows, factor, "factor")};
  call.to = place;
  std::memset(call.out, 0, out.numel() * out.element_size());
  run(row_kernels(element).scale_rows, call, count, width);
}

void scale_rows(Tensor out, Tensor input, Tensor factor) {
  const auto kernel = row_kernels(fastpref::element_of(input, "input")).scale_rows;
  const auto call = fastpref::scale_rows_call(out, input, factor);
  run(kernel, call, input.size(0), call.width);
}

Tensor divergence_rows(Tensor student, Tensor teacher, std::optional<Tensor> student_bias,
                       std::optional<Tensor> teacher_bias, double scale, double cap, std::optional<Tensor> factor,
                       int64_t kind, double beta, bool write) {
  const auto kernel = row_kernels(fastpref::element_of(student, "student")).divergence_rows;
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
  m.def(
      "score_rows_(Tensor(a!) tile, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float scale, float cap, "
      "bool write, bool statistics) -> (Tensor, Tensor)");
  m.def(
      "score_batch_(Tensor(a!) tile, Tensor hidden, Tensor weight, Tensor target, Tensor? places, Tensor? bias, float "
      "scale, float cap, bool write) -> (Tensor, Tensor)");
  m.def("gradient_factors(Tensor gradient, Tensor scale, float rate) -> Tensor");
  m.def(
      "gradient_rows(Tensor gradient, Tensor numbers, Tensor rows, Tensor? places, float rate) -> (Tensor, Tensor, "
      "int)");
  m.def("spread_rows_(Tensor(a!) out, Tensor rows, Tensor factor, Tensor places) -> ()");
  m.def("scored_places(Tensor target, int ignore_index) -> (Tensor, int)");
  m.def("nonzero_places(Tensor gradient) -> (Tensor, int)");
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
  m.def(
      "pair_rows(Tensor logp, Tensor target, int ignore_index, Tensor? ref_logps, bool interleaved, bool per_token, "
      "float divisor, int link, float scale, float shift, float flipped, float reward_scale, bool rewards_per_token) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "squared_errors(Tensor model, Tensor? reference, Tensor target, Tensor? mask, float divisor) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("error_gradient_(Tensor(a!) out, Tensor model, Tensor target, Tensor? mask, Tensor factor) -> ()");
  m.def("cpu_capability() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("exp_rows_", TORCH_BOX(&exp_rows));
  m.impl("logit_grad_", TORCH_BOX(&logit_grad));
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("settle_rows_", TORCH_BOX(&settle_rows));
  m.impl("score_rows_", TORCH_BOX(&score_rows));
  m.impl("score_batch_", TORCH_BOX(&score_batch));
  m.impl("gradient_factors", TORCH_BOX(&gradient_factors));
  m.impl("gradient_rows", TORCH_BOX(&gradient_rows));
  m.impl("spread_rows_", TORCH_BOX(&spread_rows));
  m.impl("scored_places", TORCH_BOX(&scored_places));
  m.impl("nonzero_places", TORCH_BOX(&nonzero_places));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
  m.impl("divergence_rows_", TORCH_BOX(&divergence_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&capability)); }
