// SPDX-License-Identifier: Apache-2.0
// A stand-in for the CUDA headers with which g++ compiles the row kernels: the threads of one block run as coroutines.
// Between two barriers of the block its warps run one after the other, forwards or backwards, each as far ahead as it
// can, so that a missing barrier makes results depend on the direction; under ThreadSanitizer it is a race. The blocks
// of a cluster run on threads of the host, each with its own copy of all that is shared within a block.
#pragma once
#include <math.h>

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

#include "coroutines.h"

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
constexpr int kWarp = 32, kMostThreads = 1024, kMostBlocks = 8;

struct Thread {
  Coroutine coroutine;
  Wait wait;
  int exchanges, block_barriers, cluster_barriers;
};
// Of one block.
inline thread_local Thread* threads;
inline thread_local Index thread_index, block_index;
inline thread_local unsigned char exchanged[2][kMostThreads][8];
inline thread_local int votes[kMostThreads];
inline thread_local int block_size;
inline thread_local void (*body)(void*);
inline thread_local void* body_argument;
inline thread_local int block_rank;
// What its barriers order. Two in turn: a thread may come to the next barrier before another has left this one.
inline thread_local char start_order, block_order[2], end_order;

// Of the cluster.
inline int cluster_size = 1;
inline char* block_memory[kMostBlocks];  // one and the same variable of each block
inline std::mutex cluster_mutex;
inline std::condition_variable cluster_barrier;
inline int arrived, barriers_passed;
inline char cluster_order[2];

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

HOST_UNSEEN inline void wait(Wait barrier) {
  Thread& self = threads[thread_index.x];
  self.wait = barrier;
  // An exchange within a warp orders no accesses to memory.
  char* order = nullptr;
  if (barrier == Wait::block) order = &block_order[self.block_barriers++ % 2];
  if (barrier == Wait::cluster) order = &cluster_order[self.cluster_barriers++ % 2];
  if (barrier == Wait::end) order = &end_order;
  if (order != nullptr) release(order);
  self.coroutine.leave();
  if (order != nullptr) acquire(order);
}

HOST_UNSEEN inline void start() {
  acquire(&start_order);
  body(body_argument);
  wait(Wait::end);
}

HOST_UNSEEN inline Index current_thread() { return thread_index; }

HOST_UNSEEN inline void resume(int i) {
  thread_index.x = i;
  threads[i].coroutine.enter();
}

// Runs a warp to its next barrier of the block, or to its end.
HOST_UNSEEN inline Wait run_warp(int warp, bool backwards) {
  for (;;) {
    for (int lane = 0; lane < kWarp; ++lane) resume(warp * kWarp + (backwards ? kWarp - 1 - lane : lane));
    const Wait reached = threads[warp * kWarp].wait;
    for (int lane = 1; lane < kWarp; ++lane) {
      if (threads[warp * kWarp + lane].wait != reached) abort();  // a barrier that some lanes do not reach
    }
    if (reached != Wait::warp) return reached;
  }
}

// Kept from launch to launch: to make them takes long. Blocks that run at the same time have different ones.
inline Thread* threads_of(int64_t place) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Thread[]>> all;
  std::lock_guard lock(mutex);
  while (static_cast<int64_t>(all.size()) <= place) all.emplace_back(new Thread[kMostThreads]);
  return all[place].get();
}

template <class Body>
void run_block(int64_t place, unsigned index, int size, bool backwards, Body call) {
  threads = threads_of(place);
  block_index.x = index;
  block_size = size;
  body = [](void* argument) { (*static_cast<Body*>(argument))(); };
  body_argument = &call;
  for (int i = 0; i < size; ++i) {
    Thread& thread = threads[i];
    thread.coroutine.reset(start);
    thread.exchanges = thread.block_barriers = thread.cluster_barriers = 0;
  }
  release(&start_order);
  for (Wait all = Wait::none; all != Wait::end;) {
    const int warps = size / kWarp;
    for (int i = 0; i < warps; ++i) {
      const Wait reached = run_warp(backwards ? warps - 1 - i : i, backwards);
      if (i > 0 && reached != all) abort();  // a barrier that some warps do not reach
      all = reached;
    }
    if (all == Wait::cluster) wait_for_cluster();
  }
  acquire(&end_order);
}

// Blocks of a grid are not ordered: where races are looked for, each has a thread of the host, and all have begun
// before one is waited for.
template <class Body>
void run_grid(int64_t blocks, int size, bool backwards, Body call) {
#ifdef __SANITIZE_THREAD__
  std::vector<std::thread> running;
  for (int64_t i = 0; i < blocks; ++i) running.emplace_back([=] { run_block(i, i, size, backwards, call); });
  for (auto& block : running) block.join();
#else
  for (int64_t i = 0; i < blocks; ++i) run_block(0, i, size, backwards, call);
#endif
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
      run_block(rank, first + rank, size, backwards != (rank % 2 == 1), call);
    });
  }
  for (auto& block : running) block.join();
}
}  // namespace host

namespace host {
#ifdef FASTPREF_COUNT_ACCESSES
// How often each 16-bit element of some memory was read and written. A thread has elements of its own.
struct Accesses {
  const void* first;
  int64_t count;
  int* reads;
  int* writes;
};
inline Accesses accesses;

struct Counted {
  Counted() = default;
  Counted(const Counted& from) { count(accesses.reads, &from); }
  Counted& operator=(const Counted& from) {
    count(accesses.reads, &from);
    count(accesses.writes, this);
    return *this;
  }

 private:
  static void count(int* counts, const Counted* at) {
    const uintptr_t distance = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(accesses.first);
    if (distance / 2 < static_cast<uintptr_t>(accesses.count)) ++counts[distance / 2];
  }
};
#else
struct Counted {};
#endif
}  // namespace host

#define threadIdx host::current_thread()
#define blockIdx host::block_index

struct __nv_bfloat16 : host::Counted {
  host::BFloat16 value;
};
struct __half : host::Counted {
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
template <class Whole>
void __pipeline_memcpy_async(void* to, const Whole* from, size_t) {
  *static_cast<Whole*>(to) = *from;
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {}

namespace cooperative_groups {
struct cluster_group {
  unsigned num_blocks() const { return host::cluster_size; }
  unsigned block_rank() const { return host::block_rank; }
  void sync() const { host::wait(host::Wait::cluster); }
  template <class V>
  HOST_UNSEEN V* map_shared_rank(V* here, int rank) const {
    // Thread-local variables lie alike on every thread.
    const auto distance = reinterpret_cast<char*>(here) - host::block_memory[host::block_rank];
    return reinterpret_cast<V*>(host::block_memory[rank] + distance);
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

inline void __syncthreads() { host::wait(host::Wait::block); }
HOST_UNSEEN inline int __syncthreads_or(int vote) {
  host::votes[threadIdx.x] = vote;
  host::wait(host::Wait::block);
  int any = 0;
  for (int i = 0; i < host::block_size; ++i) any |= host::votes[i];
  host::wait(host::Wait::block);
  return any;
}
template <class V>
HOST_UNSEEN V __shfl_xor_sync(unsigned, V value, int distance) {
  // Two buffers in turn: a lane may come to the next exchange before its partner has read this one.
  auto& buffer = host::exchanged[host::threads[threadIdx.x].exchanges++ % 2];
  memcpy(buffer[threadIdx.x], &value, sizeof(V));
  host::wait(host::Wait::warp);
  memcpy(&value, buffer[threadIdx.x ^ distance], sizeof(V));
  return value;
}
