// SPDX-License-Identifier: Apache-2.0
// The operator library: schemas, argument checks, and the CPU implementations. Only torch's stable ABI is used, so one
// build serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/row_kernels.h"
#include "cpu_features.h"

namespace {

using fastpref::cpu::Element;
using torch::headeronly::ScalarType;
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

Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Element::float64;
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, got another dtype; cast it first");
  }
}

ScalarType statistics_type(Element element) {
  return element == Element::float64 ? ScalarType::Double : ScalarType::Float;
}

void check_vector(const Tensor& vector, const char* name, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == length, name, " must have shape (", length, ",), got ",
                  vector.dim(), " dimensions and ", vector.numel(), " elements");
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, " must have the statistics' dtype of the tile ",
                  "(float64 for a float64 tile, float32 otherwise; int64 for target)");
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous; call .contiguous() first");
  STD_TORCH_CHECK(vector.is_cpu(), name, " must be on the CPU, as the tile is");
}

// Rows per thread below which a second thread costs more than it brings.
int64_t grain(int64_t width) { return 1 + 32768 / (width + 1); }

const void* optional_data(const std::optional<Tensor>& vector, const char* name, int64_t length, ScalarType dtype) {
  if (!vector.has_value()) return nullptr;
  check_vector(*vector, name, length, dtype);
  return vector->const_data_ptr();
}

fastpref::cpu::Tile checked_tile(Tensor& tile, const Tensor& target) {
  STD_TORCH_CHECK(tile.dim() == 2, "tile must have shape (rows, cols), got ", tile.dim(), " dimensions");
  STD_TORCH_CHECK(tile.is_cpu(), "tile must be on the CPU for this operator");
  STD_TORCH_CHECK(tile.size(1) <= 1 || tile.stride(1) == 1, "tile must have contiguous rows, got a stride of ",
                  tile.stride(1), " between columns");
  check_vector(target, "target", tile.size(0), ScalarType::Long);
  return {tile.mutable_data_ptr(), tile.size(0), tile.size(1), tile.stride(0),
          static_cast<const int64_t*>(target.const_data_ptr())};
}

std::tuple<Tensor, Tensor> exp_rows(Tensor tile, Tensor target, Tensor anchor, std::optional<Tensor> bias, double scale,
                                    double cap, bool write, bool statistics) {
  const Element element = element_of(tile, "tile");
  const ScalarType dtype = statistics_type(element);
  fastpref::cpu::ExpRows call{};
  call.tile = checked_tile(tile, target);
  check_vector(anchor, "anchor", call.tile.rows, dtype);
  call.map = {optional_data(bias, "bias", call.tile.cols, dtype), scale, cap};
  call.anchor = anchor.const_data_ptr();
  const int64_t kinds = statistics ? fastpref::cpu::kRowSumsAll : fastpref::cpu::kRowSums;
  Tensor sums = torch::stable::new_empty(anchor, {kinds, call.tile.rows});
  Tensor best_index = torch::stable::new_empty(target, {statistics ? call.tile.rows : 0});
  call.sums = sums.mutable_data_ptr();
  call.best_index = statistics ? static_cast<int64_t*>(best_index.mutable_data_ptr()) : nullptr;
  call.write = write;
  const auto kernel = row_kernels().exp_rows[static_cast<int>(element)];
  torch::stable::parallel_for(0, call.tile.rows, grain(call.tile.cols),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {sums, best_index};
}

void logit_grad(Tensor tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp,
                std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy,
                std::optional<Tensor> bias, double scale, double cap) {
  const Element element = element_of(tile, "tile");
  const ScalarType dtype = statistics_type(element);
  fastpref::cpu::LogitGrad call{};
  call.tile = checked_tile(tile, target);
  const int64_t rows = call.tile.rows;
  check_vector(anchor, "anchor", rows, dtype);
  check_vector(norm, "norm", rows, dtype);
  check_vector(logp, "logp", rows, dtype);
  check_vector(grad_logp, "grad_logp", rows, dtype);
  STD_TORCH_CHECK(entropy.has_value() || !grad_entropy.has_value(), "entropy must come with grad_entropy, got None");
  call.map = {optional_data(bias, "bias", call.tile.cols, dtype), scale, cap};
  call.anchor = anchor.const_data_ptr();
  call.norm = norm.const_data_ptr();
  call.logp = logp.const_data_ptr();
  call.grad_logp = grad_logp.const_data_ptr();
  call.grad_lse = optional_data(grad_lse, "grad_lse", rows, dtype);
  call.grad_entropy = optional_data(grad_entropy, "grad_entropy", rows, dtype);
  call.entropy = optional_data(entropy, "entropy", rows, dtype);
  const auto kernel = row_kernels().logit_grad[static_cast<int>(element)];
  torch::stable::parallel_for(0, rows, grain(call.tile.cols),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void check_matrix(const Tensor& matrix, const char* name, int64_t width, ScalarType dtype) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(1) == width, name, " must have shape (rows, ", width, "), got ",
                  matrix.dim(), " dimensions and ", matrix.numel(), " elements");
  STD_TORCH_CHECK(matrix.scalar_type() == dtype, name, " must have the dtype of the other matrix");
  STD_TORCH_CHECK(matrix.is_cpu(), name, " must be on the CPU for this operator");
  STD_TORCH_CHECK(width <= 1 || matrix.stride(1) == 1, name, " must have contiguous rows, got a stride of ",
                  matrix.stride(1), " between columns");
}

Tensor gather_dot(Tensor hidden, Tensor weight, Tensor index) {
  const Element element = element_of(hidden, "hidden");
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have shape (rows, H), got ", hidden.dim(), " dimensions");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check_matrix(hidden, "hidden", width, hidden.scalar_type());
  check_matrix(weight, "weight", width, hidden.scalar_type());
  check_vector(index, "index", rows, ScalarType::Long);
  const auto* at = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(at[row] >= 0 && at[row] < weight.size(0), "index must be in [0, ", weight.size(0), "), got ",
                    at[row]);
  }
  Tensor out = torch::stable::new_empty(hidden, {rows}, statistics_type(element));
  const fastpref::cpu::GatherDot call{
      hidden.const_data_ptr(), weight.const_data_ptr(), hidden.stride(0), weight.stride(0), width, at,
      out.mutable_data_ptr()};
  const auto kernel = row_kernels().gather_dot[static_cast<int>(element)];
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return out;
}

void scale_rows(Tensor out, Tensor input, Tensor factor) {
  const Element element = element_of(input, "input");
  STD_TORCH_CHECK(input.dim() == 2 && out.dim() == 2 && out.size(0) == input.size(0),
                  "out and input must have one shape (rows, H), got ", out.numel(), " and ", input.numel(),
                  " elements");
  const int64_t rows = input.size(0), width = input.size(1);
  check_matrix(input, "input", width, input.scalar_type());
  check_matrix(out, "out", width, input.scalar_type());
  check_vector(factor, "factor", rows, statistics_type(element));
  const fastpref::cpu::ScaleRows call{
      input.const_data_ptr(), out.mutable_data_ptr(), input.stride(0), out.stride(0), width, factor.const_data_ptr()};
  const auto kernel = row_kernels().scale_rows[static_cast<int>(element)];
  torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

int64_t capability() { return static_cast<int64_t>(fastpref::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY(fastpref, m) {
  m.def(
      "exp_rows_(Tensor(a!) tile, Tensor target, Tensor anchor, Tensor? bias, float scale, float cap, bool write, "
      "bool statistics) -> (Tensor, Tensor)");
  m.def(
      "logit_grad_(Tensor(a!) tile, Tensor target, Tensor anchor, Tensor norm, Tensor logp, Tensor grad_logp, Tensor? "
      "grad_lse, "
      "Tensor? grad_entropy, Tensor? entropy, Tensor? bias, float scale, float cap) -> ()");
  m.def("gather_dot(Tensor hidden, Tensor weight, Tensor index) -> Tensor");
  m.def("scale_rows_(Tensor(a!) out, Tensor input, Tensor factor) -> ()");
  m.def("cpu_capability() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CPU, m) {
  m.impl("exp_rows_", TORCH_BOX(&exp_rows));
  m.impl("logit_grad_", TORCH_BOX(&logit_grad));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastpref, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&capability)); }
