// SPDX-License-Identifier: Apache-2.0
// The row kernels, one block a row. What they compute is written in cpu/row_kernels.inl; here is how.
//
// exp_rows overwrites the products that it reads, and only at the end of a row is it known whether the anchor will do:
// an exponential that overflowed could not be turned back. So a thread that meets a logit more than kGuard above the
// anchor stops writing, at that piece, for the rest of the row, and only looks for the maximum. If any thread of the
// block did, each then goes over its own pieces again: those before its stop hold exponentials, at most e^kGuard, and
// are scaled to the new anchor; those after it hold products still. An ordinary row is read once and written once, and
// a moved one twice.
//
// A thread only ever touches its own pieces, so the passes over a row need no barrier between them.
#pragma once

#include "elements.cuh"

namespace fastpref::cuda {

// exp(30) per element leaves exp(72) for a sum of squares over 2^18 columns: far from float's limit, exp(88).
constexpr double kGuard = 30.0;
constexpr double kLowestAnchor = -1e30;

// Blocks that a multiprocessor has registers for. Left to choose, the compiler spills those of the double kernels.
template <class T>
constexpr int kResidentBlocks = std::is_same_v<T, double> ? 1 : 2;

// Position of `target` in a piece that starts at `column`; -1 when it is elsewhere.
template <int n>
__device__ inline int position_in_piece(int64_t target, int64_t column) {
  const int64_t position = target - column;
  return position >= 0 && position < n ? static_cast<int>(position) : -1;
}

// This thread's part of one row of exp_rows.
template <class T, bool kStatistics>
struct ExpRow {
  using A = typename AccumulateType<T>::type;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr int kNever = std::numeric_limits<int>::max();

  T* row;
  int64_t cols, target;
  Map<A> map;
  bool write;  // as the sums are taken. Halves are written once, at the end
  A anchor;
  A sum = 0, squares = 0, total = 0;
  A weighted = 0;                // about `best`, whatever it is at the time: all its terms have one sign
  A highest = -infinity<A>();    // of all columns but the target's
  A own_logit = -infinity<A>();  // the target's, in the thread that has it
  A best = -infinity<A>();       // of all columns, and its first column
  int64_t best_index = -1;

  __device__ ExpRow(const cpu::ExpRows& call, int64_t i)
      : row(static_cast<T*>(call.tile.data) + i * call.tile.row_stride),
        cols(call.tile.cols),
        target(call.tile.target[i]),
        map(call.map),
        write(call.write && !kHalf),
        anchor(static_cast<const A*>(call.anchor)[i]) {}

  __device__ __forceinline__ void anchor_at_maximum() {
    A top = -infinity<A>();
    for_each_piece(row, cols, [&](const auto& piece, int64_t column) {
      constexpr int n = std::decay_t<decltype(piece)>::kSize;
      const auto logits = map.apply(piece, column);
      const int own = position_in_piece<n>(target, column);
#pragma unroll
      for (int j = 0; j < n; ++j) top = j == own ? top : larger(top, logits.t[j]);
    });
    top = block_reduce(top, Largest{});
    // Nothing but -inf here: any finite anchor below every other part's.
    anchor = top == -infinity<A>() ? static_cast<A>(kLowestAnchor) : top;
  }

  template <int n>
  __device__ __forceinline__ void observe(const Logits<A, n>& logits, int64_t column, int own) {
    const A before = best;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (kStatistics && logits.t[j] > best) {
        best = logits.t[j];
        best_index = column + j;
      }
      if (j == own) {
        own_logit = logits.t[j];
      } else {
        highest = larger(highest, logits.t[j]);
      }
    }
    // Without any weight so far `before` may be -inf.
    if (kStatistics && sum > 0) weighted += (before - best) * sum;
  }

  // Adds an observed piece to the sums, and writes its exponentials.
  template <int n>
  __device__ __forceinline__ void take(Piece<T, n>& piece, const Logits<A, n>& logits, int own) {
    Piece<T, n> exps;
    A piece_sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const A e = j == own ? A(0) : exp_difference<T>(logits.t[j], anchor);
      piece_sum += e;
      if constexpr (kStatistics) {
        weighted += e > 0 ? e * (logits.t[j] - best) : A(0);  // a logit of -inf has no weight
        squares += e * e;
        total += j == own ? A(0) : logits.t[j];
      }
      store(exps.values[j], e * logits.slope[j]);
    }
    sum += piece_sum;
    if (write) piece = exps;
  }

  // Returns how many pieces this thread took before it met a logit too far above the anchor.
  __device__ __forceinline__ int take_row() {
    int number = 0, taken = kNever;
    for_each_piece(row, cols, [&](auto& piece, int64_t column) {
      constexpr int n = std::decay_t<decltype(piece)>::kSize;
      const auto logits = map.apply(piece, column);
      const int own = position_in_piece<n>(target, column);
      observe(logits, column, own);
      if (taken == kNever && highest - anchor > static_cast<A>(kGuard)) taken = number;
      if (taken == kNever) take(piece, logits, own);
      ++number;
    });
    return taken;
  }

  __device__ __forceinline__ void move_anchor(int taken) {
    const A moved = block_reduce(highest, Largest{});
    const A factor = exp_difference<T>(anchor, moved);
    anchor = moved;
    sum *= factor;
    weighted *= factor;
    squares *= factor * factor;
    int number = 0;
    for_each_piece(row, cols, [&](auto& piece, int64_t column) {
      constexpr int n = std::decay_t<decltype(piece)>::kSize;
      if (number++ >= taken) {
        take(piece, map.apply(piece, column), position_in_piece<n>(target, column));
      } else if (write) {
        auto exps = piece;
#pragma unroll
        for (int j = 0; j < n; ++j) store(exps.values[j], load(exps.values[j]) * factor);
        piece = exps;
      }
    });
  }

  // A half holds nothing above 65504: it keeps exp(t - anchor - offset), probabilities as far as this tile knows them.
  __device__ __forceinline__ A write_probabilities(A row_sum) {
    // Through the sum and not the maximum, which would lose a NaN.
    const A norm = row_sum + block_reduce(exponential(own_logit - anchor), Sum{});
    const A offset = norm == 0 ? A(0) : log(norm);
    // Rounded here as it is by those who undo it.
    const A lse = anchor + offset;
    for_each_piece(row, cols, [&](auto& piece, int64_t column) {
      constexpr int n = std::decay_t<decltype(piece)>::kSize;
      const auto logits = map.apply(piece, column);
      const int own = position_in_piece<n>(target, column);
      Piece<T, n> probabilities;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        store(probabilities.values[j], j == own ? A(0) : exponential(logits.t[j] - lse) * logits.slope[j]);
      }
      piece = probabilities;
    });
    return offset;
  }
};

template <class T, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) exp_rows_kernel(cpu::ExpRows call) {
  using A = typename AccumulateType<T>::type;
  // 64 bits before it is multiplied: rows times columns passes 2^31.
  const int64_t i = blockIdx.x;
  ExpRow<T, kStatistics> row(call, i);
  if (!(fabs(row.anchor) < infinity<A>())) row.anchor_at_maximum();
  const int taken = row.take_row();
  if (__syncthreads_or(taken != row.kNever)) row.move_anchor(taken);
  const A sum = block_reduce(row.sum, Sum{});
  A offset = 0;
  if constexpr (row.kHalf) {
    if (call.write) offset = row.write_probabilities(sum);
  }
  A* sums = static_cast<A*>(call.sums) + i;
  const int64_t rows = call.tile.rows;
  const bool writer = threadIdx.x == 0;
  if (writer) {
    sums[0] = row.anchor;
    sums[rows] = sum;
    sums[2 * rows] = offset;
  }
  if constexpr (kStatistics) {
    const A best = block_reduce(row.best, Largest{});
    // Of equal maxima the first column wins.
    const int64_t candidate = row.best == best ? row.best_index : std::numeric_limits<int64_t>::max();
    const int64_t best_index = block_reduce(candidate, Smallest{});
    const A below = row.sum > 0 ? (row.best - best) * row.sum : A(0);
    const A weighted = block_reduce(row.weighted + below, Sum{});
    const A squares = block_reduce(row.squares, Sum{});
    const A total = block_reduce(row.total, Sum{});
    if (writer) {
      sums[3 * rows] = best;
      sums[4 * rows] = weighted;
      sums[5 * rows] = squares;
      sums[6 * rows] = total;
      call.best_index[i] = best_index;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) logit_grad_kernel(cpu::LogitGrad call) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = blockIdx.x;
  const auto at_row = [i](const void* values) { return values == nullptr ? A(0) : static_cast<const A*>(values)[i]; };
  const A anchor = at_row(call.anchor), norm = at_row(call.norm), logp = at_row(call.logp);
  const A g = at_row(call.grad_logp), h = at_row(call.grad_lse);
  const A k = at_row(call.grad_entropy), entropy = at_row(call.entropy);
  const A inverse = 1 / norm, entropy_less_log_norm = entropy - log(norm);
  const A own_p = exponential(logp);
  A own_value = own_p * h - g * expm1(logp);
  if (k != 0 && own_p > 0) own_value -= k * own_p * (logp + entropy);
  const int64_t target = call.tile.target[i];
  const Map<A> map(call.map);
  for_each_piece(static_cast<T*>(call.tile.data) + i * call.tile.row_stride, call.tile.cols,
                 [&](auto& piece, int64_t column) {
                   constexpr int n = std::decay_t<decltype(piece)>::kSize;
                   const auto logits = map.apply(piece, column);
                   const int own = position_in_piece<n>(target, column);
                   Piece<T, n> grad;
#pragma unroll
                   for (int j = 0; j < n; ++j) {
                     const A p = exp_difference<T>(logits.t[j], anchor) * inverse;
                     A value = p * (h - g);
                     // p log p is 0 where p is, also at a logit of -inf.
                     if (k != 0 && p > 0) value -= k * p * (logits.t[j] - anchor + entropy_less_log_norm);
                     if (j == own) value = own_value;
                     store(grad.values[j], map.scale * logits.slope[j] * value);
                   }
                   piece = grad;
                 });
}

// Checking an index on the host would wait for the device: a row whose index is outside [0, vocab) gets NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) gather_dot_kernel(cpu::GatherDot call, int64_t vocab) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = blockIdx.x, index = call.index[i];
  const bool inside = index >= 0 && index < vocab;
  A sum = 0;
  if (inside) {
    const T* weight = static_cast<const T*>(call.weight) + index * call.weight_stride;
    for_each_piece(static_cast<const T*>(call.hidden) + i * call.hidden_stride, call.width,
                   [&](const auto& piece, int64_t column) {
                     constexpr int n = std::decay_t<decltype(piece)>::kSize;
                     const Piece<T, n> x = piece, w = load_piece<T, n>(weight + column);
                     A piece_sum = 0;
#pragma unroll
                     for (int j = 0; j < n; ++j) piece_sum += load(x.values[j]) * load(w.values[j]);
                     sum += piece_sum;
                   });
  }
  sum = block_reduce(sum, Sum{});
  if (threadIdx.x == 0) static_cast<A*>(call.out)[i] = inside ? sum : std::numeric_limits<A>::quiet_NaN();
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) scale_rows_kernel(cpu::ScaleRows call) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = blockIdx.x;
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const A factor = static_cast<const A*>(call.factor)[i];
  for_each_piece(static_cast<const T*>(call.in) + i * call.in_stride, call.width,
                 [&](const auto& piece, int64_t column) {
                   constexpr int n = std::decay_t<decltype(piece)>::kSize;
                   const Piece<T, n> values = piece;
                   Piece<T, n> scaled;
#pragma unroll
                   for (int j = 0; j < n; ++j) store(scaled.values[j], load(values.values[j]) * factor);
                   store_piece(out + column, scaled);
                 });
}

}  // namespace fastpref::cuda
