// Products of matrices, small enough for the caches: kernels from hidden vectors, and their
// gradients. Included by kernels.cpp alone, inside its unnamed namespace.

// Rows and vectors of columns whose sums fit into registers.
constexpr int ROWS = INVOLUTION_BYTES == 64 ? 8 : 4;
constexpr int COLUMNS = INVOLUTION_BYTES == 16 ? 2 : 3;
// Terms that are added up before the sums are stored: what these rows of B take fits into the first
// cache.
constexpr Size TERMS = 256;

template <class S, int L, int Rows, int Columns>
inline void product_block(const Product& p, Size row, Size column, Size low, Size high) {
  using V = Vectors<S, L>;
  S* const to = static_cast<S*>(p.c) + row * p.c_row + column;
  typename V::Vector sum[Rows][Columns];
  const bool first = low == 0 && !p.add;
  const S* const start = static_cast<const S*>(p.start);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v)
      sum[r][v] = !first             ? V::load(to + r * p.c_row + v * L)
                  : start != nullptr ? V::load(start + column + v * L)
                                     : typename V::Vector{};
  const S* a = static_cast<const S*>(p.a) + row * p.a_row + low * p.a_term;
  const S* b = static_cast<const S*>(p.b) + low * p.b_term + column;
  for (Size n = low; n < high; ++n) {
    typename V::Vector by[Columns];
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v) by[v] = V::load(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Columns; ++v) sum[r][v] += a[r * p.a_row] * by[v];
    a += p.a_term;
    b += p.b_term;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v) V::store(to + r * p.c_row + v * L, sum[r][v]);
}

template <class S, int L>
void multiply_as(const Product& p) {
  // Without terms there is still something to store.
  for (Size low = 0; low == 0 || low < p.terms; low += TERMS) {
    const Size high = p.terms - low < TERMS ? p.terms : low + TERMS;
    few_pieces<COLUMNS>(p.columns / L, [&](auto columns, Size v) {
      constexpr int Columns = decltype(columns)::value;
      each_piece<ROWS>(p.rows, [&](auto rows, Size r) {
        product_block<S, L, decltype(rows)::value, Columns>(p, r, v * L, low, high);
      });
    });
  }
}

void multiply(Type type, const Product& p) {
  if (type == Type::float64)
    multiply_as<double, INVOLUTION_BYTES / 8>(p);
  else
    multiply_as<float, INVOLUTION_BYTES / 4>(p);
}

#if INVOLUTION_BYTES == 64
// Of pairs of bfloat16: a number of A or B holds two terms, the first one in its lower half. Each is
// two multiply-adds for what one takes. Whether the processor has this is asked when it runs: a
// function for another target, which cannot be part of `product_block`.
template <int Rows, int Columns>
__attribute__((target("avx512bf16"))) void pairs_block(const Product& p, Size row, Size column) {
  constexpr int L = INVOLUTION_BYTES / 4;
  float* const to = static_cast<float*>(p.c) + row * p.c_row + column;
  __m512 sum[Rows][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v)
      sum[r][v] = _mm512_loadu_ps(static_cast<const float*>(p.start) + column + v * L);
  const std::int32_t* a = static_cast<const std::int32_t*>(p.a) + row * p.a_row;
  const std::int32_t* b = static_cast<const std::int32_t*>(p.b) + column;
  for (Size n = 0; n < p.terms; ++n) {
    __m512i by[Columns];
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v) by[v] = _mm512_loadu_si512(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * p.a_row, sizeof pair);  // on a boundary of two bytes
      const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < Columns; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], reinterpret_cast<__m512bh>(both),
                                     reinterpret_cast<__m512bh>(by[v]));
    }
    ++a;
    b += p.b_term;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Columns; ++v) _mm512_storeu_ps(to + r * p.c_row + v * L, sum[r][v]);
}

void multiply_pairs(const Product& p) {
  few_pieces<COLUMNS>(p.columns / (INVOLUTION_BYTES / 4), [&](auto columns, Size v) {
    constexpr int Columns = decltype(columns)::value;
    each_piece<ROWS>(p.rows, [&](auto rows, Size r) {
      pairs_block<decltype(rows)::value, Columns>(p, r, v * (INVOLUTION_BYTES / 4));
    });
  });
}
#endif
