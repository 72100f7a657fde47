// Forward and input gradient: weighted sums over taps, for any window. Included only by
// kernels.cpp, inside its unnamed namespace.

// Register tile: kOutputTile outputs of a row x up to kVectorTile vectors of each; smaller for
// double, which is for checks, and for few channels in a group, which do not fill a vector.
template <class T>
constexpr int kOutputTile = sizeof(T) == 8 ? 1 : 2;
template <class T, int kLanes>
constexpr int kVectorTile = sizeof(T) == 8 || kLanes * sizeof(T) < INVOLUTION_VECTOR_BYTES ? 2 : 4;

// Lanes: channels of a group. Tile: kGroupsPerTile groups x kVectorsPerGroup vectors; with more
// than one group, kVectorsPerGroup covers a whole group. Weights are broadcast.
template <class T, int kLanes, int kGroupsPerTile, int kVectorsPerGroup>
struct ChannelLanes {
  using Value = T;
  using V = Simd<T, kLanes>;
  static constexpr int kOutputs = kOutputTile<T>;
  static constexpr int kAccumulators = kGroupsPerTile * kVectorsPerGroup;

  // Accumulates one tap into the outputs [kFirstOutput, kEndOutput), which share its values.
  template <int kFirstOutput, int kEndOutput>
  static INLINE void add(typename V::Vector (*sum)[kAccumulators], const T* values,
                         const T* const* weights, index_t) {
    constexpr index_t padded = kVectorsPerGroup * kLanes;
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerTile; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectorsPerGroup; ++v) {
        typename V::Vector x = V::load(values + g * padded + v * kLanes);
        if (kEndOutput - kFirstOutput > 1) keep_in_register(x);
#pragma GCC unroll 8
        for (int r = kFirstOutput; r < kEndOutput; ++r)
          sum[r][g * kVectorsPerGroup + v] += weights[r][g] * x;
      }
  }
  static INLINE void store(T* to, const typename V::Vector* sum, index_t) {
    constexpr index_t padded = kVectorsPerGroup * kLanes;
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerTile; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectorsPerGroup; ++v)
        V::store(to + g * padded + v * kLanes, sum[g * kVectorsPerGroup + v]);
  }
};

// Lanes: groups. Tile: kChannels channels of each group. The weights of a tap are one vector.
template <class T, int kLanes, int kChannels>
struct GroupLanes {
  using Value = T;
  using V = Simd<T, kLanes>;
  static constexpr int kOutputs = kOutputTile<T>;
  static constexpr int kAccumulators = kChannels;

  template <int kFirstOutput, int kEndOutput>
  static INLINE void add(typename V::Vector (*sum)[kAccumulators], const T* values,
                         const T* const* weights, index_t padded) {
#pragma GCC unroll 8
    for (int r = kFirstOutput; r < kEndOutput; ++r) {
      const typename V::Vector w = V::load(weights[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; ++c) sum[r][c] += w * V::load(values + c * padded);
    }
  }
  static INLINE void store(T* to, const typename V::Vector* sum, index_t padded) {
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) V::store(to + c * padded, sum[c]);
  }
};

// The input columns that neighboring outputs read in one row of taps: the range [low, high) for
// each output, in units of the source step.
template <int kOutputs>
struct ColumnRanges {
  index_t low[kOutputs], high[kOutputs];

  // True if both bounds ascend and all ranges overlap: then the outputs that read a column are
  // always consecutive.
  bool init(const TapRange* tap_ranges, index_t step) {
    for (int r = 0; r < kOutputs; ++r) {
      const index_t distance = tap_ranges[r].source - tap_ranges[0].source;
      if (distance % step != 0) return false;
      low[r] = distance / step;
      high[r] = low[r] + tap_ranges[r].count;
      if (r > 0 && (low[r] < low[r - 1] || high[r] < high[r - 1])) return false;
    }
    return low[kOutputs - 1] <= high[0];
  }
};

// The loop over the columns of one row of taps.
template <class Microkernel, int kOutputs>
struct TapRow {
  using T = typename Microkernel::Value;
  using Vector = typename Microkernel::V::Vector;

  Vector (*sum)[Microkernel::kAccumulators];
  const T* value;
  const T* weight[kOutputs];
  index_t value_step, weight_step, padded;
  index_t prefetch_offset;

  template <int kFirstOutput, int kEndOutput>
  INLINE void column() {
    if (prefetch_offset != 0) {
      __builtin_prefetch(weight[kFirstOutput] + prefetch_offset);
      if (kEndOutput - kFirstOutput > 1)
        __builtin_prefetch(weight[kEndOutput - 1] + prefetch_offset);
    }
    Microkernel::template add<kFirstOutput, kEndOutput>(sum, value, weight, padded);
    value += value_step;
#pragma GCC unroll 8
    for (int r = kFirstOutput; r < kEndOutput; ++r) weight[r] += weight_step;
  }
  template <int kFirstOutput, int kEndOutput>
  INLINE void columns(index_t count) {
    for (index_t c = 0; c < count; ++c) column<kFirstOutput, kEndOutput>();
  }
  // Prologue: the columns that only the outputs [0, kEndOutput) read.
  template <int kEndOutput>
  INLINE void ramp_up(const ColumnRanges<kOutputs>& ranges) {
    if constexpr (kEndOutput < kOutputs) {
      columns<0, kEndOutput>(ranges.low[kEndOutput] - ranges.low[kEndOutput - 1]);
      ramp_up<kEndOutput + 1>(ranges);
    }
  }
  // Epilogue: the columns that only the outputs from kFirstOutput on read.
  template <int kFirstOutput>
  INLINE void ramp_down(const ColumnRanges<kOutputs>& ranges) {
    if constexpr (kFirstOutput < kOutputs) {
      columns<kFirstOutput, kOutputs>(ranges.high[kFirstOutput] - ranges.high[kFirstOutput - 1]);
      ramp_down<kFirstOutput + 1>(ranges);
    }
  }
  INLINE void run(const ColumnRanges<kOutputs>& ranges) {
    ramp_up<1>(ranges);
    columns<0, kOutputs>(ranges.high[0] - ranges.low[kOutputs - 1]);
    ramp_down<1>(ranges);
  }
};

// The arguments shared by all outputs of a row.
struct OutputRow {
  const Plan& plan;
  const TensorView &values, &weights, &result;
  index_t i, j;             // of the row
  index_t channel, weight;  // offsets of the first channel and weight within a position
};

// Computes the outputs k to k + kOutputs - 1 of a row, ordered by ascending columns.
template <class Microkernel, int kOutputs>
inline void compute_tile(const OutputRow& row, const ColumnRanges<kOutputs>& columns, index_t k) {
  using T = typename Microkernel::Value;
  const Plan& plan = row.plan;
  const Dimension *d0 = &plan.dimension[0], *d1 = &plan.dimension[1], *d2 = &plan.dimension[2];
  const TapRange r0 = d0->tap_ranges[row.i], r1 = d1->tap_ranges[row.j];
  const bool weights_at_source = plan.pass == Pass::input_grad, reversed = d2->source_step < 0;
  const index_t tap_weights = plan.weights.inner_padded;

  typename Microkernel::V::Vector sum[kOutputs][Microkernel::kAccumulators];
#pragma GCC unroll 8
  for (int r = 0; r < kOutputs; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Microkernel::kAccumulators; ++v)
      sum[r][v] = typename Microkernel::V::Vector{};

  // Strides from one tap to the next in each dimension.
  const index_t tap_size[3] = {d1->taps * d2->taps * tap_weights, d2->taps * tap_weights,
                               tap_weights};
  index_t value_step[3], weight_step[3];
  for (int n = 0; n < 3; ++n) {
    const Dimension& d = plan.dimension[n];
    value_step[n] = d.source_step * row.values.position_stride[n];
    weight_step[n] = d.tap_step * tap_size[n] +
                     (weights_at_source ? d.source_step * row.weights.position_stride[n] : 0);
  }

  TapRow<Microkernel, kOutputs> tap_row;
  tap_row.sum = sum;
  tap_row.padded = plan.values.inner_padded;
  tap_row.value_step = value_step[2];
  tap_row.weight_step = weight_step[2];
  const index_t first = r0.tap * tap_size[0] + r1.tap * tap_size[1] + row.weight;
  const T *value = nullptr, *weight[kOutputs];
#pragma GCC unroll 8
  for (int r = 0; r < kOutputs; ++r) {
    const index_t n = k + (reversed ? kOutputs - 1 - r : r);
    const TapRange r2 = d2->tap_ranges[n];
    if (r == 0) value = element_ptr<T>(row.values, r0.source, r1.source, r2.source) + row.channel;
    weight[r] = (weights_at_source ? element_ptr<T>(row.weights, r0.source, r1.source, r2.source)
                                   : element_ptr<T>(row.weights, row.i, row.j, n)) +
                first + r2.tap * tap_size[2];
  }
  // Prefetch the weights of the next tile.
  const index_t prefetch_distance = kOutputs * row.weights.position_stride[2];
  tap_row.prefetch_offset = weights_at_source ? prefetch_distance : 0;
  const index_t row_elements =
      weights_at_source ? 0 : (columns.high[0] - columns.low[0]) * tap_weights;
  // With many groups, one line of each tap: the others belong to other tiles.
  const index_t line_elements = 64 / sizeof(T),
                prefetch_step = tap_weights > 8 * line_elements ? tap_weights : line_elements;
  for (index_t phase = 0; phase < plan.phases; ++phase) {
    const index_t value_offset = row.values.phase_offsets[phase],
                  weight_offset = row.weights.phase_offsets[phase];
    for (index_t a = 0; a < r0.count; ++a)
      for (index_t b = 0; b < r1.count; ++b) {
        tap_row.value = value + value_offset + a * value_step[0] + b * value_step[1];
#pragma GCC unroll 8
        for (int r = 0; r < kOutputs; ++r) {
          tap_row.weight[r] = weight[r] + weight_offset + a * weight_step[0] + b * weight_step[1];
          for (index_t n = 0; n < row_elements; n += prefetch_step)
            __builtin_prefetch(tap_row.weight[r] + prefetch_distance + n);
        }
        tap_row.run(columns);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kOutputs; ++r) {
    const index_t n = k + (reversed ? kOutputs - 1 - r : r);
    Microkernel::store(element_ptr<T>(row.result, row.i, row.j, n) + row.channel, sum[r],
                       tap_row.padded);
  }
}

// Computes the next outputs of a row, at most kMaxOutputs, and returns their number.
template <class Microkernel, int kMaxOutputs>
inline index_t compute_next_tile(const OutputRow& row, index_t k, index_t high) {
  const Dimension& d = row.plan.dimension[2];
  if (k + kMaxOutputs <= high) {
    TapRange tap_ranges[kMaxOutputs];
    for (int r = 0; r < kMaxOutputs; ++r)
      tap_ranges[r] = d.tap_ranges[k + (d.source_step < 0 ? kMaxOutputs - 1 - r : r)];
    ColumnRanges<kMaxOutputs> columns;
    if (columns.init(tap_ranges, d.source_step) || kMaxOutputs == 1) {
      compute_tile<Microkernel, kMaxOutputs>(row, columns, k);
      return kMaxOutputs;
    }
  }
  if constexpr (kMaxOutputs > 1)
    return compute_next_tile<Microkernel, kMaxOutputs / 2>(row, k, high);
  return 1;
}

template <class Microkernel>
void compute_row(const OutputRow& row, index_t low, index_t high) {
  for (index_t k = low; k < high;)
    k += compute_next_tile<Microkernel, Microkernel::kOutputs>(row, k, high);
}

template <class T, int kLanes>
void weighted_sum(const Plan& plan, const Region& region, const TensorView& values,
                  const TensorView& weights, const TensorView& result) {
  const index_t padded = plan.values.inner_padded, vectors = padded / kLanes,
                outer_count = plan.values.outer_count;
  if constexpr (sizeof(T) == 4 && kLanes * sizeof(T) == INVOLUTION_VECTOR_BYTES)
    if (plan.vector_axis == VectorAxis::channels &&
        unrolled_sum<T, kLanes>(plan, region, values, weights, result))
      return;
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j) {
      const auto run_row = [&](auto microkernel, index_t channel, index_t weight) {
        compute_row<decltype(microkernel)>({plan, values, weights, result, i, j, channel, weight},
                                           region.low[2], region.high[2]);
      };
      // Tiles of whole groups with kVectorsPerGroup vectors each.
      const auto run_groups = [&](auto count) {
        constexpr int kVectorsPerGroup = decltype(count)::value;
        constexpr int kGroups = kVectorTile<T, kLanes> / kVectorsPerGroup;
        for_each_pow2_tile<kGroups>(outer_count, [&](auto n, index_t g) {
          run_row(ChannelLanes<T, kLanes, decltype(n)::value, kVectorsPerGroup>(), g * padded, g);
        });
      };
      if (plan.vector_axis == VectorAxis::groups) {
        for (index_t v = 0; v < padded; v += kLanes)
          for_each_pow2_tile<kVectorTile<T, kLanes>>(outer_count, [&](auto n, index_t c) {
            run_row(GroupLanes<T, kLanes, decltype(n)::value>(), c * padded + v, v);
          });
      } else if (vectors == 1) {
        run_groups(IntC<1>());
      } else if (vectors == 2) {
        run_groups(IntC<2>());
      } else {
        for (index_t g = 0; g < outer_count; ++g)
          for_each_pow2_tile<kVectorTile<T, kLanes>>(vectors, [&](auto n, index_t v) {
            run_row(ChannelLanes<T, kLanes, 1, decltype(n)::value>(), g * padded + v * kLanes, g);
          });
      }
    }
}
