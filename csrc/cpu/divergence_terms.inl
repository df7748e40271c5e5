// SPDX-License-Identifier: Apache-2.0
// The terms of divergence_rows.inl at each column of a block. Included inside an anonymous namespace by it, once per
// instruction set.

#include "logarithm.inl"

// Of x <= 0.
template <class A>
struct Decay {
  A exp;           // exactly 0 where it would be subnormal
  A expm1;         // exp(x) - 1
  A from_greater;  // exp(x) - 1 - x: of log(greater/lesser), over greater
  A from_lesser;   // 1 - exp(x) + x exp(x): of lesser/greater log(lesser/greater), over greater
};

template <class A>
__attribute__((always_inline)) inline Decay<A> decay(A x) {
  const A lowest = Exponent<A>::kLowest;
  const A bounded = x < lowest ? lowest : x;
  const Reduced<A> e = reduce_exp(bounded);
  const A expm1 = e.power * e.rest + (e.power - 1);
  const A exp = x < lowest ? A(0) : e.power + e.power * e.rest;
  const bool near = e.power == 1;
  // x times exp would be NaN at -inf.
  return {exp, expm1, choose(near, e.excess, expm1 - x), choose(near, x * expm1 - e.excess, bounded * exp - expm1)};
}

// Columns whose terms add up in A before they do in double, which halves the vectors.
constexpr int64_t kPart = 256;

// What the sum of two numbers lost (Knuth's two-sum).
template <class A>
inline A lost_in_sum(A a, A b) {
  const A sum = a + b;
  const A back = sum - a;
  return (a - (sum - back)) + (b - back);
}

// exp((s + t - anchor) / 2)
template <class A>
inline A exp_mean(A s, A t, A anchor) {
  const A e = exponential((s + t - anchor) / 2);
  // At -inf what was lost is NaN.
  return e > 0 ? e + e * ((lost_in_sum(s, t) + lost_in_sum(s + t, -anchor)) / 2) : e;
}

// A number in two parts: one would be off by more than the small differences it is subtracted from.
template <class A>
struct Shift {
  A high = 0, low = 0;

  Shift() = default;
  explicit Shift(double value) : high(static_cast<A>(value)) {
    low = __builtin_fabs(value) < kInfinity ? static_cast<A>(value - high) : A(0);
  }
};

// s - t - shift, with what s - t lost.
template <class A>
inline A subtract(A s, A t, Shift<A> shift) {
  // Both may be -inf; then greater is 0 and the result any number.
  const A difference = s == t ? A(0) : s - t;
  const A lost = lost_in_sum(s, -t);
  return (difference - shift.high) + ((lost == lost ? lost : A(0)) - shift.low);
}

// What the sweeps after the first know of the row.
template <class A>
struct Relation {
  A student_anchor = 0, student_inverse = 0;  // q = exp(s - anchor) inverse
  A teacher_anchor = 0, teacher_inverse = 0;
  A mean_anchor = 0, mean_inverse = 0;  // r
  Shift<A> shift;                       // lse_s - lse_t
  Shift<A> centred;                     // reverse_kl: the mean of s - t under q; bhattacharyya: 2 D more than shift
  A student_weight = 0, teacher_weight = 0;  // 1 - beta and beta: a beta close to 1 leaves few digits to the other
  A value = 0;
  Shift<A> centre;         // jsd: the mean of log(q/m) under q
  A above = 0, below = 0;  // tv: how much of q lies where it is above and below p
};

template <class A>
struct Pair {
  A d;  // log(q/p)
  A x;
  A greater;
};

template <class A>
__attribute__((always_inline)) inline Pair<A> compare(A s, A t, const Relation<A>& row) {
  const A d = subtract(s, t, row.shift);
  const bool rises = d > 0;
  const A e = exp_difference(choose(rises, s, t), choose(rises, row.student_anchor, row.teacher_anchor));
  return {d, choose(rises, -d, d), e * choose(rises, row.student_inverse, row.teacher_inverse)};
}

template <class A>
inline A half_sign(A x) {
  return static_cast<A>(0.5) * static_cast<A>((x > 0) - (x < 0));
}

// log(m / greater)
template <class A>
__attribute__((always_inline)) inline Logarithm<A> log_mixture(A d, A exp, A expm1, A student_weight,
                                                               A teacher_weight) {
  const A of_lesser = choose(d > 0, teacher_weight, student_weight);
  const A of_greater = choose(d > 0, student_weight, teacher_weight);
  return logarithm(of_lesser * expm1, of_greater + of_lesser * exp);
}

// log(q/m), where q is 0 some number.
template <class A>
inline A log_share(A d, A exp, A log_mixture) {
  const A of_lesser = exp == 0 ? A(0) : d - log_mixture;
  return choose(d > 0, -log_mixture, of_lesser);
}

struct DivergenceSums {
  double value = 0;
  double excess = 0;  // sum (q - p)
  double weight = 0;  // sum q, of forward_kl sum p: means divided by it are rid of an error of the greatest
  // reverse_kl: sum q log(q/p); jsd: sum q log(q/m); tv: sum of q above p, with half of q where equal.
  // Products in double: where q is all but 1 somewhere, the gradient there is what remains of that
  // column's logarithm beside their sum, and a rounding of the product alone would stay.
  double part = 0;
};

template <Divergence kKind, class A>
__attribute__((noinline)) void add_terms(const Relation<A>& relation, const A* s, const A* t, int64_t n,
                                         DivergenceSums& sums) {
  const Relation<A> row = relation;
  const double shift = static_cast<double>(row.shift.high) + row.shift.low;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t stop = n - start < kPart ? n : start + kPart;
    A value = 0;
    // Of terms of both signs, or beside which a small one must not be lost.
    double excess = 0, weight = 0, part = 0;
#pragma omp simd reduction(+ : value, excess, weight, part)
    for (int64_t i = start; i < stop; ++i) {
      const Pair<A> pair = compare(s[i], t[i], row);
      if constexpr (kKind == Divergence::bhattacharyya) {
        const A root = decay(pair.x / 2).expm1;
        const A difference = pair.greater * root * (2 + root);
        excess += choose(pair.d > 0, -difference, difference);
        value += pair.greater * root * root / 2;
      } else {
        const Decay<A> e = decay(pair.x);
        const A difference = pair.greater * e.expm1;
        excess += choose(pair.d > 0, -difference, difference);
        const A q = pair.greater * choose(pair.d > 0, A(1), e.exp);
        if constexpr (kKind == Divergence::forward_kl || kKind == Divergence::reverse_kl) {
          const bool forward = kKind == Divergence::forward_kl;
          weight += forward ? pair.greater * choose(pair.d > 0, e.exp, A(1)) : q;
          const A term = forward ? choose(pair.d > 0, e.from_lesser, e.from_greater)
                                 : choose(pair.d > 0, e.from_greater, e.from_lesser);
          // Infinite only where the other has no probability at all, also if this one's was rounded to 0.
          value += term < static_cast<A>(kInfinity) ? pair.greater * term : term;
          if constexpr (!forward) part += q == 0 ? 0.0 : q * ((static_cast<double>(s[i]) - t[i]) - shift);
        } else if constexpr (kKind == Divergence::jsd) {
          const Logarithm<A> log = log_mixture(pair.d, e.exp, e.expm1, row.student_weight, row.teacher_weight);
          const A of_lesser = choose(pair.d > 0, row.teacher_weight, row.student_weight);
          const A product = e.exp == 0 ? A(0) : pair.x * e.exp;
          const A far = of_lesser * product - log.sum * log.log1p;
          value += pair.greater * choose(log.k == 0, of_lesser * e.from_lesser - log.excess, far);
          weight += q;
          part += static_cast<double>(q) * log_share(pair.d, e.exp, log.log1p);
        } else {
          value -= difference / 2;
          weight += q;
          part += q * (static_cast<A>(0.5) + half_sign(pair.d));
        }
      }
    }
    sums.value += value;
    sums.excess += excess;
    sums.weight += weight;
    sums.part += part;
  }
}

// dD/ds over the logits s.
template <Divergence kKind, class A>
__attribute__((noinline)) void differentiate(const Relation<A>& relation, A* s, const A* t, int64_t n) {
  const Relation<A> row = relation;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kKind == Divergence::bhattacharyya) {
      // q - r as forward_kl's q - p.
      const A d = subtract(s[i], t[i], row.centred) / 2;
      const bool rises = d > 0;
      const A q = exp_difference(s[i], row.student_anchor) * row.student_inverse;
      const A r = exp_mean(s[i], t[i], row.mean_anchor) * row.mean_inverse;
      s[i] = choose(rises, -q, r) * decay(choose(rises, -d, d)).expm1 / 2;
    } else if constexpr (kKind == Divergence::reverse_kl) {
      const A q = exp_difference(s[i], row.student_anchor) * row.student_inverse;
      // Beside an infinite D, that column's own part of it remains.
      const A above = s[i] - t[i] < static_cast<A>(kInfinity) ? subtract(s[i], t[i], row.centred) : A(kInfinity);
      s[i] = q == 0 ? A(0) : q * above;
    } else {
      const Pair<A> pair = compare(s[i], t[i], row);
      const Decay<A> e = decay(pair.x);
      const A q = pair.greater * choose(pair.d > 0, A(1), e.exp);
      if constexpr (kKind == Divergence::forward_kl) {
        s[i] = choose(pair.d > 0, -pair.greater, pair.greater) * e.expm1;
      } else if constexpr (kKind == Divergence::jsd) {
        const Logarithm<A> log = log_mixture(pair.d, e.exp, e.expm1, row.student_weight, row.teacher_weight);
        const A share = log_share(pair.d, e.exp, log.log1p);
        s[i] = row.student_weight * q * ((share - row.centre.high) - row.centre.low);
      } else {
        const A not_above = pair.d < 0 ? -row.above : (row.below - row.above) / 2;
        s[i] = q * choose(pair.d > 0, row.below, not_above);
      }
    }
  }
}

// u - w = ((s - t) + student s - teacher t) / longer, where the weight of the longer is 0: u and w are not rounded
// alone.
template <class A>
struct Directions {
  A student = 0, teacher = 0;       // |t| / |s| - 1 or 0, and |s| / |t| - 1 or 0
  A inverse = 0;                    // 1 / max(|s|, |t|)
  A inverse_length = 0, value = 0;  // 1 / |s|, D
};

template <class A>
inline A subtract_units(A s, A t, const Directions<A>& row) {
  return ((s - t) + (row.student * s - row.teacher * t)) * row.inverse;
}

struct SquareSums {
  double student = 0, teacher = 0;
  double difference = 0;  // |s|^2 - |t|^2
};

template <class A>
__attribute__((noinline)) void add_squares(const A* s, const A* t, int64_t n, SquareSums& sums) {
  double student = 0, teacher = 0, difference = 0;
#pragma omp simd reduction(+ : student, teacher, difference)
  for (int64_t i = 0; i < n; ++i) {
    student += s[i] * s[i];
    teacher += t[i] * t[i];
    difference += (s[i] - t[i]) * (s[i] + t[i]);
  }
  sums.student += student;
  sums.teacher += teacher;
  sums.difference += difference;
}

// The sum of (u - w)^2 / 2.
template <class A>
__attribute__((noinline)) double half_square_distance(const Directions<A>& directions, const A* s, const A* t,
                                                      int64_t n) {
  const Directions<A> row = directions;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A difference = subtract_units(s[i], t[i], row);
    sum += difference * difference;
  }
  return sum / 2;
}

template <class A>
__attribute__((noinline)) void differentiate_cosine(const Directions<A>& directions, A* s, const A* t, int64_t n) {
  const Directions<A> row = directions;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A unit = s[i] * row.inverse_length;
    s[i] = row.inverse_length * (subtract_units(s[i], t[i], row) - row.value * unit);
  }
}
