// SPDX-License-Identifier: Apache-2.0
// log(1 + y) without branches or calls, so that loops over it vectorise. Included inside an anonymous namespace by
// divergence_terms.inl, once per instruction set.
//
//     1 + y = 2^k f, sqrt(1/2) <= f < sqrt(2);   z = u / (2 + u), u = f - 1 (y itself where k = 0);
//     log(1 + y) = k ln 2 + 2 z (1 + z^2 P(z^2)),   P the Taylor polynomial of (atanh(z) / z - 1) / z^2
//
// float: up to z^8, truncation 2e-9; double: up to z^20, truncation 6e-19.

inline float atanh_reduced(float square) {
  float p = 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  return p * square + 1.0f / 3.0f;
}

inline double atanh_reduced(double square) {
  double p = 1.0 / 21.0;
  p = p * square + 1.0 / 19.0;
  p = p * square + 1.0 / 17.0;
  p = p * square + 1.0 / 15.0;
  p = p * square + 1.0 / 13.0;
  p = p * square + 1.0 / 11.0;
  p = p * square + 1.0 / 9.0;
  p = p * square + 1.0 / 7.0;
  p = p * square + 1.0 / 5.0;
  return p * square + 1.0 / 3.0;
}

template <class T>
struct Logarithm {
  T sum;     // 1 + y
  T log1p;   // log(1 + y)
  T excess;  // (1 + y) log(1 + y) - y >= 0 with all its digits, where k is 0
  T k;
};

// For y in [-1, 0], and `sum` = 1 + y, which may have digits that y has not; at -1 the logarithm counts as a finite
// one, which its factor 1 + y removes.
template <class T>
__attribute__((always_inline)) inline Logarithm<T> logarithm(T y, T sum) {
  using E = Exponent<T>;
  using Bits = typename E::Unsigned;
  const Bits one = bit_cast<Bits>(T(1));
  const Bits bits = bit_cast<Bits>(sum);
  // k and the bias of the exponent, which keeps it positive.
  const Bits biased = (bits + (one - bit_cast<Bits>(T(0.70710678118654752)))) >> E::kShift;
  const T k = bit_cast<T>(bit_cast<Bits>(E::kRound) + biased) - (E::kRound + static_cast<T>(one >> E::kShift));
  const T f = bit_cast<T>(bits + one - (biased << E::kShift));
  const T u = choose(k == 0, y, f - 1);
  const T z = u / (2 + u);
  const T p = atanh_reduced(z * z);
  const T log1p = k * E::kLn2High + (2 * z + (2 * z * z * z * p + k * E::kLn2Low));
  return {sum, log1p, y * z * (1 + z * (1 + z) * p), k};
}
