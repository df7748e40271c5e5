// SPDX-License-Identifier: Apache-2.0
// The threads that share a row: a block, or on sm_90 and newer a cluster of blocks. Both combine values over all their
// threads, with the same bits in every thread and in every run.
#pragma once

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTPREF_CLUSTERS
#endif

#ifdef FASTPREF_CLUSTERS
#include <cooperative_groups.h>
#endif

#include "elements.cuh"

namespace fastpref::cuda {

struct Columns {
  int first, count;
};

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Largest {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return larger(a, b);
  }
};
struct Smallest {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

// The values of all threads combined, in every thread. Each exchange combines the same two values on both sides and the
// operations commute, so all threads hold the same bits, and the same ones in every run.
template <class V, class Combine>
__device__ V block_reduce(V value, Combine combine) {
  static_assert(kThreads % kWarp == 0 && kThreads / kWarp <= kWarp, "one warp combines the warps");
  constexpr int kWarps = kThreads / kWarp;
  __shared__ V of_warp[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  // An earlier reduction may still be reading: overwritten now, some threads would combine values of both.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  // Lanes beyond the warps repeat them, and the exchanges stay among kWarps neighbours.
  value = of_warp[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

struct Block {
  __device__ Columns share(int cols) const { return {0, cols}; }

  __device__ bool first_thread() const { return threadIdx.x == 0; }

  template <class V, class Combine>
  __device__ V reduce(V value, Combine combine) const {
    return block_reduce(value, combine);
  }

  __device__ bool any(bool vote) const { return __syncthreads_or(vote); }
};

// Columns of a row that each of `blocks` takes, but for the last ones. A multiple of 16 bytes whatever the elements, so
// that all shares begin at the alignment that the row begins at.
__host__ __device__ constexpr int columns_of_block(int cols, int blocks) { return (cols / blocks / 16 + 1) * 16; }

#ifdef FASTPREF_CLUSTERS
class Cluster {
 public:
  __device__ int blocks() const { return static_cast<int>(cluster_.num_blocks()); }
  __device__ bool first_thread() const { return threadIdx.x == 0 && cluster_.block_rank() == 0; }

  __device__ Columns share(int cols) const {
    const int most = columns_of_block(cols, blocks());
    const int first = most * static_cast<int>(cluster_.block_rank());
    const int left = cols - first;
    return {first, left < 0 ? 0 : left < most ? left : most};
  }

  template <class V, class Combine>
  __device__ V reduce(V value, Combine combine) const {
    return over_blocks(block_reduce(value, combine), combine);
  }

  __device__ bool any(bool vote) const { return over_blocks(__syncthreads_or(vote), Largest{}) != 0; }

 private:
  // The blocks' values combined in the order of their ranks.
  template <class V, class Combine>
  __device__ V over_blocks(V value, Combine combine) const {
    __shared__ V of_block;
    if (threadIdx.x == 0) of_block = value;
    cluster_.sync();
    V all = *cluster_.map_shared_rank(&of_block, 0);
    for (int rank = 1; rank < blocks(); ++rank) all = combine(all, *cluster_.map_shared_rank(&of_block, rank));
    // Before the next value overwrites this one, and before a block that ends takes its memory along.
    cluster_.sync();
    return all;
  }

  cooperative_groups::cluster_group cluster_ = cooperative_groups::this_cluster();
};
#endif

}  // namespace fastpref::cuda
