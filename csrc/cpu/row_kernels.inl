// SPDX-License-Identifier: Apache-2.0
// The row kernels, written once and compiled once per instruction set: the including file chooses the instructions with
// a target pragma before its first include and fills its table from kernels_of. Everything here has internal linkage
// and the C library is called through builtins: an inline function of a standard header would be emitted in several
// instruction sets under one name, and the linker would keep any one of them.
//
// exp_rows, per row, with anchor a and all columns v but the target's:
//     e_v = exp(t_v - a),   sum = S = sum_v e_v
//     best = max_v t_v (target included),   squares = sum_v e_v^2,   total = sum_v t_v (under a cap alone),
//     weighted = sum_v e_v (t_v - best)      (about a, which may lie far below, its digits would cancel in the entropy)
// and, when it writes, the tile becomes e_v (times 1 - tanh^2 under a cap) with 0 at the target. A row in which some
// t_v - a exceeds kGuard, or whose anchor is not finite, is moved to the anchor max_v t_v.
//
// logit_grad, per row, from anchor, norm, logp, H and upstream gradients g (logp), h (lse), k (entropy): the tile
// becomes
//     dz_v = t'_v p_v ((h - g) - k (log p_v + H)),   and at the target  t'_y (g (1 - p_y) + p_y (h - k (logp + H))),
// with p_v = exp(t_v - anchor) / norm: a logarithm of norm, rounded at its own magnitude, would cost digits of p.
//
// settle_rows, per row, from S, the anchor a and the target's logit t_y:
//     norm = S + exp(t_y - a),   log_norm = log norm,   logp = t_y - a - log_norm,   scale = exp(a + offset - anchor) /
//     norm
// where anchor is a or, given best, that one, to which norm and log_norm then move. Kept exponentials receive
// (p_y - 1) / scale at the target, times 1 - tanh^2 under a cap.

#include <cstdint>
#include <type_traits>

#include "row_kernels.h"

namespace fastpref::cpu {
namespace {

#include "blocks.inl"
#include "exponential.inl"

constexpr int64_t kBlock = 1024;
// exp(30) per element leaves exp(72) for a sum of squares over 2^18 columns: far from float's limit, exp(88).
constexpr double kGuard = 30.0;
constexpr double kInfinity = __builtin_inf();
constexpr float kLowestAnchor = -1e30f;

template <class A>
struct Map {
  const A* bias;
  A scale, inner, cap;  // inner = scale / cap

  explicit Map(const LogitMap& map)
      : bias(static_cast<const A*>(map.bias)),
        scale(static_cast<A>(map.scale)),
        inner(map.cap == 0 ? A(0) : static_cast<A>(map.scale / map.cap)),
        cap(static_cast<A>(map.cap)) {}

  Map of_row(const void* factor, int64_t row) const {
    Map own = *this;
    if (factor == nullptr) return own;
    const A of_row = static_cast<const A*>(factor)[row];
    own.scale *= of_row;
    own.cap *= of_row;
    return own;
  }

  // logits[i] and, under a cap, slopes[i] = 1 - tanh^2 of columns [begin, begin + n)
  __attribute__((noinline)) void apply(const void* row, Element element, int64_t begin, int64_t n, A* logits,
                                       A* slopes) const {
    const bool scaled = bias == nullptr && cap == 0;
    read_block(row, element, begin, n, scaled ? scale : A(1), logits);
    if (scaled) return;
    if (bias != nullptr) {
      const A* b = bias + begin;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) logits[i] += b[i];
    }
    if (cap == 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) logits[i] *= scale;
      return;
    }
    // Read through `this`, they would keep the loop from being vectorised.
    const A inside = inner, outside = cap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Tangent<A> t = hyperbolic_tangent(logits[i] * inside);
      logits[i] = outside * t.tanh;
      slopes[i] = t.slope;
    }
  }
};

// exp(t - anchor), exact but for its last bits. Twenty nats apart, rounding the difference alone would cost a float's
// result its last four, the same way in a whole row.
template <class A>
inline A exp_difference(A t, A anchor) {
  const A lowest = Exponent<A>::kLowest, x = t - anchor;
  // What the subtraction lost, for any t and anchor (Knuth's two-sum); at t = -inf it is NaN.
  const A back = x - t;
  const A lost = (t - (x - back)) - (anchor + back);
  const bool below = x < lowest;
  const Reduced<A> e = reduce_exp(choose(below, lowest, x), choose(below, A(0), lost));
  return choose(below, A(0), e.power + e.power * e.rest);
}

// 16-bit tiles have rounded their logits before and do not show what the difference lost.
constexpr bool rounded_before(Element element) { return element == Element::bfloat16 || element == Element::float16; }

// exp_difference, or without what the difference lost.
template <bool kRounded, class A>
inline A exp_about(A t, A anchor) {
  return kRounded ? exponential(t - anchor) : exp_difference(t, anchor);
}

template <class A>
__attribute__((noinline)) A largest(const A* x, int64_t n) {
  A best = -static_cast<A>(kInfinity);
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// One row of exp_rows.
template <class A, bool kStatistics>
class ExpRow {
 public:
  ExpRow(void* row, Element element, int64_t cols, int64_t target, A anchor, const Map<A>& map, bool write)
      : row_(row), element_(element), cols_(cols), target_(target), anchor_(anchor), map_(map), write_(write) {}

  void run() {
    const bool here = target_ >= 0 && target_ < cols_;
    A logit = 0, slope = 1;
    if (here) map_.apply(row_, element_, target_, 1, &logit, &slope);
    if (!(__builtin_fabs(anchor_) < kInfinity)) {
      anchor_ = largest_from(0);
      // Nothing but -inf here: any finite anchor below every other part's.
      if (anchor_ == -static_cast<A>(kInfinity)) anchor_ = kLowestAnchor;
    }
    if (here) {
      run_range(0, target_);
      run_range(target_ + 1, cols_);
      if constexpr (kStatistics) {
        if (logit > best_ || (logit == best_ && target_ < best_index_)) {
          best_ = logit;
          best_index_ = target_;
        }
      }
      if (write_) zero_target();
    } else {
      run_range(0, cols_);
    }
    // A half holds nothing above 65504: keep probabilities instead, their normaliser is now known.
    if (write_ && !writes_now()) rescale_to_probabilities(here ? logit : -static_cast<A>(kInfinity));
  }

  void results(A* sums, int64_t rows, int64_t row, int64_t* best_index) const {
    A* const out = sums + row;
    out[kAnchor * rows] = anchor_;
    out[kSum * rows] = static_cast<A>(sum_);
    out[kOffset * rows] = offset_;
    if constexpr (kStatistics) {
      out[kBest * rows] = best_;
      const double above = static_cast<double>(best_) - anchor_;
      out[kWeighted * rows] = static_cast<A>(sum_ > 0 ? weighted_ - above * sum_ : 0);
      out[kSquares * rows] = static_cast<A>(squares_);
      if (map_.cap != 0) out[kTotal * rows] = static_cast<A>(total_);
      best_index[row] = best_index_;
    }
  }

 private:
  // Halves are written once, at the end.
  bool writes_now() const { return write_ && element_ != Element::float16; }

  void zero_target() {
    const A zero = 0;
    write_block(row_, element_, target_, 1, &zero);
  }

  __attribute__((noinline)) void run_range(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = end - at < kBlock ? end - at : kBlock;
      map_.apply(row_, element_, at, n, logits_, slopes_);
      const A block_best = largest(logits_, n);
      if (block_best - anchor_ > static_cast<A>(kGuard)) move_anchor(at, block_best);
      if (block_best > best_) {
        best_ = block_best;
        if constexpr (kStatistics) {
          for (best_index_ = at; logits_[best_index_ - at] != block_best;) ++best_index_;
        }
      }
      A* const out = writes_now() ? room_for(row_, element_, at, logits_) : logits_;
      if (rounded_before(element_)) {
        // Never of double.
        if constexpr (sizeof(A) == sizeof(float)) accumulate<true>(n, block_best, out);
      } else {
        accumulate<false>(n, block_best, out);
      }
      if (writes_now()) write_exponentials(at, n, out);
    }
  }

  template <bool kRounded>
  __attribute__((noinline)) void accumulate(int64_t n, A block_best, A* exps) {
    const A anchor = anchor_;
    A sum = 0, weighted = 0, squares = 0, total = 0;
    if constexpr (kStatistics) {
      if (map_.cap != 0) {
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; ++i) total += logits_[i];
      }
#pragma omp simd reduction(+ : sum, weighted, squares)
      for (int64_t i = 0; i < n; ++i) {
        const A e = exp_about<kRounded>(logits_[i], anchor);
        sum += e;
        weighted += e > 0 ? e * (logits_[i] - block_best) : A(0);  // a logit of -inf has no weight
        squares += e * e;
        exps[i] = e;
      }
      if (sum > 0) weighted_ += weighted + (static_cast<double>(block_best) - anchor) * sum;
      squares_ += squares;
      total_ += total;
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) {
        const A e = exp_about<kRounded>(logits_[i], anchor);
        sum += e;
        exps[i] = e;
      }
    }
    sum_ += sum;
  }

  void write_exponentials(int64_t at, int64_t n, A* exps) {
    if (map_.cap != 0) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) exps[i] *= slopes_[i];
    }
    write_block(row_, element_, at, n, exps);
  }

  // The largest logit at or after column `at`, the target's left out. Works in scratch of its own.
  __attribute__((noinline)) A largest_from(int64_t at) const {
    A best = -static_cast<A>(kInfinity);
    A logits[kBlock], slopes[kBlock];
    for (; at < cols_; at += kBlock) {
      const int64_t n = cols_ - at < kBlock ? cols_ - at : kBlock;
      map_.apply(row_, element_, at, n, logits, slopes);
      if (target_ >= at && target_ < at + n) logits[target_ - at] = -static_cast<A>(kInfinity);
      const A block_best = largest(logits, n);
      best = block_best > best ? block_best : best;
    }
    return best;
  }

  // Columns before `at` are exponentials already, the rest are products still.
  __attribute__((noinline)) void move_anchor(int64_t at, A block_best) {
    A anchor = largest_from(at);
    anchor = best_ > anchor ? best_ : anchor;
    anchor = block_best > anchor ? block_best : anchor;
    const A shift = anchor_ - anchor;
    const A factor = exponential(shift);
    if (writes_now()) {
      // The target's column may lie among them: its product is no longer needed.
      A exps[kBlock];
      for (int64_t start = 0; start < at; start += kBlock) {
        const int64_t n = at - start < kBlock ? at - start : kBlock;
        read_block(row_, element_, start, n, factor, exps);
        write_block(row_, element_, start, n, exps);
      }
    }
    weighted_ = sum_ > 0 ? factor * (weighted_ + shift * sum_) : 0;
    sum_ *= factor;
    squares_ *= static_cast<double>(factor) * factor;
    anchor_ = anchor;
  }

  void rescale_to_probabilities(A target_logit) {
    const double norm = sum_ + __builtin_exp(target_logit - anchor_);
    // Columns of nothing but -inf, the target elsewhere: nothing to scale.
    offset_ = norm > 0 ? static_cast<A>(__builtin_log(norm)) : A(0);
    const A lse = anchor_ + offset_;
    for (int64_t at = 0; at < cols_; at += kBlock) {
      const int64_t n = cols_ - at < kBlock ? cols_ - at : kBlock;
      map_.apply(row_, element_, at, n, logits_, slopes_);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) logits_[i] = exponential(logits_[i] - lse);
      write_exponentials(at, n, logits_);
    }
    if (target_ >= 0 && target_ < cols_) zero_target();
  }

  void* row_;
  Element element_;
  int64_t cols_, target_;
  A anchor_;
  const Map<A>& map_;
  bool write_;
  A offset_ = 0;
  A best_ = -static_cast<A>(kInfinity);
  int64_t best_index_ = -1;
  // Blocks add up in double: no float sum runs over more than kBlock columns.
  double sum_ = 0, squares_ = 0, total_ = 0;
  double weighted_ = 0;  // about the anchor
  alignas(64) A logits_[kBlock];
  alignas(64) A slopes_[kBlock];
};

template <class A, bool kStatistics>
void exp_rows_range(Element element, const ExpRows& call, int64_t begin, int64_t end) {
  const Tile& tile = call.tile;
  const Map<A> shared(call.map);
  for (int64_t row = begin; row < end; ++row) {
    const Map<A> map = shared.of_row(call.map.factor, row);
    void* data = element_at(tile.data, element, row * tile.row_stride);
    const A anchor = static_cast<const A*>(call.anchor)[row];
    ExpRow<A, kStatistics> one(data, element, tile.cols, tile.target[row], anchor, map, call.write);
    one.run();
    one.results(static_cast<A*>(call.sums), tile.rows, row, call.best_index);
  }
}

template <Element kElement>
void exp_rows(const ExpRows& call, int64_t begin, int64_t end) {
  if (call.best_index == nullptr) {
    exp_rows_range<ArithmeticOf<kElement>, false>(kElement, call, begin, end);
  } else {
    exp_rows_range<ArithmeticOf<kElement>, true>(kElement, call, begin, end);
  }
}

template <class A, bool kRounded>
__attribute__((noinline, noclone)) void logit_grad_row(void* row, Element element, const LogitGrad& call,
                                                       const Map<A>& map, int64_t i) {
  const auto at_row = [i](const void* values) { return values == nullptr ? A(0) : static_cast<const A*>(values)[i]; };
  const A anchor = at_row(call.anchor), norm = at_row(call.norm), logp = at_row(call.logp);
  const A g = at_row(call.grad_logp), h = at_row(call.grad_lse);
  const A k = at_row(call.grad_entropy), entropy = at_row(call.entropy);
  const A inverse = 1 / norm, log_norm = static_cast<A>(__builtin_log(norm));
  const int64_t target = call.tile.target[i];
  alignas(64) A logits[kBlock];
  alignas(64) A slopes[kBlock];
  A target_slope = 1;
  for (int64_t at = 0; at < call.tile.cols; at += kBlock) {
    const int64_t n = call.tile.cols - at < kBlock ? call.tile.cols - at : kBlock;
    map.apply(row, element, at, n, logits, slopes);
    if (map.cap == 0) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) slopes[j] = 1;
    }
    if (target >= at && target < at + n) target_slope = slopes[target - at];
    A* const out = room_for(row, element, at, logits);
    if (k == 0) {
      const A weight = map.scale * (h - g) * inverse;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) out[j] = weight * slopes[j] * exp_about<kRounded>(logits[j], anchor);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A shifted = logits[j] - anchor;
        const A p = exp_about<kRounded>(logits[j], anchor) * inverse;
        const A value = p * ((h - g) - k * (shifted - log_norm + entropy));
        out[j] = p > 0 || p != p ? map.scale * slopes[j] * value : A(0);
      }
    }
    write_block(row, element, at, n, out);
  }
  if (target >= 0 && target < call.tile.cols) {
    const A p = exponential(logp);
    A value = g * static_cast<A>(-__builtin_expm1(logp)) + p * h;
    if (k != 0 && p > 0) value -= k * p * (logp + entropy);
    value *= map.scale * target_slope;
    write_block(row, element, target, 1, &value);
  }
}

template <Element kElement>
void logit_grad(const LogitGrad& call, int64_t begin, int64_t end) {
  using A = ArithmeticOf<kElement>;
  const Map<A> shared(call.map);
  for (int64_t row = begin; row < end; ++row) {
    const Map<A> map = shared.of_row(call.map.factor, row);
    void* data = element_at(call.tile.data, kElement, row * call.tile.row_stride);
    logit_grad_row<A, rounded_before(kElement)>(data, kElement, call, map, row);
  }
}

template <Element kElement>
void target_logits(const TargetLogits& call, int64_t begin, int64_t end) {
  using T = typename TypeOf<kElement>::type;
  using A = ArithmeticOf<kElement>;
  const A* bias = static_cast<const A*>(call.map.bias);
  const Map<A> map(LogitMap{nullptr, call.map.scale, call.map.cap});
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = call.target[row];
    const bool here = y >= 0 && y < call.vocab;
    A raw = static_cast<A>(__builtin_nan("")), slope;
    if (here) {
      const T* x = static_cast<const T*>(call.hidden) + row * call.hidden_stride;
      const T* w = static_cast<const T*>(call.weight) + y * call.weight_stride;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < call.width; ++i) sum += load(x[i]) * load(w[i]);
      raw = bias == nullptr ? sum : sum + bias[y];
    }
    call.column[row] = here ? y : -1;
    static_cast<A*>(call.raw)[row] = raw;
    map.apply(&raw, ElementOf<A>::value, 0, 1, static_cast<A*>(call.logit) + row, &slope);
  }
}

template <Element kElement>
void settle_rows(const SettleRows& call, int64_t begin, int64_t end) {
  using A = ArithmeticOf<kElement>;
  const Map<double> map(call.map);
  const auto at = [](const void* values, int64_t row) {
    return static_cast<double>(static_cast<const A*>(values)[row]);
  };
  for (int64_t row = begin; row < end; ++row) {
    const double anchor = at(call.anchor, row), sum = at(call.sum, row), relative = at(call.logit, row) - anchor;
    double top = anchor, norm = sum + __builtin_exp(relative);
    double log_norm = relative == 0 ? __builtin_log1p(sum) : __builtin_log(norm);
    const double logp = relative - log_norm;
    if (call.best != nullptr) {
      // About the largest logit, where log p and the entropy add up without cancelling.
      top = at(call.best, row);
      norm *= __builtin_exp(anchor - top);
      log_norm = __builtin_log(norm);
    }
    const double scale = __builtin_exp(anchor + at(call.offset, row) - top) / norm;
    const double scores[kRowScores] = {logp, top, norm, log_norm, scale};
    for (int i = 0; i < kRowScores; ++i) static_cast<A*>(call.scores)[i * call.rows + row] = static_cast<A>(scores[i]);
    if (call.exps == nullptr || call.column[row] < 0) continue;
    const double raw = at(call.raw, row);
    double logit, slope = 1;
    map.apply(&raw, Element::float64, 0, 1, &logit, &slope);
    void* exps = element_at(call.exps, kElement, row * call.exps_stride);
    const A value = static_cast<A>(__builtin_expm1(logp) / scale * slope);
    write_block(exps, kElement, call.column[row], 1, &value);
  }
}

template <Element kElement>
void scale_rows(const ScaleRows& call, int64_t begin, int64_t end) {
  using A = ArithmeticOf<kElement>;
  A buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = call.from == nullptr ? row : call.from[row], to = call.to == nullptr ? row : call.to[row];
    const void* in = element_at(call.in, kElement, from * call.in_stride);
    void* out = element_at(call.out, kElement, to * call.out_stride);
    const A factor = static_cast<const A*>(call.factor)[row];
    for (int64_t at = 0; at < call.width; at += kBlock) {
      const int64_t n = call.width - at < kBlock ? call.width - at : kBlock;
      A* const products = room_for(out, kElement, at, buffer);
      read_block(in, kElement, at, n, factor, products);
      write_block(out, kElement, at, n, products);
    }
  }
}

#include "divergence_rows.inl"
#include "squared_errors.inl"

template <Element kElement>
constexpr RowKernels kernels_of() {
  using A = ArithmeticOf<kElement>;
  return {exp_rows<kElement>,   logit_grad<kElement>,      target_logits<kElement>, settle_rows<kElement>,
          scale_rows<kElement>, divergence_rows<kElement>, squared_errors<A>,       error_gradient<A>};
}

}  // namespace
}  // namespace fastpref::cpu
