// Half types to float and back, without branches so that loops over them become vectors, and
// without numbers below the smallest normal float, which some threads flush to zero. Included by
// kernels.cpp alone, inside its unnamed namespace.

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return float_of(std::uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t rest = std::uint32_t(x.bits & 0x7fff) << 13;
  const std::uint32_t exponent = rest & 0x0f800000;
  // The exponent's bias goes from 15 to 127; once more for infinities and NaN.
  const std::uint32_t normal = rest + (exponent == 0x0f800000 ? 0x70000000u : 0x38000000u);
  const std::uint32_t subnormal = bits_of(float_of(rest + 0x38800000) - float_of(0x38800000));
  return float_of(sign | (exponent == 0 ? subnormal : normal));
}

inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t nearest = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const std::uint32_t nan = u >> 16 | 0x40;
  to.bits = std::uint16_t((u & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}
inline void narrow(float x, Float16& to) {
  const std::uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  // To the nearest, ties to even; below 2^-14 by adding a number whose last digit is the last here.
  const std::uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  const std::uint32_t subnormal = bits_of(float_of(rest < 0x38800000 ? rest : 0) + 0.5f) - 0x3f000000;
  const std::uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  const std::uint32_t small = rest < 0x38800000 ? subnormal : normal;
  to.bits = std::uint16_t(sign | (rest >= 0x477ff000 ? large : small));
}
