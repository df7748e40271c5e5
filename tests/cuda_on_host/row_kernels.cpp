// SPDX-License-Identifier: Apache-2.0
// The CUDA row kernels as functions of the host, a block at a time.

#include "cuda/row_kernels.cuh"

using namespace fastpref;
using namespace fastpref::cuda;

namespace {

template <class... Arguments>
using Kernel = void (*)(Arguments...);

template <class... Arguments>
void run(const Kernel<Arguments...>* kernels, int element, int64_t rows, bool backwards, Arguments... arguments) {
  host::run_grid(rows, kThreads, backwards, [=] { kernels[element](arguments...); });
}

template <class... Arguments>
void run_clusters(const Kernel<Arguments...>* kernels, int element, int64_t rows, int blocks, bool backwards,
                  Arguments... arguments) {
  for (int64_t row = 0; row < rows; ++row) {
    host::run_cluster(row * blocks, blocks, kThreads, backwards, [=] { kernels[element](arguments...); });
  }
}

}  // namespace

namespace fastpref::cuda {
thread_local __align__(16) unsigned char staged[1 << 16];
}

extern "C" void exp_rows(int element, const cpu::ExpRows* call, bool backwards) {
  const Kernel<cpu::ExpRows> sums[] = {exp_rows_kernel<double, false>, exp_rows_kernel<float, false>,
                                       exp_rows_kernel<__nv_bfloat16, false>, exp_rows_kernel<__half, false>};
  const Kernel<cpu::ExpRows> all[] = {exp_rows_kernel<double, true>, exp_rows_kernel<float, true>,
                                      exp_rows_kernel<__nv_bfloat16, true>, exp_rows_kernel<__half, true>};
  run(call->best_index == nullptr ? sums : all, element, call->tile.rows, backwards, *call);
}

extern "C" void exp_rows_cluster(int element, const cpu::ExpRows* call, int blocks, bool backwards) {
  const Kernel<cpu::ExpRows> sums[] = {exp_rows_cluster_kernel<double, false>, exp_rows_cluster_kernel<float, false>,
                                       exp_rows_cluster_kernel<__nv_bfloat16, false>,
                                       exp_rows_cluster_kernel<__half, false>};
  const Kernel<cpu::ExpRows> all[] = {exp_rows_cluster_kernel<double, true>, exp_rows_cluster_kernel<float, true>,
                                      exp_rows_cluster_kernel<__nv_bfloat16, true>,
                                      exp_rows_cluster_kernel<__half, true>};
  run_clusters(call->best_index == nullptr ? sums : all, element, call->tile.rows, blocks, backwards, *call);
}

#ifdef FASTPREF_COUNT_ACCESSES
extern "C" void count_accesses(const void* first, int64_t count, int* reads, int* writes) {
  host::accesses = {first, count, reads, writes};
}
#endif

extern "C" void logit_grad(int element, const cpu::LogitGrad* call, bool backwards) {
  const Kernel<cpu::LogitGrad> kernels[] = {logit_grad_kernel<double>, logit_grad_kernel<float>,
                                            logit_grad_kernel<__nv_bfloat16>, logit_grad_kernel<__half>};
  run(kernels, element, call->tile.rows, backwards, *call);
}

extern "C" void target_logits(int element, const cpu::TargetLogits* call, int64_t rows, bool backwards) {
  const Kernel<cpu::TargetLogits> kernels[] = {target_logits_kernel<double>, target_logits_kernel<float>,
                                               target_logits_kernel<__nv_bfloat16>, target_logits_kernel<__half>};
  run(kernels, element, rows, backwards, *call);
}

extern "C" void settle_rows(int element, const cpu::SettleRows* call, bool backwards) {
  const Kernel<cpu::SettleRows> kernels[] = {settle_rows_kernel<double>, settle_rows_kernel<float>,
                                             settle_rows_kernel<__nv_bfloat16>, settle_rows_kernel<__half>};
  const int64_t blocks = (call->rows + kSettleThreads - 1) / kSettleThreads;
  host::run_grid(blocks, kSettleThreads, backwards, [=] { kernels[element](*call); });
}

extern "C" void scale_rows(int element, const cpu::ScaleRows* call, int64_t rows, bool backwards) {
  const Kernel<cpu::ScaleRows> kernels[] = {scale_rows_kernel<double>, scale_rows_kernel<float>,
                                            scale_rows_kernel<__nv_bfloat16>, scale_rows_kernel<__half>};
  run(kernels, element, rows, backwards, *call);
}
