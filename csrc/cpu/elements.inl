// SPDX-License-Identifier: Apache-2.0
// Element types of a tile and their conversions, in bit arithmetic that every compiler vectorises. Included inside an
// anonymous namespace by row_kernels.inl, once per instruction set.

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
