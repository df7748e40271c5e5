// SPDX-License-Identifier: Apache-2.0
// The CUDA row kernels as functions of the host, a block at a time.

#include "cuda/row_kernels.cuh"

using namespace fastpref;

template <class Call>
using Kernel = void (*)(Call);

template <class Call>
void run(const Kernel<Call>* kernels, int element, const Call* call, bool backwards) {
  for (int64_t row = 0; row < call->tile.rows; ++row) {
    host::run_block(row, cuda::kThreads, backwards, [=] { kernels[element](*call); });
  }
}

extern "C" void exp_rows(int element, const cpu::ExpRows* call, bool backwards) {
  using namespace cuda;
  const Kernel<cpu::ExpRows> sums[] = {exp_rows_kernel<double, false>, exp_rows_kernel<float, false>,
                                       exp_rows_kernel<__nv_bfloat16, false>, exp_rows_kernel<__half, false>};
  const Kernel<cpu::ExpRows> all[] = {exp_rows_kernel<double, true>, exp_rows_kernel<float, true>,
                                      exp_rows_kernel<__nv_bfloat16, true>, exp_rows_kernel<__half, true>};
  run(call->best_index == nullptr ? sums : all, element, call, backwards);
}

extern "C" void logit_grad(int element, const cpu::LogitGrad* call, bool backwards) {
  using namespace cuda;
  const Kernel<cpu::LogitGrad> kernels[] = {logit_grad_kernel<double>, logit_grad_kernel<float>,
                                            logit_grad_kernel<__nv_bfloat16>, logit_grad_kernel<__half>};
  run(kernels, element, call, backwards);
}
