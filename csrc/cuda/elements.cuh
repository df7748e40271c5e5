// SPDX-License-Identifier: Apache-2.0
// What the row kernels are made of: element types, 16-byte pieces of a row, the logit map.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/row_kernels.h"

namespace fastpref::cuda {

constexpr int kThreads = 512;
constexpr int kWarp = 32;

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};

__device__ inline double load(double x) { return x; }
__device__ inline float load(float x) { return x; }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }

__device__ inline void store(double& to, double x) { to = x; }
__device__ inline void store(float& to, float x) { to = x; }
__device__ inline void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void store(__half& to, float x) { to = __float2half_rn(x); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// exp(t - anchor). Far from the anchor, rounding the difference alone would cost the result of a float up to four bits,
// the same ones in a whole row: what it took is added back. 16-bit tiles have rounded their logits by more before.
template <class T, class A>
__device__ inline A exp_difference(A t, A anchor) {
  const A x = t - anchor;
  const A e = exponential(x);
  if constexpr (sizeof(T) < sizeof(float)) {
    return e;
  } else {
    // Exact whichever of the two is larger.
    const A back = x - t;
    const A lost = (t - (x - back)) - (anchor + back);
    return e > 0 ? e + e * lost : e;  // at t = -inf it is NaN
  }
}

template <class A>
__device__ constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// b when it is larger: a NaN in b leaves a, a NaN in a stays.
template <class A>
__device__ inline A larger(A a, A b) {
  return b > a ? b : a;
}

// What one thread reads or writes in one access.
template <class T, int n>
struct alignas(n * sizeof(T)) Piece {
  static constexpr int kSize = n;
  T values[n];
};

// Calls visit(piece, its first column) on this thread's pieces of the row, always the same ones in the same order.
// Rows of an odd number of columns start anywhere: single columns come first, up to a 16-byte boundary, and last.
template <class T, class Visit>
__device__ __forceinline__ void for_each_piece(T* row, int cols, Visit visit) {
  using Value = std::remove_const_t<T>;
  constexpr int kWidth = 16 / sizeof(T);
  using Single = std::conditional_t<std::is_const_v<T>, const Piece<Value, 1>, Piece<Value, 1>>;
  using Wide = std::conditional_t<std::is_const_v<T>, const Piece<Value, kWidth>, Piece<Value, kWidth>>;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int to_boundary = (kWidth - misaligned) % kWidth;
  const int head = cols < to_boundary ? cols : to_boundary;
  const int wide = (cols - head) / kWidth;
  const int tail = head + wide * kWidth;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < head) visit(reinterpret_cast<Single&>(row[thread]), thread);
  for (int i = thread; i < wide; i += kThreads) {
    const int column = head + i * kWidth;
    visit(reinterpret_cast<Wide&>(row[column]), column);
  }
  if (thread < cols - tail) {
    const int column = tail + thread;
    visit(reinterpret_cast<Single&>(row[column]), column);
  }
}

// A piece of a second row, which may be aligned differently.
template <class T, int n>
__device__ __forceinline__ Piece<T, n> load_piece(const T* from) {
  using Whole = Piece<T, n>;
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Whole) == 0) return reinterpret_cast<const Whole&>(*from);
  Whole piece;
#pragma unroll
  for (int j = 0; j < n; ++j) piece.values[j] = from[j];
  return piece;
}

template <class T, int n>
__device__ __forceinline__ void store_piece(T* to, const Piece<T, n>& piece) {
  using Whole = Piece<T, n>;
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Whole) == 0) {
    reinterpret_cast<Whole&>(*to) = piece;
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) to[j] = piece.values[j];
}

template <class A, int n>
struct Logits {
  A t[n];
  A slope[n];  // 1 - tanh^2 under a cap, else 1
};

template <class A>
struct Map {
  const A* bias;
  A scale, inner, cap;  // inner = scale / cap

  // Of all rows: without their factors.
  __device__ explicit Map(const cpu::LogitMap& map)
      : bias(static_cast<const A*>(map.bias)),
        scale(static_cast<A>(map.scale)),
        inner(map.cap == 0 ? A(0) : static_cast<A>(map.scale / map.cap)),
        cap(static_cast<A>(map.cap)) {}

  // Of a row, and of the columns from `first` on.
  __device__ Map(const cpu::LogitMap& map, int64_t row, int first) : Map(map) {
    if (bias != nullptr) bias += first;
    if (map.factor != nullptr) {
      const A factor = static_cast<const A*>(map.factor)[row];
      scale *= factor;
      cap *= factor;
    }
  }

  template <class T, int n>
  __device__ __forceinline__ Logits<A, n> apply(const Piece<T, n>& products, int column) const {
    // One access to memory; element by element the compiler would have to make it several.
    const Piece<T, n> piece = products;
    Logits<A, n> logits;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A z = bias == nullptr ? load(piece.values[j]) : load(piece.values[j]) + bias[column + j];
      logits.t[j] = z * scale;
      logits.slope[j] = 1;
      if (cap != 0) {
        // From e^{-2|x|}: 1 - tanh^2 would cancel where tanh is close to 1.
        const A x = z * inner;
        const A e = exponential(-2 * fabs(x));
        logits.t[j] = cap * tanh(x);
        logits.slope[j] = 4 * e / ((1 + e) * (1 + e));
      }
    }
    return logits;
  }
};

}  // namespace fastpref::cuda
