// SPDX-License-Identifier: Apache-2.0
// How the threads of a block take turns on one thread of the host.
//
// With -fsanitize=thread each is a fiber of ThreadSanitizer. A switch orders nothing: only what is said with `release`
// and `acquire` happens before something else, so that a race is found whatever the order in which threads run. What
// the stand-in itself reads and writes is left out of it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <memory>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define HOST_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define HOST_UNSEEN
#endif

namespace host {
// A report takes more stack than a kernel.
constexpr int kStack = 1 << 16;

inline void prepare(ucontext_t& context, std::unique_ptr<char[]>& stack, void (*start)()) {
  if (stack == nullptr) stack.reset(new char[kStack]);
  getcontext(&context);
  context.uc_stack.ss_sp = stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, start, 0);
}

#ifdef __SANITIZE_THREAD__

class Coroutine {
 public:
  // Fiber and stack stay together: what one leaves on its stack is no race with itself.
  void reset(void (*start)()) {
    prepare(context_, stack_, start);
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
  }
  HOST_UNSEEN void enter() {
    scheduler_fiber_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
    swapcontext(&scheduler_, &context_);
  }
  HOST_UNSEEN void leave() {
    __tsan_switch_to_fiber(scheduler_fiber_, __tsan_switch_to_fiber_no_sync);
    swapcontext(&context_, &scheduler_);
  }

 private:
  ucontext_t context_, scheduler_;
  void* fiber_ = nullptr;
  void* scheduler_fiber_ = nullptr;
  std::unique_ptr<char[]> stack_;
};

inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }

#else

inline thread_local jmp_buf scheduler;

// A context enters a thread, jumps switch: setcontext would make a system call each time.
class Coroutine {
 public:
  void reset(void (*start)()) {
    prepare(entry_, stack_, start);
    started_ = false;
  }
  void enter() {
    if (_setjmp(scheduler) != 0) return;
    if (started_) _longjmp(resumption_, 1);
    started_ = true;
    setcontext(&entry_);
  }
  void leave() {
    if (_setjmp(resumption_) == 0) _longjmp(scheduler, 1);
  }

 private:
  ucontext_t entry_;
  jmp_buf resumption_;
  bool started_;
  std::unique_ptr<char[]> stack_;
};

inline void release(void*) {}
inline void acquire(void*) {}

#endif
}  // namespace host
