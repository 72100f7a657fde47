// Taps outside the input. The input is 0 there, and its product with a non-finite kernel weight
// (forward) or output gradient (kernel gradient) is NaN. Most other loops skip these taps, which add
// nothing for finite values; non-finite ones are detected and added here. Rows packed with zeros need
// it for the first two dimensions only, in the forward pass. Included only by kernels.cpp, inside its
// unnamed namespace.

// Whether all of `count` contiguous values are finite.
template <class T>
inline bool finite(const T* from, index_t count) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / sizeof(T);
  using V = Simd<T, kLanes>;
  T part[kLanes] = {};
  if (count < kLanes) {
    for (index_t n = 0; n < count; ++n) part[n] = from[n] * T(0);
  } else {
    typename V::Vector sum[2] = {};
    index_t n = 0;
    for (; n + 2 * kLanes <= count; n += 2 * kLanes)
      for (int v = 0; v < 2; ++v) sum[v] += V::load(from + n + v * kLanes) * T(0);
    if (n + kLanes <= count) sum[0] += V::load(from + n) * T(0);
    // The last vector overlaps the previous one.
    sum[1] += V::load(from + count - kLanes) * T(0);
    V::store(part, sum[0] + sum[1]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0] == 0;
}

// Calls fn(first tap, count) for runs of taps outside the input, given the ranges inside.
template <class Fn>
inline void for_each_outside_run(const Dimension* d, const TapRange& r0, const TapRange& r1,
                                 const TapRange& r2, Fn fn) {
  const auto overlaps = [](const TapRange& r, index_t tap) {
    return tap >= r.tap && tap < r.tap + r.count;
  };
  for (index_t a = 0; a < d[0].taps; ++a)
    for (index_t b = 0; b < d[1].taps; ++b) {
      const index_t row = (a * d[1].taps + b) * d[2].taps, end = r2.tap + r2.count;
      if (!overlaps(r0, a) || !overlaps(r1, b)) {
        fn(row, d[2].taps);
      } else {
        if (r2.tap > 0) fn(row, r2.tap);
        if (end < d[2].taps) fn(row + end, d[2].taps - end);
      }
    }
}

constexpr index_t kSmallKernelElements = 512;

// Adds them at one position, with lanes along channels or groups.
template <class T>
inline void add_outside_taps(const Plan& plan, const TapRange& r0, const TapRange& r1,
                             const TapRange& r2, const T* weights, T* result) {
  const Dimension* d = plan.dimension;
  const bool groups_inner = plan.vector_axis == VectorAxis::groups;
  const Tensor &w = plan.weights, &to = plan.result;
  if (plan.pass == Pass::forward) {
    // Testing all taps of a small kernel is faster than testing each run.
    const index_t elements = d[0].taps * d[1].taps * d[2].taps * w.inner_padded;
    bool all = elements <= kSmallKernelElements && finite(weights, elements);
    if (!all) {
      all = true;
      for_each_outside_run(d, r0, r1, r2, [&](index_t tap, index_t count) {
        all = all && finite(weights + tap * w.inner_padded, count * w.inner_padded);
      });
    }
    if (all) return;
    for_each_outside_run(d, r0, r1, r2, [&](index_t tap, index_t count) {
      for (index_t t = tap; t < tap + count; ++t)
        for (index_t g = 0; g < w.inner_count; ++g) {
          const T term = weights[t * w.inner_padded + g] * T(0);
          for (index_t c = 0; c < (groups_inner ? to.outer_count : to.inner_count); ++c)
            result[groups_inner ? c * to.inner_padded + g : g * to.inner_padded + c] += term;
        }
    });
  } else if (!finite(weights, w.outer_count * w.inner_padded)) {
    for (index_t g = 0; g < to.inner_count; ++g) {
      T sum = 0;
      for (index_t c = 0; c < (groups_inner ? w.outer_count : w.inner_count); ++c)
        sum += weights[groups_inner ? c * w.inner_padded + g : g * w.inner_padded + c] * T(0);
      for_each_outside_run(d, r0, r1, r2, [&](index_t tap, index_t count) {
        for (index_t t = tap; t < tap + count; ++t) result[t * to.inner_padded + g] += sum;
      });
    }
  }
}

// Forward: adds them at `count` positions of a row, with lanes along positions.
template <class T>
inline void add_outside_taps_row(const Plan& plan, const TapRange& r0, const TapRange& r1,
                                 index_t count, const T* weights, const TensorView& w, T* result,
                                 const TensorView& to) {
  for (index_t g = 0; g < plan.values.outer_count; ++g)
    for_each_outside_run(
        plan.dimension, r0, r1, {plan.dimension[2].taps, 0, 0}, [&](index_t tap, index_t taps) {
          for (index_t t = tap; t < tap + taps; ++t) {
            const T* const factors = weights + t * w.outer_stride + g * w.inner_stride;
            if (finite(factors, count)) continue;
            for (index_t c = 0; c < plan.values.inner_count; ++c)
              for (index_t k = 0; k < count; ++k)
                result[g * to.outer_stride + c * to.inner_stride + k] += factors[k] * T(0);
          }
        });
}

template <class T>
void add_outside_taps(const Plan& plan, const Region& region, const TensorView& weights,
                      const TensorView& result) {
  const Dimension* d = plan.dimension;
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j) {
      const TapRange &r0 = d[0].tap_ranges[i], &r1 = d[1].tap_ranges[j];
      const bool rows_inside = r0.count * r1.count == d[0].taps * d[1].taps;
      if (plan.vector_axis == VectorAxis::positions) {
        if (!rows_inside)
          add_outside_taps_row(plan, r0, r1, region.high[2] - region.low[2],
                               element_ptr<T>(weights, i, j, region.low[2]), weights,
                               element_ptr<T>(result, i, j, region.low[2]), result);
        continue;
      }
      for (index_t k = region.low[2]; k < region.high[2]; ++k)
        if (!rows_inside || d[2].tap_ranges[k].count < d[2].taps)
          add_outside_taps(plan, r0, r1, d[2].tap_ranges[k], element_ptr<T>(weights, i, j, k),
                           element_ptr<T>(result, i, j, k));
    }
}
