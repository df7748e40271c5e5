// SPDX-License-Identifier: Apache-2.0
// The terms of divergence_rows.inl at each column of a block. Included inside an anonymous namespace by it, once per
// instruction set.

#include "logarithm.inl"

// exp(x) - 1 - x for x in [-1, 0], with all its digits: x^2 times a polynomial that is off by 9e-9 of it at most.
inline float near_excess(float x) {
  float q = 0x1.1c01c0p-16f;
  q = q * x + 0x1.8af216p-13f;
  q = q * x + 0x1.6a58aap-10f;
  q = q * x + 0x1.10fdeap-7f;
  q = q * x + 0x1.55548cp-5f;
  q = q * x + 0x1.555552p-3f;
  q = q * x + 0.5f;
  return x * x * q;
}

// By 2e-17.
inline double near_excess(double x) {
  double q = 0x1.06c965425b395p-37;
  q = q * x + 0x1.49b7ee1491ae6p-33;
  q = q * x + 0x1.1c91f3c8b5a06p-29;
  q = q * x + 0x1.ae14b8349c506p-26;
  q = q * x + 0x1.27e168f93ba8cp-22;
  q = q * x + 0x1.71de01c1d7632p-19;
  q = q * x + 0x1.a019ff3938fd0p-16;
  q = q * x + 0x1.a01a018e9499dp-13;
  q = q * x + 0x1.6c16c16bc49e1p-10;
  q = q * x + 0x1.11111111102bbp-7;
  q = q * x + 0x1.555555555552cp-5;
  q = q * x + 0x1.5555555555555p-3;
  q = q * x + 0.5;
  return x * x * q;
}

// Of x <= 0 and exp(x), which may be off by a few units in its last place.
template <class A>
struct Decay {
  A exp;
  A expm1;         // exp(x) - 1
  A from_greater;  // exp(x) - 1 - x: of log(greater/lesser), over greater
  A from_lesser;   // 1 - exp(x) + x exp(x): of lesser/greater log(lesser/greater), over greater
};

template <class A>
__attribute__((always_inline)) inline Decay<A> decay(A x, A exp) {
  const A lowest = Exponent<A>::kLowest;
  // x times exp would be NaN at -inf.
  const A bounded = x < lowest ? lowest : x;
  const bool near = !(x < -1);  // NaN too, which the polynomial keeps
  const A excess = near_excess(x);
  const A expm1 = choose(near, x + excess, exp - 1);
  return {choose(near, 1 + expm1, exp), expm1, choose(near, excess, expm1 - x),
          choose(near, x * expm1 - excess, bounded * exp - expm1)};
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

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
  A mean_anchor = 0, mean_inverse = 0;  // r = exp((s + t - mean_anchor) / 2) mean_inverse
  Shift<A> shift;                       // lse_s - lse_t
  Shift<A> centred;                     // reverse_kl: the mean of s - t under q; bhattacharyya: 2 D more than shift
  A student_weight = 0, teacher_weight = 0;  // 1 - beta and beta: a beta close to 1 leaves few digits to the other
  A value = 0;
  Shift<A> centre;         // jsd: the mean of log(q/m) under q
  A above = 0, below = 0;  // tv: how much of q lies where it is above and below p
};

// A block of both rows: logits, and exponentials that are probabilities over the scales.
template <class A>
struct Block {
  A* s;
  const A* t;
  const A *s_exps, *t_exps;
  A s_scale, t_scale;
  int64_t size;
};

template <class A>
struct Pair {
  A d;  // log(q/p)
  A x;
  A q;
  A greater;
  A ratio;  // lesser / greater
};

template <class A>
__attribute__((always_inline)) inline A ratio_of(A lesser, A greater) {
  return choose(greater == 0, A(0), lesser / greater);
}

template <class A>
__attribute__((always_inline)) inline Pair<A> compare(const Block<A>& block, int64_t i, const Relation<A>& row) {
  const A d = subtract(block.s[i], block.t[i], row.shift);
  const A q = block.s_exps[i] * block.s_scale, p = block.t_exps[i] * block.t_scale;
  const bool rises = d > 0;
  const A greater = choose(rises, q, p);
  return {d, choose(rises, -d, d), q, greater, ratio_of(choose(rises, p, q), greater)};
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
__attribute__((noinline)) void add_terms(const Relation<A>& relation, const Block<A>& given, DivergenceSums& sums) {
  const Relation<A> row = relation;
  const Block<A> block = given;
  const double shift = static_cast<double>(row.shift.high) + row.shift.low;
  for (int64_t start = 0; start < block.size; start += kPart) {
    const int64_t stop = block.size - start < kPart ? block.size : start + kPart;
    A value = 0;
    // Of terms of both signs, or beside which a small one must not be lost.
    double excess = 0, weight = 0, part = 0;
#pragma omp simd reduction(+ : value, excess, weight, part)
    for (int64_t i = start; i < stop; ++i) {
      const Pair<A> pair = compare(block, i, row);
      if constexpr (kKind == Divergence::bhattacharyya) {
        const A root = decay(pair.x / 2, square_root(pair.ratio)).expm1;
        const A difference = pair.greater * root * (2 + root);
        excess += choose(pair.d > 0, -difference, difference);
        value += pair.greater * root * root / 2;
      } else {
        const Decay<A> e = decay(pair.x, pair.ratio);
        const A difference = pair.greater * e.expm1;
        excess += choose(pair.d > 0, -difference, difference);
        const A q = pair.q;
        if constexpr (kKind == Divergence::forward_kl || kKind == Divergence::reverse_kl) {
          const bool forward = kKind == Divergence::forward_kl;
          weight += forward ? pair.greater * choose(pair.d > 0, e.exp, A(1)) : q;
          const A term = forward ? choose(pair.d > 0, e.from_lesser, e.from_greater)
                                 : choose(pair.d > 0, e.from_greater, e.from_lesser);
          // Infinite only where the other has no probability at all, also if this one's was rounded to 0.
          value += term < static_cast<A>(kInfinity) ? pair.greater * term : term;
          if constexpr (!forward) part += q == 0 ? 0.0 : q * ((static_cast<double>(block.s[i]) - block.t[i]) - shift);
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
__attribute__((noinline)) void differentiate(const Relation<A>& relation, const Block<A>& given) {
  const Relation<A> row = relation;
  const Block<A> block = given;
#pragma omp simd
  for (int64_t i = 0; i < block.size; ++i) {
    const A s = block.s[i], t = block.t[i];
    if constexpr (kKind == Divergence::bhattacharyya) {
      // q - r as forward_kl's q - p.
      const A d = subtract(s, t, row.centred) / 2;
      const bool rises = d > 0;
      const A q = block.s_exps[i] * block.s_scale;
      const A r = exp_mean(s, t, row.mean_anchor) * row.mean_inverse;
      const A greater = choose(rises, q, r);
      const A expm1 = decay(choose(rises, -d, d), ratio_of(choose(rises, r, q), greater)).expm1;
      block.s[i] = choose(rises, -greater, greater) * expm1 / 2;
    } else if constexpr (kKind == Divergence::reverse_kl) {
      const A q = block.s_exps[i] * block.s_scale;
      // Beside an infinite D, that column's own part of it remains.
      const A above = s - t < static_cast<A>(kInfinity) ? subtract(s, t, row.centred) : A(kInfinity);
      block.s[i] = q == 0 ? A(0) : q * above;
    } else {
      const Pair<A> pair = compare(block, i, row);
      const Decay<A> e = decay(pair.x, pair.ratio);
      if constexpr (kKind == Divergence::forward_kl) {
        block.s[i] = choose(pair.d > 0, -pair.greater, pair.greater) * e.expm1;
      } else if constexpr (kKind == Divergence::jsd) {
        const Logarithm<A> log = log_mixture(pair.d, e.exp, e.expm1, row.student_weight, row.teacher_weight);
        const A share = log_share(pair.d, e.exp, log.log1p);
        block.s[i] = row.student_weight * pair.q * ((share - row.centre.high) - row.centre.low);
      } else {
        const A not_above = pair.d < 0 ? -row.above : (row.below - row.above) / 2;
        block.s[i] = pair.q * choose(pair.d > 0, row.below, not_above);
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
