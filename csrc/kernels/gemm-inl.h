// Matrix products that fit into caches: kernels from hidden vectors, and their gradients. Included
// only by kernels.cpp, inside its unnamed namespace.

// Register tile: kMR rows x kNR vectors of columns.
constexpr int kMR = INVOLUTION_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kNR = INVOLUTION_VECTOR_BYTES == 16 ? 2 : 3;
// Length of a block along k: its rows of B fit into L1.
constexpr index_t kKC = 256;

template <class T, int kLanes, int kRows, int kColumns>
inline void gemm_microkernel(const GemmArgs& p, index_t row, index_t column, index_t low,
                             index_t high) {
  using V = Simd<T, kLanes>;
  T* const to = static_cast<T*>(p.c) + row * p.c_row_stride + column;
  typename V::Vector sum[kRows][kColumns];
  const bool first = low == 0 && !p.accumulate;
  const T* const bias = static_cast<const T*>(p.bias);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v)
      sum[r][v] = !first            ? V::load(to + r * p.c_row_stride + v * kLanes)
                  : bias != nullptr ? V::load(bias + column + v * kLanes)
                                    : typename V::Vector{};
  const T* a = static_cast<const T*>(p.a) + row * p.a_row_stride + low * p.a_k_stride;
  const T* b = static_cast<const T*>(p.b) + low * p.b_k_stride + column;
  for (index_t n = low; n < high; ++n) {
    typename V::Vector b_vec[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) b_vec[v] = V::load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) sum[r][v] += a[r * p.a_row_stride] * b_vec[v];
    a += p.a_k_stride;
    b += p.b_k_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) V::store(to + r * p.c_row_stride + v * kLanes, sum[r][v]);
}

template <class T, int kLanes>
void gemm_typed(const GemmArgs& p) {
  // With k = 0 the bias is still stored.
  for (index_t low = 0; low == 0 || low < p.k; low += kKC) {
    const index_t high = p.k - low < kKC ? p.k : low + kKC;
    for_each_tile_with_tail<kNR>(p.columns / kLanes, [&](auto columns, index_t v) {
      constexpr int kColumns = decltype(columns)::value;
      for_each_pow2_tile<kMR>(p.rows, [&](auto rows, index_t r) {
        gemm_microkernel<T, kLanes, decltype(rows)::value, kColumns>(p, r, v * kLanes, low, high);
      });
    });
  }
}

void gemm(DataType type, const GemmArgs& p) {
  if (type == DataType::float64)
    gemm_typed<double, INVOLUTION_VECTOR_BYTES / 8>(p);
  else
    gemm_typed<float, INVOLUTION_VECTOR_BYTES / 4>(p);
}

#if INVOLUTION_VECTOR_BYTES == 64
// bfloat16 pairs: an element of A or B packs two k, the first in its lower half, and one
// instruction multiplies and adds both. Support is detected at run time, so that this is a function
// for another compiler target and cannot be part of `gemm_microkernel`.
template <int kRows, int kColumns>
__attribute__((target("avx512bf16"))) void gemm_bf16_microkernel(const GemmArgs& p, index_t row,
                                                                 index_t column) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / 4;
  float* const to = static_cast<float*>(p.c) + row * p.c_row_stride + column;
  __m512 sum[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v)
      sum[r][v] = _mm512_loadu_ps(static_cast<const float*>(p.bias) + column + v * kLanes);
  const std::int32_t* a = static_cast<const std::int32_t*>(p.a) + row * p.a_row_stride;
  const std::int32_t* b = static_cast<const std::int32_t*>(p.b) + column;
  for (index_t n = 0; n < p.k; ++n) {
    __m512i b_vec[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) b_vec[v] = _mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * p.a_row_stride, sizeof pair);  // 2-byte aligned
      const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], reinterpret_cast<__m512bh>(both),
                                     reinterpret_cast<__m512bh>(b_vec[v]));
    }
    ++a;
    b += p.b_k_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v)
      _mm512_storeu_ps(to + r * p.c_row_stride + v * kLanes, sum[r][v]);
}

void gemm_bf16(const GemmArgs& p) {
  for_each_tile_with_tail<kNR>(p.columns / (INVOLUTION_VECTOR_BYTES / 4),
                               [&](auto columns, index_t v) {
                                 constexpr int kColumns = decltype(columns)::value;
                                 for_each_pow2_tile<kMR>(p.rows, [&](auto rows, index_t r) {
                                   gemm_bf16_microkernel<decltype(rows)::value, kColumns>(
                                       p, r, v * (INVOLUTION_VECTOR_BYTES / 4));
                                 });
                               });
}
#endif
