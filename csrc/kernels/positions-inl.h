// All passes with lanes along the positions of a row. Included only by kernels.cpp, inside its
// unnamed namespace.

// Calls fn(IntC<n>(), first) for pairs of vectors, then single ones, that cover [low, high). The
// last vector overlaps the previous one, and computes the same values. Rows shorter than a vector
// are packed with space for one.
template <int kLanes, int kVectors = 2, class Fn>
inline void for_each_vector_overlapping(index_t low, index_t high, Fn fn) {
  index_t k = low;
  if (kVectors == 2)
    for (; k + 2 * kLanes <= high; k += 2 * kLanes) fn(IntC<kVectors>(), k);
  for (; k + kLanes <= high; k += kLanes) fn(IntC<1>(), k);
  if (k < high) fn(IntC<1>(), high - low < kLanes ? low : high - kLanes);
}

// Tile: kVectors vectors of positions x kChannels channels.
template <class T, int kLanes, int kVectors, int kChannels>
inline void compute_tile_positions(const Plan& plan, const TensorView& values,
                                   const TensorView& weights, const TensorView& result, index_t i,
                                   index_t j, index_t k, index_t g, index_t c0) {
  using V = Simd<T, kLanes>;
  const Dimension *d0 = &plan.dimension[0], *d1 = &plan.dimension[1], *d2 = &plan.dimension[2];
  const TapRange r0 = d0->tap_ranges[i], r1 = d1->tap_ranges[j];
  const bool weights_at_source = plan.pass == Pass::input_grad;
  // All taps of a row, including those outside the input: packed rows are zero there.
  const index_t source2 = k + plan.source_offset;
  const index_t value_step = d2->source_step;
  const index_t weight_step =
      d2->tap_step * weights.outer_stride + (weights_at_source ? d2->source_step : 0);
  typename V::Vector sum[kVectors][kChannels];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int n = 0; n < kChannels; ++n) sum[v][n] = typename V::Vector{};
  for (index_t phase = 0; phase < plan.phases; ++phase)
    for (index_t a = 0; a < r0.count; ++a)
      for (index_t b = 0; b < r1.count; ++b) {
        const index_t source0 = r0.source + a * d0->source_step,
                      source1 = r1.source + b * d1->source_step;
        const index_t tap =
            ((r0.tap + a * d0->tap_step) * d1->taps + r1.tap + b * d1->tap_step) * d2->taps;
        const T* value = element_ptr<T>(values, source0, source1, source2) +
                         values.phase_offsets[phase] + g * values.outer_stride +
                         c0 * values.inner_stride;
        const T* weight = (weights_at_source ? element_ptr<T>(weights, source0, source1, source2)
                                             : element_ptr<T>(weights, i, j, k)) +
                          weights.phase_offsets[phase] + tap * weights.outer_stride +
                          g * weights.inner_stride;
        for (index_t c = 0; c < d2->taps; ++c) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            const typename V::Vector w = V::load(weight + v * kLanes);
#pragma GCC unroll 8
            for (int n = 0; n < kChannels; ++n)
              sum[v][n] += w * V::load(value + v * kLanes + n * values.inner_stride);
          }
          value += value_step;
          weight += weight_step;
        }
      }
  T* const to =
      element_ptr<T>(result, i, j, k) + g * result.outer_stride + c0 * result.inner_stride;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int n = 0; n < kChannels; ++n)
      V::store(to + v * kLanes + n * result.inner_stride, sum[v][n]);
}

template <class T, int kLanes>
void weighted_sum_positions(const Plan& plan, const Region& region, const TensorView& values,
                            const TensorView& weights, const TensorView& result) {
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t g = 0; g < plan.values.outer_count; ++g)
        for_each_vector_overlapping<kLanes>(
            region.low[2], region.high[2], [&](auto count, index_t k) {
              constexpr int kVectors = decltype(count)::value;
              for_each_tile_with_tail<8 / kVectors>(
                  plan.values.inner_count, [&](auto n, index_t c) {
                    compute_tile_positions<T, kLanes, kVectors, decltype(n)::value>(
                        plan, values, weights, result, i, j, k, g, c);
                  });
            });
}

// Finds the rows of the input that `rows` rows of the output, with ranges r0 and r1, read.
inline index_t find_source_rows(const Plan& plan, const TensorView& values, const TapRange& r0,
                                const TapRange* r1, index_t rows, SourceRow* sources) {
  const Dimension* d = plan.dimension;
  index_t count = 0;
  const index_t rows_read =
      rows == 1 ? r1[0].count : r1[rows - 1].source + r1[rows - 1].count - r1[0].source;
  for (index_t a = 0; a < r0.count; ++a)
    for (index_t n = 0; n < rows_read; ++n) {
      SourceRow source = {};
      source.offset = a * d[0].source_step * values.position_stride[0] +
                      n * d[1].source_step * values.position_stride[1];
      for (index_t r = 0; r < rows; ++r) {
        const index_t tap = n - (r1[r].source - r1[0].source);
        if (tap < 0 || tap >= r1[r].count) continue;
        if (source.count++ == 0)
          source.first = r, source.tap_row = (r0.tap + a) * d[1].taps + r1[r].tap + tap;
      }
      if (source.count > 0) sources[count++] = source;
    }
  return count;
}

// Kernel gradient. Tile: kRows rows of the output x one vector of positions x kTaps taps of a row.
// Per channel: kTaps vectors of values, each used for all rows, and kRows vectors of weights, for
// kRows * kTaps multiply-adds. With 3 rows and 4 taps: 12 accumulators and 4 operands in 16
// registers.
constexpr int kGradientTaps = 4;

struct GradientSteps {
  index_t channels, values_channel, weights_channel;  // number; steps from one to the next
  index_t taps, values_tap, result_tap;               // of a row
  index_t weights_row, result_row;  // from one row of the output to the next, which reads with the
                                    // taps of the previous row of the window
};

template <class T, int kLanes, int kRows, int kTaps>
INLINE void kernel_gradient_tile(const GradientSteps& step, const T* values, const T* weights,
                                 T* result) {
  using V = Simd<T, kLanes>;
  typename V::Vector sum[kRows][kTaps];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) sum[r][t] = typename V::Vector{};
  const index_t values_tap = step.values_tap, values_channel = step.values_channel,
                weights_row = step.weights_row, weights_channel = step.weights_channel;
  for (index_t c = step.channels; c > 0; --c) {
    typename V::Vector y[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) y[r] = V::load(weights + r * weights_row);
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
      typename V::Vector x = V::load(values + t * values_tap);
      if (kRows > 1) keep_in_register(x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][t] += x * y[r];
    }
    values = opaque(values + values_channel);
    weights = opaque(weights + weights_channel);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t)
      V::store(result + r * step.result_row + t * step.result_tap, sum[r][t]);
}

// The taps of a row of the window, for kRows rows of the output.
template <class T, int kLanes, int kRows>
void kernel_gradient_row(const GradientSteps& step, const T* values, const T* weights, T* result) {
  for_each_balanced_tile<kGradientTaps>(step.taps, [&](auto tile, index_t first) {
    kernel_gradient_tile<T, kLanes, kRows, decltype(tile)::value>(
        step, values + first * step.values_tap, weights, result + first * step.result_tap);
  });
}

template <class T, int kLanes>
void kernel_gradient_positions(const Plan& plan, const Region& region, const TensorView& values,
                               const TensorView& weights, const TensorView& result, char* scratch) {
  using V = Simd<T, kLanes>;
  const Dimension* d = plan.dimension;
  const index_t taps = d[0].taps * d[1].taps * d[2].taps;
  const GradientSteps step = {plan.values.inner_count,
                              values.inner_stride,
                              weights.inner_stride,
                              d[2].taps,
                              d[2].source_step,
                              result.outer_stride,
                              weights.position_stride[1],
                              result.position_stride[1] - d[2].taps * result.outer_stride};
  const auto row_kernel = [](index_t rows) {
    return rows == 1   ? kernel_gradient_row<T, kLanes, 1>
           : rows == 2 ? kernel_gradient_row<T, kLanes, 2>
                       : kernel_gradient_row<T, kLanes, 3>;
  };
  SourceRow* const sources = reinterpret_cast<SourceRow*>(scratch);
  // Neighboring rows of the output read the same rows of the input.
  const index_t max_rows = plan.unit_steps[1] ? kGradientRows : 1;

  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1], rows; j < region.high[1]; j += rows) {
      rows = region.high[1] - j < max_rows ? region.high[1] - j : max_rows;
      const TapRange r0 = d[0].tap_ranges[i];
      const TapRange* const r1 = d[1].tap_ranges + j;
      const index_t source_count = find_source_rows(plan, values, r0, r1, rows, sources);
      bool all_inside = true;
      for (index_t r = 0; r < rows; ++r)
        all_inside = all_inside && r0.count * r1[r].count == d[0].taps * d[1].taps;
      for (index_t g = 0; g < plan.values.outer_count; ++g)
        for_each_vector_overlapping<kLanes, 1>(
            region.low[2], region.high[2], [&](auto, index_t k) {
              const T* const x =
                  element_ptr<T>(values, r0.source, r1[0].source, k + plan.source_offset) +
                  g * values.outer_stride;
              const T* const y = element_ptr<T>(weights, i, j, k) + g * weights.outer_stride;
              T* const to = element_ptr<T>(result, i, j, k) + g * result.inner_stride;
              for (index_t r = 0; r < rows && !all_inside; ++r) {
                // The input is 0 there; its product with a non-finite output gradient is NaN.
                typename V::Vector zero = {};
                for (index_t c = 0; c < step.channels; ++c)
                  zero += V::load(y + r * step.weights_row + c * step.weights_channel) * T(0);
                for (index_t t = 0; t < taps; ++t)
                  V::store(to + r * result.position_stride[1] + t * step.result_tap, zero);
              }
              for (index_t n = 0; n < source_count; ++n) {
                const SourceRow& source = sources[n];
                row_kernel(source.count)(step, x + source.offset,
                                         y + source.first * step.weights_row,
                                         to + source.first * result.position_stride[1] +
                                             source.tap_row * d[2].taps * step.result_tap);
              }
            });
    }
}
