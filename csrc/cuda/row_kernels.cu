// SPDX-License-Identifier: Apache-2.0
// Instantiates the row kernels for every element type. No header of torch here: they would be compiled once more for
// each architecture.

#include "row_kernels.cuh"
#include "row_kernels.h"

namespace fastpref::cuda {
namespace {

// Answers launch(zero) with a zero of the element type.
template <class Launch>
cudaError_t with_element(cpu::Element element, Launch launch) {
  switch (element) {
    case cpu::Element::float64:
      return launch(double{});
    case cpu::Element::float32:
      return launch(float{});
    case cpu::Element::bfloat16:
      return launch(__nv_bfloat16{});
    case cpu::Element::float16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

unsigned blocks(int64_t rows) { return static_cast<unsigned>(rows); }

// What a block is given of a row that it shares. Two blocks have the registers of a multiprocessor between them.
constexpr int kStagedBytes = 64 << 10;
constexpr int kMostStagedBytes = 96 << 10;
constexpr int kMostBlocks = 8;  // of a cluster that runs on every chip with clusters

// How many blocks share a row of `call`; 1: it is short, too long, or there are no clusters.
template <class T>
int blocks_of_row(const cpu::ExpRows& call, const void* kernel) {
  const int cols = static_cast<int>(call.tile.cols);
  const auto bytes = [&](int blocks) { return staged_bytes<T>(columns_of_block(cols, blocks)); };
  int blocks = 1;
  while (blocks < kMostBlocks && bytes(blocks) > kStagedBytes) blocks *= 2;
  if (blocks == 1 || bytes(blocks) > kMostStagedBytes || call.tile.rows > kMostRows / blocks) return 1;
  // Compiled for less, also where it runs on more, the kernel is empty.
  cudaFuncAttributes attributes;
  const bool there = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  return there ? blocks : 1;
}

template <class T>
struct ClusterLaunch {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(const cpu::ExpRows& call, int blocks_of_row, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks_of_row), 1, 1};
    config.gridDim = blocks(call.tile.rows * blocks_of_row);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = staged_bytes<T>(columns_of_block(static_cast<int>(call.tile.cols), blocks_of_row));
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }

  // Whether the device, or the part of it that this process may use, can hold one cluster.
  bool fits(void (*kernel)(cpu::ExpRows)) const {
    int clusters = 0;
    // One value for all calls: this is the kernel's state, which other threads see.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostStagedBytes) == cudaSuccess &&
           cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
  }
};

}  // namespace

cudaError_t launch_exp_rows(cpu::Element element, const cpu::ExpRows& call, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    using T = decltype(zero);
    const bool statistics = call.best_index != nullptr;
    const auto of_cluster = statistics ? exp_rows_cluster_kernel<T, true> : exp_rows_cluster_kernel<T, false>;
    const int of_row = blocks_of_row<T>(call, reinterpret_cast<const void*>(of_cluster));
    if (of_row > 1) {
      const ClusterLaunch<T> launch(call, of_row, stream);
      if (launch.fits(of_cluster)) return cudaLaunchKernelEx(&launch.config, of_cluster, call);
    }
    // What a question above left behind is not this launch's error.
    (void)cudaGetLastError();
    const auto kernel = statistics ? exp_rows_kernel<T, true> : exp_rows_kernel<T, false>;
    kernel<<<blocks(call.tile.rows), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

cudaError_t launch_logit_grad(cpu::Element element, const cpu::LogitGrad& call, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    logit_grad_kernel<decltype(zero)><<<blocks(call.tile.rows), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

cudaError_t launch_target_logits(cpu::Element element, const cpu::TargetLogits& call, int64_t rows,
                                 cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    target_logits_kernel<decltype(zero)><<<blocks(rows), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

cudaError_t launch_settle_rows(cpu::Element element, const cpu::SettleRows& call, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    const int64_t full = (call.rows + kSettleThreads - 1) / kSettleThreads;
    settle_rows_kernel<decltype(zero)><<<blocks(full), kSettleThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

cudaError_t launch_scale_rows(cpu::Element element, const cpu::ScaleRows& call, int64_t rows, cudaStream_t stream) {
  return with_element(element, [&](auto zero) {
    scale_rows_kernel<decltype(zero)><<<blocks(rows), kThreads, 0, stream>>>(call);
    return cudaGetLastError();
  });
}

}  // namespace fastpref::cuda
