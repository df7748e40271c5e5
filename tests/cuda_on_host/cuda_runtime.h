// SPDX-License-Identifier: Apache-2.0
// A stand-in for the CUDA headers with which g++ compiles the row kernels: the threads of one block run as coroutines.
// Between two barriers of the block its warps run one after the other, forwards or backwards, each as far ahead as it
// can, so that a missing barrier makes results depend on the direction. The blocks of a cluster run on threads of the
// host, each with its own copy of all that is shared within a block.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

namespace host {
#include "cpu/elements.inl"

struct Index {
  unsigned x;
};
enum class Wait { none, warp, block, cluster, end };
constexpr int kWarp = 32, kMostThreads = 1024, kMostBlocks = 8, kStack = 1 << 16;

struct Thread {
  ucontext_t entry;
  jmp_buf resumption;
  bool started;
  std::unique_ptr<char[]> stack;
  Wait wait;
  int exchanges;
};
// Of one block.
inline thread_local Thread threads[kMostThreads];
inline thread_local jmp_buf scheduler;
inline thread_local Index thread_index, block_index;
inline thread_local unsigned char exchanged[2][kMostThreads][8];
inline thread_local int votes[kMostThreads];
inline thread_local int block_size;
inline thread_local void (*body)(void*);
inline thread_local void* body_argument;
inline thread_local int block_rank;

// Of the cluster.
inline int cluster_size = 1;
inline char* block_memory[kMostBlocks];  // one and the same variable of each block
inline std::mutex cluster_mutex;
inline std::condition_variable cluster_barrier;
inline int arrived, barriers_passed;

inline void wait_for_cluster() {
  std::unique_lock lock(cluster_mutex);
  const int passed = barriers_passed;
  if (++arrived == cluster_size) {
    arrived = 0;
    ++barriers_passed;
    cluster_barrier.notify_all();
  }
  cluster_barrier.wait(lock, [&] { return barriers_passed != passed; });
}

inline void wait(Wait barrier) {
  Thread& self = threads[thread_index.x];
  self.wait = barrier;
  if (_setjmp(self.resumption) == 0) _longjmp(scheduler, 1);
}

inline void start() {
  body(body_argument);
  wait(Wait::end);
}

// A context enters a thread, jumps switch: setcontext would make a system call each time.
inline void resume(int i) {
  thread_index.x = i;
  Thread& thread = threads[i];
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resumption, 1);
  thread.started = true;
  setcontext(&thread.entry);
}

// Runs a warp to its next barrier of the block, or to its end.
inline Wait run_warp(int warp, bool backwards) {
  for (;;) {
    for (int lane = 0; lane < kWarp; ++lane) resume(warp * kWarp + (backwards ? kWarp - 1 - lane : lane));
    const Wait reached = threads[warp * kWarp].wait;
    for (int lane = 1; lane < kWarp; ++lane) {
      if (threads[warp * kWarp + lane].wait != reached) abort();  // a barrier that some lanes do not reach
    }
    if (reached != Wait::warp) return reached;
  }
}

template <class Body>
void run_block(unsigned index, int size, bool backwards, Body call) {
  block_index.x = index;
  block_size = size;
  body = [](void* argument) { (*static_cast<Body*>(argument))(); };
  body_argument = &call;
  for (int i = 0; i < size; ++i) {
    Thread& thread = threads[i];
    if (thread.stack == nullptr) thread.stack.reset(new char[kStack]);
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = thread.stack.get();
    thread.entry.uc_stack.ss_size = kStack;
    makecontext(&thread.entry, start, 0);
    thread.started = false;
    thread.exchanges = 0;
  }
  for (Wait all = Wait::none; all != Wait::end;) {
    const int warps = size / kWarp;
    for (int i = 0; i < warps; ++i) {
      const Wait reached = run_warp(backwards ? warps - 1 - i : i, backwards);
      if (i > 0 && reached != all) abort();  // a barrier that some warps do not reach
      all = reached;
    }
    if (all == Wait::cluster) wait_for_cluster();
  }
}

// Every other block runs its warps in the other direction.
template <class Body>
void run_cluster(unsigned first, int blocks, int size, bool backwards, Body call) {
  cluster_size = blocks;
  std::vector<std::thread> running;
  for (int rank = 0; rank < blocks; ++rank) {
    running.emplace_back([=] {
      block_rank = rank;
      block_memory[rank] = reinterpret_cast<char*>(&block_rank);
      wait_for_cluster();
      run_block(first + rank, size, backwards != (rank % 2 == 1), call);
    });
  }
  for (auto& block : running) block.join();
}
}  // namespace host

#define threadIdx host::thread_index
#define blockIdx host::block_index

struct __nv_bfloat16 {
  host::BFloat16 value;
};
struct __half {
  host::Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) { return host::load(x.value); }
inline float __half2float(__half x) { return host::load(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 y;
  host::store(y.value, x);
  return y;
}
inline __half __float2half_rn(float x) {
  __half y;
  host::store(y.value, x);
  return y;
}

// Asynchronous copies come at once: a wait that is missing is not seen.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) { memcpy(to, from, size); }
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {}

namespace cooperative_groups {
struct cluster_group {
  unsigned num_blocks() const { return host::cluster_size; }
  unsigned block_rank() const { return host::block_rank; }
  void sync() const { host::wait(host::Wait::cluster); }
  template <class V>
  V* map_shared_rank(V* here, int rank) const {
    // Thread-local variables lie alike on every thread.
    const auto distance = reinterpret_cast<char*>(here) - host::block_memory[host::block_rank];
    return reinterpret_cast<V*>(host::block_memory[rank] + distance);
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

inline void __syncthreads() { host::wait(host::Wait::block); }
inline int __syncthreads_or(int vote) {
  host::votes[threadIdx.x] = vote;
  host::wait(host::Wait::block);
  int any = 0;
  for (int i = 0; i < host::block_size; ++i) any |= host::votes[i];
  host::wait(host::Wait::block);
  return any;
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  // Two buffers in turn: a lane may come to the next exchange before its partner has read this one.
  auto& buffer = host::exchanged[host::threads[threadIdx.x].exchanges++ % 2];
  memcpy(buffer[threadIdx.x], &value, sizeof(V));
  host::wait(host::Wait::warp);
  memcpy(&value, buffer[threadIdx.x ^ distance], sizeof(V));
  return value;
}
