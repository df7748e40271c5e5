// SPDX-License-Identifier: Apache-2.0
// Checks the operators' arguments and makes the calls of the row kernels from them, for tensors of any device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/row_kernels.h"

namespace fastpref {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor on the device of `like`. torch::stable::new_empty asks the dispatcher for the operator's name, which
// takes as long as what small operators do here.
inline Tensor uninitialised(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, device_index, &made));
  return Tensor(made);
}

inline Tensor uninitialised(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return uninitialised(like, sizes, like.scalar_type());
}

inline cpu::Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return cpu::Element::float64;
    case ScalarType::Float:
      return cpu::Element::float32;
    case ScalarType::BFloat16:
      return cpu::Element::bfloat16;
    case ScalarType::Half:
      return cpu::Element::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, got another dtype; cast it first");
  }
}

inline ScalarType statistics_type(const Tensor& tile) {
  return tile.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Data of a vector that goes with the tile or matrix `tile`.
inline const void* checked_vector(const Tensor& tile, const Tensor& vector, const char* name, int64_t length,
                                  ScalarType dtype) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == length, name, " must have shape (", length, ",), got ",
                  vector.dim(), " dimensions and ", vector.numel(), " elements");
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, " must have the statistics' dtype of the tile ",
                  "(float64 for a float64 tile, float32 otherwise; int64 for column and places)");
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous; call .contiguous() first");
  STD_TORCH_CHECK(vector.device() == tile.device(), name, " must be on the device of the tile; move it there first");
  return vector.const_data_ptr();
}

// One of each row, however shaped: a batch's own need no view.
inline const int64_t* checked_target(const Tensor& tile, const Tensor& target, int64_t rows) {
  STD_TORCH_CHECK(target.numel() == rows, "target must have shape (", rows, ",), got ", target.dim(),
                  " dimensions and ", target.numel(), " elements");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64; cast it first");
  STD_TORCH_CHECK(target.is_contiguous(), "target must be contiguous; call .contiguous() first");
  STD_TORCH_CHECK(target.device() == tile.device(), "target must be on the device of the tile; move it there first");
  return static_cast<const int64_t*>(target.const_data_ptr());
}

inline const void* checked_per_row(const Tensor& tile, const std::optional<Tensor>& vector, const char* name) {
  return vector.has_value() ? checked_vector(tile, *vector, name, tile.size(0), statistics_type(tile)) : nullptr;
}

inline cpu::LogitMap checked_map(const Tensor& tile, const std::optional<Tensor>& bias, double scale, double cap,
                                 const std::optional<Tensor>& factor, const char* name = "bias") {
  const auto type = statistics_type(tile);
  return {bias.has_value() ? checked_vector(tile, *bias, name, tile.size(1), type) : nullptr, scale, cap,
          checked_per_row(tile, factor, "factor")};
}

inline cpu::Tile checked_tile(const Tensor& tile, const Tensor& target) {
  STD_TORCH_CHECK(tile.dim() == 2, "tile must have shape (rows, cols), got ", tile.dim(), " dimensions");
  STD_TORCH_CHECK(tile.size(1) <= 1 || tile.stride(1) == 1, "tile must have contiguous rows, got a stride of ",
                  tile.stride(1), " between columns");
  const int64_t rows = tile.size(0);
  return {tile.mutable_data_ptr(), rows, tile.size(1), tile.stride(0), checked_target(tile, target, rows)};
}

// The call but for its outputs.
inline cpu::ExpRows exp_rows_call(const Tensor& tile, const Tensor& target, const Tensor& anchor,
                                  const std::optional<Tensor>& bias, double scale, double cap,
                                  const std::optional<Tensor>& factor, bool write) {
  cpu::ExpRows call{};
  call.tile = checked_tile(tile, target);
  call.map = checked_map(tile, bias, scale, cap, factor);
  call.anchor = checked_per_row(tile, anchor, "anchor");
  call.write = write;
  return call;
}

// (sums, best_index), new and uninitialised, for `call` to fill.
inline std::tuple<Tensor, Tensor> exp_rows_outputs(cpu::ExpRows& call, const Tensor& target, const Tensor& anchor,
                                                   bool statistics) {
  const int64_t rows = call.tile.rows;
  const int kinds = !statistics ? cpu::kSums : call.map.cap == 0 ? cpu::kTotal : cpu::kAllSums;
  Tensor sums = uninitialised(anchor, {kinds, rows});
  Tensor best_index = uninitialised(target, {statistics ? rows : 0});
  call.sums = sums.mutable_data_ptr();
  call.best_index = statistics ? static_cast<int64_t*>(best_index.mutable_data_ptr()) : nullptr;
  return {sums, best_index};
}

inline cpu::LogitGrad logit_grad_call(const Tensor& tile, const Tensor& target, const Tensor& anchor,
                                      const Tensor& norm, const Tensor& logp, const Tensor& grad_logp,
                                      const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_entropy,
                                      const std::optional<Tensor>& entropy, const std::optional<Tensor>& bias,
                                      double scale, double cap, const std::optional<Tensor>& factor) {
  STD_TORCH_CHECK(entropy.has_value() || !grad_entropy.has_value(), "entropy must come with grad_entropy, got None");
  cpu::LogitGrad call{};
  call.tile = checked_tile(tile, target);
  call.map = checked_map(tile, bias, scale, cap, factor);
  call.anchor = checked_per_row(tile, anchor, "anchor");
  call.norm = checked_per_row(tile, norm, "norm");
  call.logp = checked_per_row(tile, logp, "logp");
  call.grad_logp = checked_per_row(tile, grad_logp, "grad_logp");
  call.grad_lse = checked_per_row(tile, grad_lse, "grad_lse");
  call.grad_entropy = checked_per_row(tile, grad_entropy, "grad_entropy");
  call.entropy = checked_per_row(tile, entropy, "entropy");
  return call;
}

inline void check_matrix(const Tensor& matrix, const char* name, const Tensor& other) {
  const int64_t width = other.size(1);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) == width, name, " must have shape (rows, ", width, "), got ",
                  matrix.dim(), " dimensions and ", matrix.numel(), " elements");
  STD_TORCH_CHECK(matrix.scalar_type() == other.scalar_type(), name, " must have the dtype of the other matrix");
  STD_TORCH_CHECK(matrix.device() == other.device(), name, " must be on the device of the other matrix");
  STD_TORCH_CHECK(width <= 1 || matrix.stride(1) == 1, name, " must have contiguous rows, got a stride of ",
                  matrix.stride(1), " between columns");
}

// The call with (column, raw, logit), which are new.
inline std::tuple<cpu::TargetLogits, Tensor, Tensor, Tensor> target_logits_call(const Tensor& hidden,
                                                                                const Tensor& weight,
                                                                                const Tensor& target,
                                                                                const std::optional<Tensor>& bias,
                                                                                double scale, double cap) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have shape (rows, H), got ", hidden.dim(), " dimensions");
  check_matrix(hidden, "hidden", hidden);
  check_matrix(weight, "weight", hidden);
  const int64_t rows = hidden.size(0);
  const auto type = statistics_type(hidden);
  cpu::TargetLogits call{};
  call.hidden = hidden.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.hidden_stride = hidden.stride(0);
  call.weight_stride = weight.stride(0);
  call.width = hidden.size(1);
  call.vocab = weight.size(0);
  call.map = {bias.has_value() ? checked_vector(hidden, *bias, "bias", call.vocab, type) : nullptr, scale, cap};
  call.target = checked_target(hidden, target, rows);
  Tensor column = uninitialised(target, {rows});
  Tensor raw = uninitialised(hidden, {rows}, type);
  Tensor logit = uninitialised(hidden, {rows}, type);
  call.column = static_cast<int64_t*>(column.mutable_data_ptr());
  call.raw = raw.mutable_data_ptr();
  call.logit = logit.mutable_data_ptr();
  return {call, column, raw, logit};
}

// The call with its scores, which are new.
inline std::tuple<cpu::SettleRows, Tensor> settle_rows_call(const std::optional<Tensor>& exps, const Tensor& anchor,
                                                            const Tensor& sum, const Tensor& offset,
                                                            const std::optional<Tensor>& best, const Tensor& column,
                                                            const Tensor& raw, const Tensor& logit, double scale,
                                                            double cap) {
  STD_TORCH_CHECK(anchor.dim() == 1, "anchor must have shape (rows,), got ", anchor.dim(), " dimensions");
  STD_TORCH_CHECK(!exps.has_value() || exps->dim() == 2, "exps must have shape (rows, V)");
  const Tensor& like = exps.has_value() ? *exps : anchor;
  const int64_t rows = anchor.size(0);
  const auto vector = [&](const Tensor& values, const char* name) {
    return checked_vector(like, values, name, rows, statistics_type(like));
  };
  cpu::SettleRows call{};
  call.anchor = vector(anchor, "anchor");
  call.sum = vector(sum, "sum");
  call.offset = vector(offset, "offset");
  call.best = best.has_value() ? vector(*best, "best") : nullptr;
  call.column = static_cast<const int64_t*>(checked_vector(like, column, "column", rows, ScalarType::Long));
  call.raw = vector(raw, "raw");
  call.logit = vector(logit, "logit");
  call.map = {nullptr, scale, cap};
  call.rows = rows;
  if (exps.has_value()) {
    check_matrix(*exps, "exps", *exps);
    STD_TORCH_CHECK(exps->size(0) == rows, "exps must have the ", rows, " rows of anchor, got ", exps->size(0));
    call.exps = exps->mutable_data_ptr();
    call.exps_stride = exps->stride(0);
  }
  Tensor scores = uninitialised(anchor, {cpu::kRowScores, rows});
  call.scores = scores.mutable_data_ptr();
  return {call, scores};
}

// Three calls, each reading what the one before it leaves of a row.
struct ScoreRows {
  cpu::TargetLogits target;
  cpu::ExpRows exp;
  cpu::SettleRows settle;
  std::vector<int64_t> column;
};

// The calls but for their outputs; `target` names columns of `tile` and rows of `weight`.
inline ScoreRows score_rows_call(const Tensor& tile, const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                 const std::optional<Tensor>& bias, double scale, double cap, bool write) {
  ScoreRows calls{};
  calls.exp.tile = checked_tile(tile, target);
  calls.exp.map = checked_map(tile, bias, scale, cap, std::nullopt);
  calls.exp.write = write;
  const int64_t rows = calls.exp.tile.rows, cols = calls.exp.tile.cols;
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(0) == rows, "hidden must have shape (", rows, ", H), got ",
                  hidden.dim(), " dimensions and ", hidden.numel(), " elements");
  check_matrix(hidden, "hidden", hidden);
  check_matrix(weight, "weight", hidden);
  STD_TORCH_CHECK(weight.size(0) == cols, "weight must have the ", cols, " columns of tile as rows, got ",
                  weight.size(0));
  STD_TORCH_CHECK(hidden.scalar_type() == tile.scalar_type(), "hidden must have the dtype of tile");
  STD_TORCH_CHECK(hidden.device() == tile.device(), "hidden must be on the device of tile; move it there first");
  calls.column.resize(rows);
  calls.target = {
      hidden.const_data_ptr(), weight.const_data_ptr(), hidden.stride(0),    weight.stride(0), hidden.size(1), cols,
      calls.exp.map,           calls.exp.tile.target,   calls.column.data(), nullptr,          nullptr};
  calls.settle.column = calls.column.data();
  calls.settle.map = {nullptr, scale, cap, nullptr};
  calls.settle.rows = rows;
  if (write) {
    calls.settle.exps = calls.exp.tile.data;
    calls.settle.exps_stride = calls.exp.tile.row_stride;
  }
  return calls;
}

// Of the numbers without statistics: the target's product and logit, the sums, the scores, of which logp is the first.
constexpr int64_t kLogpRow = 2 + cpu::kSums;
constexpr int64_t kNumbers = kLogpRow + cpu::kRowScores;
constexpr int64_t kScaleRow = kNumbers - 1;

// (numbers, best_index), new and uninitialised, for `calls` to fill.
inline std::tuple<Tensor, Tensor> score_rows_outputs(ScoreRows& calls, const Tensor& tile, const Tensor& target,
                                                     bool statistics) {
  const int64_t rows = calls.exp.tile.rows;
  const int64_t kinds = !statistics ? cpu::kSums : calls.exp.map.cap == 0 ? cpu::kTotal : cpu::kAllSums;
  Tensor numbers = uninitialised(tile, {2 + kinds + cpu::kRowScores, rows}, statistics_type(tile));
  Tensor best_index = uninitialised(target, {statistics ? rows : 0});
  const int64_t row_bytes = rows * (statistics_type(tile) == ScalarType::Double ? 8 : 4);
  char* data = static_cast<char*>(numbers.mutable_data_ptr());
  const auto of = [&](int64_t row) { return static_cast<void*>(data + row * row_bytes); };
  calls.target.raw = of(0);
  calls.target.logit = of(1);
  calls.exp.anchor = calls.target.logit;
  calls.exp.sums = of(2);
  calls.exp.best_index = statistics ? static_cast<int64_t*>(best_index.mutable_data_ptr()) : nullptr;
  calls.settle.anchor = of(2 + cpu::kAnchor);
  calls.settle.sum = of(2 + cpu::kSum);
  calls.settle.offset = of(2 + cpu::kOffset);
  calls.settle.best = statistics ? of(2 + cpu::kBest) : nullptr;
  calls.settle.raw = calls.target.raw;
  calls.settle.logit = calls.target.logit;
  calls.settle.scores = of(2 + kinds);
  return {numbers, best_index};
}

inline cpu::ScaleRows scale_rows_call(const Tensor& out, const Tensor& input, const Tensor& factor) {
  STD_TORCH_CHECK(input.dim() == 2 && out.dim() == 2 && out.size(0) == input.size(0),
                  "out and input must have one shape (rows, H), got ", out.numel(), " and ", input.numel(),
                  " elements");
  check_matrix(input, "input", input);
  check_matrix(out, "out", input);
  cpu::ScaleRows call{};
  call.in = input.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.in_stride = input.stride(0);
  call.out_stride = out.stride(0);
  call.width = input.size(1);
  call.factor = checked_per_row(input, factor, "factor");
  return call;
}

// The call with its values, which are new.
inline std::tuple<cpu::DivergenceRows, Tensor> divergence_rows_call(const Tensor& student, const Tensor& teacher,
                                                                    const std::optional<Tensor>& student_bias,
                                                                    const std::optional<Tensor>& teacher_bias,
                                                                    double scale, double cap,
                                                                    const std::optional<Tensor>& factor, int64_t kind,
                                                                    double beta, bool write) {
  STD_TORCH_CHECK(student.dim() == 2, "student must have shape (rows, cols), got ", student.dim(), " dimensions");
  check_matrix(student, "student", student);
  check_matrix(teacher, "teacher", student);
  STD_TORCH_CHECK(teacher.size(0) == student.size(0), "teacher must have the ", student.size(0),
                  " rows of the student, got ", teacher.size(0));
  STD_TORCH_CHECK(kind >= 0 && kind < cpu::kDivergences,
                  "kind must be 0 (forward_kl), 1 (reverse_kl), 2 (jsd), 3 (tv), 4 (bhattacharyya) or 5 (cosine), got ",
                  kind);
  cpu::DivergenceRows call{};
  call.kind = static_cast<cpu::Divergence>(kind);
  STD_TORCH_CHECK(call.kind != cpu::Divergence::jsd || (beta > 0 && beta < 1), "beta must be in (0, 1) for jsd, got ",
                  beta);
  call.student = student.mutable_data_ptr();
  call.teacher = teacher.const_data_ptr();
  call.rows = student.size(0);
  call.cols = student.size(1);
  call.student_stride = student.stride(0);
  call.teacher_stride = teacher.stride(0);
  call.student_map = checked_map(student, student_bias, scale, cap, factor, "student_bias");
  call.teacher_map = checked_map(teacher, teacher_bias, scale, cap, factor, "teacher_bias");
  call.beta = beta;
  call.write = write;
  Tensor out = uninitialised(student, {call.rows}, statistics_type(student));
  call.out = out.mutable_data_ptr();
  return {call, out};
}

}  // namespace fastpref
