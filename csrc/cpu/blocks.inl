// SPDX-License-Identifier: Apache-2.0
// Blocks of a row of any elements, read and written in the arithmetic's type A: what works on rows is compiled for that
// type alone, and not for each that a tile may have. Included inside an anonymous namespace by row_kernels.inl, once
// per instruction set.

#include "elements.inl"

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
