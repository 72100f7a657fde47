// Conversions between half-precision types and float. Branch-free, so that loops over them
// vectorize, and free of subnormal floats, which threads may flush to zero. Included only by
// kernels.cpp, inside its unnamed namespace.

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline std::uint32_t bit_cast_to_int(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float bit_cast_to_float(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline double to_float(double x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast_to_float(std::uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13;
  const std::uint32_t exponent = magnitude & 0x0f800000;
  // Rebiases the exponent from 15 to 127; twice for infinities and NaN.
  const std::uint32_t normal = magnitude + (exponent == 0x0f800000 ? 0x70000000u : 0x38000000u);
  const std::uint32_t subnormal =
      bit_cast_to_int(bit_cast_to_float(magnitude + 0x38800000) - bit_cast_to_float(0x38800000));
  return bit_cast_to_float(sign | (exponent == 0 ? subnormal : normal));
}

inline void from_float(double x, double& to) { to = x; }
inline void from_float(float x, float& to) { to = x; }
inline void from_float(float x, BFloat16& to) {
  const std::uint32_t u = bit_cast_to_int(x);
  const std::uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const std::uint32_t nan = u >> 16 | 0x40;
  to.bits = std::uint16_t((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
inline void from_float(float x, Float16& to) {
  const std::uint32_t u = bit_cast_to_int(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  // Round to nearest, ties to even; below 2^-14 by adding 0.5, whose ulp is the smallest half.
  const std::uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const std::uint32_t subnormal =
      bit_cast_to_int(bit_cast_to_float(magnitude < 0x38800000 ? magnitude : 0) + 0.5f) -
      0x3f000000;
  const std::uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const std::uint32_t small = magnitude < 0x38800000 ? subnormal : normal;
  to.bits = std::uint16_t(sign | (magnitude >= 0x477ff000 ? large : small));
}
