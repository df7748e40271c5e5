// SPDX-License-Identifier: Apache-2.0
// The operators of squared errors on CPU: of predictions (B, S, R), S pieces of R elements a sample.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/chosen.h"
#include "cpu/row_kernels.h"

namespace {

using fastpref::ScalarType;
using fastpref::cpu::Kept;
using fastpref::cpu::Pieces;
using torch::stable::Tensor;

// `values` is shaped like `model`, and on its device.
void check_shape(const Tensor& model, const Tensor& values, const char* name) {
  bool same = values.dim() == 3;
  for (int64_t i = 0; same && i < 3; ++i) same = values.size(i) == model.size(i);
  STD_TORCH_CHECK(same, name, " must be (B, S, R) and shaped like model, got ", values.dim(), " dimensions and ",
                  values.numel(), " elements");
  STD_TORCH_CHECK(values.device() == model.device(), name, " must be on the device of model; move it there first");
}

Pieces checked_pieces(const Tensor& model, const Tensor& values, const char* name) {
  check_shape(model, values, name);
  STD_TORCH_CHECK(values.size(2) <= 1 || values.stride(2) == 1, name, " must have contiguous pieces, got a stride of ",
                  values.stride(2), " between elements");
  return {const_cast<void*>(values.const_data_ptr()), fastpref::element_of(values, name), values.stride(0),
          values.stride(1)};
}

Kept checked_kept(const Tensor& model, const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return {};
  check_shape(model, *mask, "mask");
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool, got another dtype; compare it with 0");
  return {static_cast<const bool*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1), mask->stride(2)};
}

int64_t parts_of(const Tensor& model) {
  const int64_t size = model.size(1) * model.size(2);
  return (size + fastpref::cpu::kErrorPart - 1) / fastpref::cpu::kErrorPart;
}

// Parts per thread below which a second thread costs more than it brings.
int64_t grain(const Tensor& model) {
  const int64_t size = model.size(1) * model.size(2);
  return 1 +
         2 * fastpref::cpu::kErrorPart / (1 + (size < fastpref::cpu::kErrorPart ? size : fastpref::cpu::kErrorPart));
}

const fastpref::cpu::RowKernels& kernels_in(bool exact) {
  return fastpref::cpu::row_kernels(exact ? fastpref::cpu::Element::float64 : fastpref::cpu::Element::float32);
}

template <class T>
void add_parts(const std::vector<double>& sums, int64_t parts, double divisor, int k, Tensor& out) {
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < out.numel(); ++b) {
    double total = 0;
    for (int64_t i = b * parts; i < (b + 1) * parts; ++i) total += sums[i * fastpref::cpu::kErrorSums + k];
    to[b] = static_cast<T>(total / divisor);
  }
}

std::tuple<Tensor, Tensor, Tensor> squared_errors(Tensor model, std::optional<Tensor> reference, Tensor target,
                                                  std::optional<Tensor> mask, double divisor) {
  fastpref::cpu::SquaredErrors call{};
  call.model = checked_pieces(model, model, "model");
  call.target = checked_pieces(model, target, "target");
  if (reference.has_value()) call.reference = checked_pieces(model, *reference, "reference");
  call.kept = checked_kept(model, mask);
  call.pieces = model.size(1);
  call.length = model.size(2);
  call.parts = parts_of(model);
  const int64_t samples = model.size(0), units = samples * call.parts;
  std::vector<double> sums(units * fastpref::cpu::kErrorSums);
  call.sums = sums.data();
  const auto wide = [](const Tensor& one) { return one.scalar_type() == ScalarType::Double; };
  const bool exact = wide(model) || wide(target) || (reference.has_value() && wide(*reference));
  const auto kernel = kernels_in(exact).squared_errors;
  torch::stable::parallel_for(0, units, grain(model), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  const auto result = [&](int k, bool there) {
    Tensor out = fastpref::uninitialised(model, {there ? samples : 0}, exact ? ScalarType::Double : ScalarType::Float);
    (exact ? add_parts<double> : add_parts<float>)(sums, call.parts, divisor, k, out);
    return out;
  };
  return {result(0, reference.has_value()), result(1, true), result(2, reference.has_value())};
}

void error_gradient(Tensor out, Tensor model, Tensor target, std::optional<Tensor> mask, Tensor factor) {
  fastpref::cpu::ErrorGradient call{};
  call.model = checked_pieces(model, model, "model");
  call.target = checked_pieces(model, target, "target");
  call.out = checked_pieces(model, out, "out");
  call.out.data = out.mutable_data_ptr();
  STD_TORCH_CHECK(call.out.element == call.model.element, "out must have the dtype of model, got another");
  call.kept = checked_kept(model, mask);
  call.pieces = model.size(1);
  call.length = model.size(2);
  call.parts = parts_of(model);
  const auto type = factor.scalar_type();
  const bool exact = type == ScalarType::Double;
  STD_TORCH_CHECK(exact || type == ScalarType::Float, "factor must be float32 or float64, got another dtype");
  STD_TORCH_CHECK(exact || (model.scalar_type() != ScalarType::Double && target.scalar_type() != ScalarType::Double),
                  "factor must be float64 where a prediction is, got float32; cast it first");
  STD_TORCH_CHECK(factor.device() == model.device(), "factor must be on the device of model; move it there first");
  STD_TORCH_CHECK(factor.dim() == 1 && factor.size(0) == model.size(0) && factor.is_contiguous(),
                  "factor must be contiguous, of shape (", model.size(0), ",), got ", factor.dim(), " dimensions and ",
                  factor.numel(), " elements");
  call.factor = factor.const_data_ptr();
  const auto kernel = kernels_in(exact).error_gradient;
  torch::stable::parallel_for(0, model.size(0) * call.parts, grain(model),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("squared_errors", TORCH_BOX(&squared_errors));
  m.impl("error_gradient_", TORCH_BOX(&error_gradient));
}
