// SPDX-License-Identifier: Apache-2.0
// Instantiates the row kernels for every element type. No header of torch here: they would be compiled once more for
// each architecture.

#include "row_kernels.cuh"
#include "row_kernels.h"

namespace fastpref::cuda {
namespace {

// Calls launch(zero) with a zero of the element type.
template <class Launch>
cudaError_t with_element(cpu::Element element, Launch launch) {
  switch (element) {
    case cpu::Element::float64:
      launch(double{});
      break;
    case cpu::Element::float32:
      launch(float{});
      break;
    case cpu::Element::bfloat16:
      launch(__nv_bfloat16{});
      break;
    case cpu::Element::float16:
      launch(__half{});
      break;
  }
  return cudaGetLastError();
}

unsigned blocks(int64_t rows) { return static_cast<unsigned>(rows); }

}  // namespace

cudaError_t launch_exp_rows(cpu::Element element, const cpu::ExpRows& call, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = call.best_index == nullptr ? exp_rows_kernel<T, false> : exp_rows_kernel<T, true>;
    kernel<<<blocks(call.tile.rows), kThreads, 0, stream>>>(call);
  });
}

cudaError_t launch_logit_grad(cpu::Element element, const cpu::LogitGrad& call, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    logit_grad_kernel<decltype(zero)><<<blocks(call.tile.rows), kThreads, 0, stream>>>(call);
  });
}

cudaError_t launch_gather_dot(cpu::Element element, const cpu::GatherDot& call, int64_t rows, int64_t vocab,
                              cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    gather_dot_kernel<decltype(zero)><<<blocks(rows), kThreads, 0, stream>>>(call, vocab);
  });
}

cudaError_t launch_scale_rows(cpu::Element element, const cpu::ScaleRows& call, int64_t rows, cudaStream_t stream) {
  return with_element(
      element, [&](auto zero) { scale_rows_kernel<decltype(zero)><<<blocks(rows), kThreads, 0, stream>>>(call); });
}

}  // namespace fastpref::cuda
