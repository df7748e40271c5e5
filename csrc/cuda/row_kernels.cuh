// SPDX-License-Identifier: Apache-2.0
// The row kernels, one block a row, or for long rows one cluster of blocks. What they compute is written in
// cpu/row_kernels.inl; here is how.
//
// exp_rows overwrites the products that it reads, and only at the end of a row is it known whether the anchor will do:
// an exponential that overflowed could not be turned back. So a thread that meets a logit more than kGuard above the
// anchor stops writing, at that piece, for the rest of the row, and only looks for the maximum. If any thread of the
// block did, each then goes over its own pieces again: those before its stop hold exponentials, at most e^kGuard, and
// are scaled to the new anchor; those after it hold products still. An ordinary row is read once and written once, and
// a moved one twice; halves are written once, after one more read.
//
// A thread only ever touches its own pieces, so the passes over a row need no barrier between them.
//
// A cluster splits a row among its blocks. Each copies its columns to shared memory, works on them there, and copies
// them back, so that also a moved row, or one of halves, is read from memory once and written once.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "elements.cuh"
#include "teams.cuh"

namespace fastpref::cuda {

// exp(30) per element leaves exp(72) for a sum of squares over 2^18 columns: far from float's limit, exp(88).
constexpr double kGuard = 30.0;
constexpr double kLowestAnchor = -1e30;

// Blocks that a multiprocessor has registers for. Left to choose, the compiler spills those of the double kernels.
template <class T>
constexpr int kResidentBlocks = std::is_same_v<T, double> ? 1 : 2;

// Position of `target` in a piece that starts at `column`; -1 when it is elsewhere.
template <int n>
__device__ inline int position_in_piece(int target, int column) {
  const int position = target - column;
  return position >= 0 && position < n ? position : -1;
}

// A target among `columns`, counted from their first; -1 when it is elsewhere.
__device__ inline int target_among(int64_t target, Columns columns) {
  const int64_t place = target - columns.first;
  return place >= 0 && place < columns.count ? static_cast<int>(place) : -1;
}

template <class T>
__device__ inline T* row_of(const cpu::Tile& tile, int64_t i) {
  // 64 bits before it is multiplied: rows times columns passes 2^31.
  return static_cast<T*>(tile.data) + i * tile.row_stride;
}

// This thread's part of some columns of one row of exp_rows, which `team` has among all its threads.
template <class T, bool kStatistics, class Team>
struct ExpRow {
  using A = typename AccumulateType<T>::type;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr int kNever = std::numeric_limits<int>::max();

  Team team;
  T* row;            // the first of the columns, in memory or in a copy
  int cols, target;  // how many; the target among them, or -1
  Map<A> map;
  bool write;  // as the sums are taken. Halves are written once, at the end
  A anchor;
  A sum = 0, squares = 0, total = 0;
  A weighted = 0;                // about `best`, whatever it is at the time: all its terms have one sign
  A highest = -infinity<A>();    // of all columns but the target's
  A own_logit = -infinity<A>();  // the target's, in the thread that has it
  A best = -infinity<A>();       // of all columns, and its first column
  int best_index = -1;

  __device__ ExpRow(const cpu::ExpRows& call, int64_t i, T* row, Columns columns, Team team)
      : team(team),
        row(row),
        cols(columns.count),
        target(target_among(call.tile.target[i], columns)),
        map(call.map, i, columns.first),
        write(call.write && !kHalf),
        anchor(static_cast<const A*>(call.anchor)[i]) {}

  __device__ __forceinline__ void anchor_at_maximum() {
    A top = -infinity<A>();
    for_each_piece(row, cols, [&](const auto& piece, int column) {
      constexpr int n = std::decay_t<decltype(piece)>::kSize;
      const auto logits = map.apply(piece, column);
      const int own = position_in_piece<n>(target, column);
#pragma unroll
      for (int j = 0; j < n; ++j) top = j == own ? top : larger(top, logits.t[j]);
    });
    top = team.reduce(top, Largest{});
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
        if (map.cap != 0) total += j == own ? A(0) : logits.t[j];
      }
      store(exps.values[j], e * logits.slope[j]);
    }
    sum += piece_sum;
    if (write) piece = exps;
  }

  // Returns how many pieces this thread took before it met a logit too far above the anchor.
  __device__ __forceinline__ int take_row() {
    int number = 0, taken = kNever;
    for_each_piece(row, cols, [&](auto& piece, int column) {
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
    const A moved = team.reduce(highest, Largest{});
    const A factor = exp_difference<T>(anchor, moved);
    anchor = moved;
    sum *= factor;
    weighted *= factor;
    squares *= factor * factor;
    int number = 0;
    for_each_piece(row, cols, [&](auto& piece, int column) {
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
    const A norm = row_sum + team.reduce(exponential(own_logit - anchor), Sum{});
    const A offset = norm == 0 ? A(0) : log(norm);
    // Rounded here as it is by those who undo it.
    const A lse = anchor + offset;
    for_each_piece(row, cols, [&](auto& piece, int column) {
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

// Exponentials and sums of row i, whose given columns are at `columns_of_row`.
template <class T, bool kStatistics, class Team>
__device__ __forceinline__ void exp_row(const cpu::ExpRows& call, int64_t i, T* columns_of_row, Columns columns,
                                        Team team) {
  using A = typename AccumulateType<T>::type;
  ExpRow<T, kStatistics, Team> row(call, i, columns_of_row, columns, team);
  if (!(fabs(row.anchor) < infinity<A>())) row.anchor_at_maximum();
  const int taken = row.take_row();
  if (team.any(taken != row.kNever)) row.move_anchor(taken);
  const A sum = team.reduce(row.sum, Sum{});
  A offset = 0;
  if constexpr (row.kHalf) {
    if (call.write) offset = row.write_probabilities(sum);
  }
  A* sums = static_cast<A*>(call.sums) + i;
  const int64_t rows = call.tile.rows;
  const bool writer = team.first_thread();
  if (writer) {
    sums[cpu::kAnchor * rows] = row.anchor;
    sums[cpu::kSum * rows] = sum;
    sums[cpu::kOffset * rows] = offset;
  }
  if constexpr (kStatistics) {
    const A best = team.reduce(row.best, Largest{});
    // Of equal maxima the first column wins.
    const int64_t candidate = row.best == best ? row.best_index + columns.first : std::numeric_limits<int64_t>::max();
    const int64_t best_index = team.reduce(candidate, Smallest{});
    const A below = row.sum > 0 ? (row.best - best) * row.sum : A(0);
    const A weighted = team.reduce(row.weighted + below, Sum{});
    const A squares = team.reduce(row.squares, Sum{});
    if (writer) {
      sums[cpu::kBest * rows] = best;
      sums[cpu::kWeighted * rows] = weighted;
      sums[cpu::kSquares * rows] = squares;
      call.best_index[i] = best_index;
    }
    if (row.map.cap != 0) {
      const A total = team.reduce(row.total, Sum{});
      if (writer) sums[cpu::kTotal * rows] = total;
    }
  }
}

template <class T, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) exp_rows_kernel(cpu::ExpRows call) {
  const int64_t i = blockIdx.x;
  exp_row<T, kStatistics>(call, i, row_of<T>(call.tile, i), Block{}.share(static_cast<int>(call.tile.cols)), Block{});
}

#ifdef FASTPREF_CLUSTERS
// Starts copying to where `to` has the alignment of `from`: the same threads then have the same pieces of both.
template <class T>
__device__ __forceinline__ void copy_async(T* to, const T* from, int count) {
  for_each_piece(from, count, [&](const auto& piece, int column) {
    if constexpr (sizeof(piece) == 16) {
      __pipeline_memcpy_async(to + column, &piece, sizeof(piece));
    } else {
      to[column] = piece.values[0];
    }
  });
  __pipeline_commit();
}
#endif

// The shared memory of a block that holds `columns` of a row, wherever that begins.
template <class T>
constexpr int64_t staged_bytes(int columns) {
  return columns * static_cast<int64_t>(sizeof(T)) + 16;
}

// Empty where there are no clusters: is_clustered() says so, and then it must not be launched.
template <class T, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) exp_rows_cluster_kernel(cpu::ExpRows call) {
#ifdef FASTPREF_CLUSTERS
  const Cluster cluster;
  const int64_t i = blockIdx.x / cluster.blocks();
  const Columns columns = cluster.share(static_cast<int>(call.tile.cols));
  extern __shared__ __align__(16) unsigned char staged[];
  const auto in_memory = [&] { return row_of<T>(call.tile, i) + columns.first; };
  const auto copy = [&] { return reinterpret_cast<T*>(staged + reinterpret_cast<uintptr_t>(in_memory()) % 16); };
  copy_async<T>(copy(), in_memory(), columns.count);
  __pipeline_wait_prior(0);
  // The wait alone does not keep the compiler from reading the copy before it.
  __syncthreads();
  exp_row<T, kStatistics>(call, i, copy(), columns, cluster);
  if (!call.write) return;
  for_each_piece(in_memory(), columns.count, [&](auto& piece, int column) {
    using Whole = std::decay_t<decltype(piece)>;
    piece = load_piece<T, Whole::kSize>(copy() + column);
  });
#endif
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
  const int cols = static_cast<int>(call.tile.cols);
  const int target = target_among(call.tile.target[i], {0, cols});
  const Map<A> map(call.map, i, 0);
  for_each_piece(row_of<T>(call.tile, i), cols, [&](auto& piece, int column) {
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

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) target_logits_kernel(cpu::TargetLogits call) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = blockIdx.x, y = call.target[i];
  const bool here = y >= 0 && y < call.vocab;
  A sum = 0;
  if (here) {
    const T* weight = static_cast<const T*>(call.weight) + y * call.weight_stride;
    for_each_piece(static_cast<const T*>(call.hidden) + i * call.hidden_stride, static_cast<int>(call.width),
                   [&](const auto& piece, int column) {
                     constexpr int n = std::decay_t<decltype(piece)>::kSize;
                     const Piece<T, n> x = piece, w = load_piece<T, n>(weight + column);
                     A piece_sum = 0;
#pragma unroll
                     for (int j = 0; j < n; ++j) piece_sum += load(x.values[j]) * load(w.values[j]);
                     sum += piece_sum;
                   });
  }
  sum = block_reduce(sum, Sum{});
  if (threadIdx.x != 0) return;
  if (!here) sum = std::numeric_limits<A>::quiet_NaN();
  if (here && call.map.bias != nullptr) sum += static_cast<const A*>(call.map.bias)[y];
  const Map<A> map(cpu::LogitMap{nullptr, call.map.scale, call.map.cap});
  call.column[i] = here ? y : -1;
  static_cast<A*>(call.raw)[i] = sum;
  static_cast<A*>(call.logit)[i] = map.apply(Piece<A, 1>{{sum}}, 0).t[0];
}

// In double throughout: there are few rows.
constexpr int kSettleThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSettleThreads) settle_rows_kernel(cpu::SettleRows call) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSettleThreads + threadIdx.x;
  if (i >= call.rows) return;
  const auto at_row = [i](const void* values) { return static_cast<double>(static_cast<const A*>(values)[i]); };
  const double anchor = at_row(call.anchor), sum = at_row(call.sum), relative = at_row(call.logit) - anchor;
  double top = anchor, norm = sum + exp(relative);
  double log_norm = relative == 0 ? log1p(sum) : log(norm);
  const double logp = relative - log_norm;
  if (call.best != nullptr) {
    top = at_row(call.best);
    norm *= exp(anchor - top);
    log_norm = log(norm);
  }
  const double scale = exp(anchor + at_row(call.offset) - top) / norm;
  const double scores[] = {logp, top, norm, log_norm, scale};
#pragma unroll
  for (int j = 0; j < cpu::kRowScores; ++j) {
    static_cast<A*>(call.scores)[j * call.rows + i] = static_cast<A>(scores[j]);
  }
  const int64_t column = call.column[i];
  if (call.exps == nullptr || column < 0) return;
  const Map<double> map(call.map);
  const double slope = map.apply(Piece<double, 1>{{at_row(call.raw)}}, 0).slope[0];
  T* exps = static_cast<T*>(call.exps) + i * call.exps_stride;
  store(exps[column], static_cast<A>(expm1(logp) / scale * slope));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) scale_rows_kernel(cpu::ScaleRows call) {
  using A = typename AccumulateType<T>::type;
  const int64_t i = blockIdx.x;
  T* out = static_cast<T*>(call.out) + i * call.out_stride;
  const A factor = static_cast<const A*>(call.factor)[i];
  for_each_piece(static_cast<const T*>(call.in) + i * call.in_stride, static_cast<int>(call.width),
                 [&](const auto& piece, int column) {
                   constexpr int n = std::decay_t<decltype(piece)>::kSize;
                   const Piece<T, n> values = piece;
                   Piece<T, n> scaled;
#pragma unroll
                   for (int j = 0; j < n; ++j) store(scaled.values[j], load(values.values[j]) * factor);
                   store_piece(out + column, scaled);
                 });
}

}  // namespace fastpref::cuda
