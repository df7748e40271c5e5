// SPDX-License-Identifier: Apache-2.0
// exp and tanh without branches or calls, so that loops over them vectorise. Included inside an anonymous namespace by
// row_kernels.inl, once per instruction set.
//
//     x = k ln 2 + r, |r| <= ln 2 / 2;   exp(x) = 2^k (1 + r + q(r)),   q about exp(r) - 1 - r
//
// float: minimax of degree 6, exp(r) is off by 1e-8 of it at most; double: Taylor of degree 13, 4e-18.

inline float excess_reduced(float r) {
  float q = 0x1.6d10fcp-10f;
  q = q * r + 0x1.120b62p-7f;
  q = q * r + 0x1.55551ap-5f;
  q = q * r + 0x1.5554dep-3f;
  q = q * r + 0.5f;
  return r * r * q;
}

inline double excess_reduced(double r) {
  double q = 1.0 / 6227020800.0;
  q = q * r + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  return r * r * q;
}

template <class T>
struct Exponent;

template <>
struct Exponent<float> {
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits: k * high is exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLowest = -87.33f;  // below, the result would be subnormal: 0
  static constexpr float kTanhOne = 40.0f;   // beyond, 1 - tanh^2 counts as 0
  static constexpr int kShift = 23;
};

template <>
struct Exponent<double> {
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLowest = -708.3;
  static constexpr double kTanhOne = 350.0;
  static constexpr int kShift = 52;
};

// One of two numbers, in bit arithmetic: several conditional expressions on one condition become a branch, and the loop
// is not vectorised.
template <class T>
inline T choose(bool condition, T yes, T no) {
  using Bits = typename Exponent<T>::Unsigned;
  const Bits mask = -static_cast<Bits>(condition);
  return bit_cast<T>((bit_cast<Bits>(yes) & mask) | (bit_cast<Bits>(no) & ~mask));
}

template <class T>
struct Reduced {
  T power;  // 2^k
  T rest;   // expm1(r)
};

// Of x + beyond, where `beyond` is what x has lost.
template <class T>
inline Reduced<T> reduce_exp(T x, T beyond = 0) {
  using E = Exponent<T>;
  using Bits = typename E::Bits;
  const T shifted = x * E::kLog2e + E::kRound;
  const T k = shifted - E::kRound;
  const T r = ((x - k * E::kLn2High) - k * E::kLn2Low) + beyond;
  const Bits one = bit_cast<Bits>(T(1));
  // The rounding constant's own bits leave at the top.
  const Bits power = one + static_cast<Bits>(bit_cast<typename E::Unsigned>(shifted) << E::kShift);
  return {bit_cast<T>(power), r + excess_reduced(r)};
}

// For x up to 88 (double: 709); 0 where the result would be subnormal; NaN stays NaN.
template <class T>
inline T exponential(T x) {
  using E = Exponent<T>;
  const Reduced<T> e = reduce_exp(x < E::kLowest ? E::kLowest : x);
  const T value = e.power + e.power * e.rest;
  return x < E::kLowest ? T(0) : value;
}

template <class T>
struct Tangent {
  T tanh;
  T slope;  // 1 - tanh^2, from e^{-2|x|}: the subtraction would cancel where tanh is close to 1
};

template <class T>
__attribute__((always_inline)) inline Tangent<T> hyperbolic_tangent(T x) {
  using E = Exponent<T>;
  const T magnitude = choose(x < 0, -x, x);
  const T bounded = choose(magnitude > E::kTanhOne, E::kTanhOne, magnitude);
  const Reduced<T> e = reduce_exp(-2 * bounded);
  const T exp = e.power + e.power * e.rest;
  const T expm1 = e.power * e.rest + (e.power - 1);
  const T tanh = -expm1 / (2 + expm1);
  const T slope = 4 * exp / ((2 + expm1) * (2 + expm1));
  return {choose(x < 0, -tanh, tanh), choose(magnitude > E::kTanhOne, T(0), slope)};
}
