// SPDX-License-Identifier: Apache-2.0
// Divergences between a student's and a teacher's row. Included inside an anonymous namespace by row_kernels.inl, once
// per instruction set. With s, t the logits and q = softmax(s), p = softmax(t):
//
//     forward_kl     D = sum p log(p/q)            dD/ds = q - p
//     reverse_kl     D = sum q log(q/p)            dD/ds = q (log(q/p) - D)
//     jsd            D = beta sum p log(p/m) + (1 - beta) sum q log(q/m),   m = (1 - beta) q + beta p
//                                                  dD/ds = (1 - beta) q (log(q/m) - sum q log(q/m))
//     tv             D = sum |q - p| / 2           dD/ds = q (c - sum q c),   c = sign(q - p) / 2
//     bhattacharyya  D = -log sum sqrt(p q)        dD/ds = (q - r) / 2,   r = sqrt(p q) / sum sqrt(p q)
//     cosine         D = 1 - <s, t> / (|s| |t|)    dD/ds = (u - w - D u) / |s|,   u = s / |s|,   w = t / |t|
//
// At a row of zeros the cosine's D is 1 and its gradient 0. A column that both biases exclude with -inf counts as 0 in
// it; in the others it has no probability.
//
// Nothing is lost where p is close to q, because all but the cosine follow from
//     d = log(q/p) = (s - t) - (lse_s - lse_t),   x = -|d|,   greater = max(p, q),   lesser = greater exp(x),
// and each D is a sum of terms that are not negative: p log(p/q) - p + q and its like, greater (1 - exp(x/2))^2 / 2 for
// 1 - sum sqrt(p q), (u - w)^2 / 2 for the cosine. An error of lse_s - lse_t changes these D by its square or by a
// share of D. The second sweep measures it as sum (q - p); D of tv and the gradients of the two KL and of bhattacharyya
// are rid of it.

#include "divergence_terms.inl"

template <class A>
__attribute__((noinline)) A largest_sum(const A* s, const A* t, int64_t n) {
  A best = -static_cast<A>(kInfinity);
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) best = s[i] + t[i] > best ? s[i] + t[i] : best;
  return best;
}

// The sum of a row's exponentials, block after block, each about the largest number so far, of those that `sum` and
// `anchor` are of: 0 and -inf before the first. What the sum is off by is measured as sum (q - p).
template <class A>
struct Normaliser {
  A anchor = -static_cast<A>(kInfinity);
  double sum = 0;

  // Of exp(logits - anchor), which go to `exps`; returns the anchor.
  __attribute__((noinline)) A add(const A* logits, int64_t n, A* exps) {
    const bool some = raise(largest(logits, n), 1.0);
    const A at = some ? anchor : A(0);
    for (int64_t start = 0; start < n; start += kPart) {
      const int64_t stop = n - start < kPart ? n : start + kPart;
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = start; i < stop; ++i) {
        const A e = exp_difference(logits[i], at);
        exps[i] = e;
        part += e;
      }
      if (some) sum += part;
    }
    return anchor;
  }

  // Of exp((s + t - anchor) / 2) about the largest s + t.
  __attribute__((noinline)) void add_means(const A* s, const A* t, int64_t n) {
    if (!raise(largest_sum(s, t, n), 0.5)) return;
    const A at = anchor;
    for (int64_t start = 0; start < n; start += kPart) {
      const int64_t stop = n - start < kPart ? n : start + kPart;
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = start; i < stop; ++i) part += exp_mean(s[i], t[i], at);
      sum += part;
    }
  }

  // What exponentials about `earlier` are multiplied with to be probabilities.
  A scale(A earlier) const {
    const double below = static_cast<double>(earlier) - anchor;
    return static_cast<A>((below == 0 ? 1.0 : __builtin_exp(below)) / sum);
  }

 private:
  // Whether there is a number yet.
  bool raise(A block_best, double share) {
    if (block_best > anchor) {
      sum *= __builtin_exp(share * (static_cast<double>(anchor) - block_best));
      anchor = block_best;
    }
    return anchor > -static_cast<A>(kInfinity);
  }
};

// Exponentials of a student's and a teacher's row, and each block's anchors.
template <class A>
class Exponentials {
 public:
  explicit Exponentials(int64_t cols)
      : blocks_((cols + kBlock - 1) / kBlock), values_(new A[blocks_ * 2 * (kBlock + 1)]) {}
  ~Exponentials() { delete[] values_; }
  Exponentials(const Exponentials&) = delete;
  Exponentials& operator=(const Exponentials&) = delete;

  A* student(int64_t at) { return values_ + 2 * at; }
  A* teacher(int64_t at) { return student(at) + kBlock; }
  A& student_anchor(int64_t at) { return values_[blocks_ * 2 * kBlock + 2 * (at / kBlock)]; }
  A& teacher_anchor(int64_t at) { return (&student_anchor(at))[1]; }

 private:
  int64_t blocks_;
  A* values_;
};

template <class A, Divergence kKind>
class DivergenceRow {
 public:
  DivergenceRow(void* student, const void* teacher, Element element, int64_t cols, const Map<A>& student_map,
                const Map<A>& teacher_map, double beta, Exponentials<A>& exps)
      : student_(student),
        teacher_(teacher),
        element_(element),
        cols_(cols),
        student_map_(student_map),
        teacher_map_(teacher_map),
        exps_(exps) {
    row_.student_weight = static_cast<A>(1 - beta);
    row_.teacher_weight = static_cast<A>(beta);
  }

  A value() {
    if constexpr (kKind == Divergence::cosine) {
      compare_directions();
      return directions_.value;
    } else {
      compare_distributions();
      return row_.value;
    }
  }

  // After value().
  void write() {
    sweep([this](int64_t at, int64_t n) {
      if constexpr (kKind == Divergence::cosine) {
        differentiate_cosine(directions_, s_, t_, n);
      } else {
        differentiate<kKind>(row_, block(at, n));
      }
      const A scale = student_map_.scale;
      if (student_map_.cap == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s_[i] *= scale;
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) s_[i] *= scale * slopes_[i];
      }
      write_block(student_, element_, at, n, s_);
    });
  }

 private:
  // Calls `visit` with each block's first column and width, its logits in s_ and t_.
  template <class Visit>
  void sweep(const Visit& visit) {
    for (int64_t at = 0; at < cols_; at += kBlock) {
      const int64_t n = cols_ - at < kBlock ? cols_ - at : kBlock;
      teacher_map_.apply(teacher_, element_, at, n, t_, slopes_);
      student_map_.apply(student_, element_, at, n, s_, slopes_);
      if constexpr (kKind == Divergence::cosine) drop_excluded(at, n);
      visit(at, n);
    }
  }

  Block<A> block(int64_t at, int64_t n) {
    return {s_,
            t_,
            exps_.student(at),
            exps_.teacher(at),
            student_sum_.scale(exps_.student_anchor(at)),
            teacher_sum_.scale(exps_.teacher_anchor(at)),
            n};
  }

  // Under a cap -inf is an ordinary logit.
  void drop_excluded(int64_t at, int64_t n) {
    if (student_map_.bias == nullptr || teacher_map_.bias == nullptr || student_map_.cap != 0) return;
    const A *own = student_map_.bias + at, *other = teacher_map_.bias + at;
    const A excluded = -static_cast<A>(kInfinity);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool kept = own[i] != excluded || other[i] != excluded;
      s_[i] = choose(kept, s_[i], A(0));
      t_[i] = choose(kept, t_[i], A(0));
    }
  }

  void compare_distributions() {
    Normaliser<A>&student = student_sum_, &teacher = teacher_sum_, mean;
    sweep([&](int64_t at, int64_t n) {
      exps_.student_anchor(at) = student.add(s_, n, exps_.student(at));
      exps_.teacher_anchor(at) = teacher.add(t_, n, exps_.teacher(at));
      if constexpr (kKind == Divergence::bhattacharyya) mean.add_means(s_, t_, n);
    });
    const double relative = __builtin_log(student.sum / teacher.sum);
    const double shift = static_cast<double>(student.anchor) - teacher.anchor + relative;
    row_.shift = Shift<A>(shift);

    DivergenceSums sums;
    sweep([&](int64_t at, int64_t n) { add_terms<kKind>(row_, block(at, n), sums); });
    double value = sums.value;
    double centre = shift + sums.excess;
    if constexpr (kKind == Divergence::forward_kl || kKind == Divergence::reverse_kl) {
      // The sums of jsd and tv belong to the shift that they were formed with.
      row_.shift = Shift<A>(shift + sums.excess);
      value /= sums.weight;
    }
    if constexpr (kKind == Divergence::reverse_kl) centre = shift + sums.part / sums.weight;
    if constexpr (kKind == Divergence::jsd) row_.centre = Shift<A>(sums.part / sums.weight);
    if constexpr (kKind == Divergence::tv) {
      // Where one row is no distribution, q alone does not show it.
      const double above = value == value ? sums.part / sums.weight : value;
      value -= sums.excess * (2 * above - 1) / 2;
      row_.above = static_cast<A>(above);
      row_.below = static_cast<A>(1 - above);
    }
    if constexpr (kKind == Divergence::bhattacharyya) {
      const double far = (static_cast<double>(student.anchor) - mean.anchor + teacher.anchor) / 2 +
                         __builtin_log(student.sum * teacher.sum) / 2 - __builtin_log(mean.sum);
      value = value < 0.5 ? -__builtin_log1p(-value) : far;
      // Rows that share no column are left q / 2.
      if (mean.sum > 0) {
        row_.mean_anchor = mean.anchor;
        row_.mean_inverse = static_cast<A>(1 / mean.sum);
        centre += 2 * value;
      }
    }
    row_.centred = Shift<A>(centre);
    row_.value = static_cast<A>(value);
  }

  void compare_directions() {
    SquareSums sums;
    sweep([&](int64_t, int64_t n) { add_squares(s_, t_, n, sums); });
    if (sums.student == 0 || sums.teacher == 0) {
      directions_.value = 1;
      return;
    }
    const double student = __builtin_sqrt(sums.student), teacher = __builtin_sqrt(sums.teacher);
    const double stretch = sums.difference / (student + teacher);
    directions_.student = static_cast<A>(stretch < 0 ? -stretch / student : 0);
    directions_.teacher = static_cast<A>(stretch > 0 ? stretch / teacher : 0);
    directions_.inverse = static_cast<A>(1 / (student > teacher ? student : teacher));
    directions_.inverse_length = static_cast<A>(1 / student);
    double value = 0;
    sweep([&](int64_t, int64_t n) { value += half_square_distance(directions_, s_, t_, n); });
    directions_.value = static_cast<A>(value);
  }

  void* student_;
  const void* teacher_;
  Element element_;
  int64_t cols_;
  const Map<A>&student_map_, &teacher_map_;
  Exponentials<A>& exps_;
  Normaliser<A> student_sum_, teacher_sum_;
  Relation<A> row_;
  Directions<A> directions_;
  alignas(64) A s_[kBlock];
  alignas(64) A t_[kBlock];
  alignas(64) A slopes_[kBlock];
};

template <class A, Divergence kKind>
void divergence_rows_range(Element element, const DivergenceRows& call, int64_t begin, int64_t end) {
  const Map<A> student_shared(call.student_map), teacher_shared(call.teacher_map);
  Exponentials<A> exps(kKind == Divergence::cosine ? 0 : call.cols);
  for (int64_t i = begin; i < end; ++i) {
    const Map<A> student_map = student_shared.of_row(call.student_map.factor, i);
    const Map<A> teacher_map = teacher_shared.of_row(call.teacher_map.factor, i);
    void* student = element_at(call.student, element, i * call.student_stride);
    const void* teacher = element_at(call.teacher, element, i * call.teacher_stride);
    DivergenceRow<A, kKind> row(student, teacher, element, call.cols, student_map, teacher_map, call.beta, exps);
    static_cast<A*>(call.out)[i] = row.value();
    if (call.write) row.write();
  }
}

template <Element kElement>
void divergence_rows(const DivergenceRows& call, int64_t begin, int64_t end) {
  using A = ArithmeticOf<kElement>;
  switch (call.kind) {
    case Divergence::forward_kl:
      return divergence_rows_range<A, Divergence::forward_kl>(kElement, call, begin, end);
    case Divergence::reverse_kl:
      return divergence_rows_range<A, Divergence::reverse_kl>(kElement, call, begin, end);
    case Divergence::jsd:
      return divergence_rows_range<A, Divergence::jsd>(kElement, call, begin, end);
    case Divergence::tv:
      return divergence_rows_range<A, Divergence::tv>(kElement, call, begin, end);
    case Divergence::bhattacharyya:
      return divergence_rows_range<A, Divergence::bhattacharyya>(kElement, call, begin, end);
    case Divergence::cosine:
      return divergence_rows_range<A, Divergence::cosine>(kElement, call, begin, end);
  }
}
