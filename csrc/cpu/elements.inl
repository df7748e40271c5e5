// SPDX-License-Identifier: Apache-2.0
// Element types of a tile and their conversions, in bit arithmetic that every compiler vectorises. What works on a row
// reads and writes blocks of it in the arithmetic's type A, so that it is compiled for that type alone and not for each
// that a tile may have. Included inside an anonymous namespace by row_kernels.inl, once per instruction set.

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float load(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponents differ in bias by 112; the product also normalises subnormal halves.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

inline void store(double& to, double x) { to = x; }
inline void store(float& to, float x) { to = x; }

// Both round to nearest, ties to even, and keep NaN a NaN.
inline void store(BFloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(Float16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24, which is the spacing of floats around one half.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

template <class A>
struct ElementOf;
template <>
struct ElementOf<double> {
  static constexpr Element value = Element::float64;
};
template <>
struct ElementOf<float> {
  static constexpr Element value = Element::float32;
};

template <Element kElement>
struct TypeOf;
template <>
struct TypeOf<Element::float64> {
  using type = double;
};
template <>
struct TypeOf<Element::float32> {
  using type = float;
};
template <>
struct TypeOf<Element::bfloat16> {
  using type = BFloat16;
};
template <>
struct TypeOf<Element::float16> {
  using type = Float16;
};

// What a row of such elements is worked on in.
template <Element kElement>
using ArithmeticOf = std::conditional_t<kElement == Element::float64, double, float>;

constexpr int64_t size_of(Element element) {
  switch (element) {
    case Element::float64:
      return sizeof(double);
    case Element::float32:
      return sizeof(float);
    case Element::bfloat16:
    case Element::float16:
      break;
  }
  return sizeof(uint16_t);
}

inline void* element_at(void* first, Element element, int64_t i) {
  return static_cast<char*>(first) + i * size_of(element);
}
inline const void* element_at(const void* first, Element element, int64_t i) {
  return static_cast<const char*>(first) + i * size_of(element);
}

template <class T, class A>
__attribute__((noinline)) void read_elements(const void* from, int64_t n, A scale, A* to) {
  const T* x = static_cast<const T*>(from);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(load(x[i])) * scale;
}

template <class T, class A>
__attribute__((noinline)) void write_elements(void* to, int64_t n, const A* from) {
  T* x = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(x[i], static_cast<decltype(load(*x))>(from[i]));
}

// n elements from the i-th on, times `scale`.
template <class A>
__attribute__((noinline)) void read_block(const void* row, Element element, int64_t i, int64_t n, A scale, A* to) {
  const void* from = element_at(row, element, i);
  switch (element) {
    case Element::float64:
      if constexpr (sizeof(A) == sizeof(double)) read_elements<double>(from, n, scale, to);
      return;
    case Element::float32:
      return read_elements<float>(from, n, scale, to);
    case Element::bfloat16:
      return read_elements<BFloat16>(from, n, scale, to);
    case Element::float16:
      return read_elements<Float16>(from, n, scale, to);
  }
}

// Where results for the elements from the i-th on may be formed for ``write_block``: there, or else in `buffer`.
template <class A>
inline A* room_for(void* row, Element element, int64_t i, A* buffer) {
  return element == ElementOf<A>::value ? static_cast<A*>(row) + i : buffer;
}

// Rounded once.
template <class A>
__attribute__((noinline)) void write_block(void* row, Element element, int64_t i, int64_t n, const A* from) {
  void* to = element_at(row, element, i);
  if (to == from) return;
  switch (element) {
    case Element::float64:
      if constexpr (sizeof(A) == sizeof(double)) write_elements<double>(to, n, from);
      return;
    case Element::float32:
      return write_elements<float>(to, n, from);
    case Element::bfloat16:
      return write_elements<BFloat16>(to, n, from);
    case Element::float16:
      return write_elements<Float16>(to, n, from);
  }
}
