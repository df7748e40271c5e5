// SPDX-License-Identifier: Apache-2.0
// Instantiates the row kernels for every element type. No header of torch here: they would be compiled once more for
// each architecture.

#include "row_kernels.cuh"
#include "row_kernels.h"

namespace fastpref::cuda {
namespace {

template <class T>
void exp_rows(const cpu::ExpRows& call, cudaStream_t stream) {
  const auto kernel = call.best_index == nullptr ? exp_rows_kernel<T, false> : exp_rows_kernel<T, true>;
  kernel<<<static_cast<unsigned>(call.tile.rows), kThreads, 0, stream>>>(call);
}

template <class T>
void logit_grad(const cpu::LogitGrad& call, cudaStream_t stream) {
  logit_grad_kernel<T><<<static_cast<unsigned>(call.tile.rows), kThreads, 0, stream>>>(call);
}

}  // namespace

cudaError_t launch_exp_rows(cpu::Element element, const cpu::ExpRows& call, cudaStream_t stream) {
  switch (element) {
    case cpu::Element::float64:
      exp_rows<double>(call, stream);
      break;
    case cpu::Element::float32:
      exp_rows<float>(call, stream);
      break;
    case cpu::Element::bfloat16:
      exp_rows<__nv_bfloat16>(call, stream);
      break;
    case cpu::Element::float16:
      exp_rows<__half>(call, stream);
      break;
  }
  return cudaGetLastError();
}

cudaError_t launch_logit_grad(cpu::Element element, const cpu::LogitGrad& call, cudaStream_t stream) {
  switch (element) {
    case cpu::Element::float64:
      logit_grad<double>(call, stream);
      break;
    case cpu::Element::float32:
      logit_grad<float>(call, stream);
      break;
    case cpu::Element::bfloat16:
      logit_grad<__nv_bfloat16>(call, stream);
      break;
    case cpu::Element::float16:
      logit_grad<__half>(call, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace fastpref::cuda
