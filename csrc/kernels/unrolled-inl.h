// Forward and input gradient of windows with 3, 5 or 7 taps, stride 1 and dilation rate 1 in the last
// dimension: these taps are unrolled. Included only by kernels.cpp, inside its unnamed namespace.
//
// Tile: kOutputs neighboring positions of a row x kGroups groups x kVectors vectors of channels, in
// registers; lanes are channels of a group. Per column of the input that a row of taps reads:
//
//     load    kGroups * kVectors vectors of values, each used for up to kOutputs outputs
//     load    kGroups weights for each output that reads the column, broadcast to all lanes
//     FMA     kGroups * kVectors for each of these outputs
//
// With 4 outputs and 2 vectors: 8 accumulators, 2 values and 1 weight of 16 registers; 7 taps take
// 10 columns, so 48 loads for 56 multiply-adds.
//
// Column c is read with tap c - r of output r. Columns outside the input come first or last, and
// are skipped: all outputs skip the same ones.
//
// Both passes read the kernels, by far the largest tensor, in the order of memory. In the forward
// pass a tile sums over all rows of taps. In the input gradient, a row of kernels contributes to a
// row of the result with each row of taps: tiles add to results that stay in cache.

// Outputs of a tile. The last tiles of a row have one less, which fills all rows of more than 2
// positions but those of 5; there, and in shorter ones, single outputs follow.
constexpr int kUnrolledOutputs = 4;

// Lines that a tile prefetches for the next one, at most.
constexpr int kMaxPrefetchLines = 128;

// The rows of taps of a tile, and steps between their addresses.
struct UnrolledRows {
  const Plan& plan;
  index_t value_column, weight_column;   // from one column to the next
  index_t weight_output, result_output;  // from one output to the next
  const index_t *value_phases, *weight_phases;
  index_t first_column, column_count;    // the columns inside the input
  // Forward: rows of taps in the first two dimensions. Input gradient: count[1] rows of the result,
  // each with its row of taps; the first `accumulated` already hold sums.
  index_t count[2], value_row[2], weight_row[2];
  index_t result_row, accumulated;
};

// The steps from the weights of a row of taps to the lines that the next tile reads there.
struct PrefetchLines {
  const index_t* steps;
  int count;
};

template <class T, int kLanes, int kTaps, int kOutputs, int kGroups, int kVectors, bool kClip>
struct UnrolledTile {
  using V = Simd<T, kLanes>;
  using Vector = typename V::Vector;
  static constexpr int kPerOutput = kGroups * kVectors;

  // Steps of vector n of an output, with more than one group; and of its weight.
  static constexpr index_t vector_step(int n) { return n * kLanes; }
  static constexpr index_t group_of(int n) { return n / kVectors; }

  static INLINE void add_row(const UnrolledRows& rows, const T* value, const T* weight,
                             Vector (*sum)[kPerOutput], PrefetchLines lines) {
    const index_t value_column = rows.value_column, weight_column = rows.weight_column,
                  weight_output = rows.weight_output;
    for (int n = 0; n < lines.count; ++n) __builtin_prefetch(weight + lines.steps[n]);
#pragma GCC unroll 16
    for (int c = 0; c < kTaps + kOutputs - 1; ++c) {
      if (!kClip || static_cast<std::uint64_t>(c - rows.first_column) <
                        static_cast<std::uint64_t>(rows.column_count)) {
        Vector x[kPerOutput];
#pragma GCC unroll 8
        for (int v = 0; v < kPerOutput; ++v) {
          x[v] = V::load(value + vector_step(v));
          keep_in_register(x[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kOutputs; ++r)
          if (r <= c && c - r < kTaps)
#pragma GCC unroll 8
            for (int v = 0; v < kPerOutput; ++v)
              sum[r][v] += weight[r * weight_output + group_of(v)] * x[v];
      }
      value = opaque(value + value_column);
      weight = opaque(weight + weight_column);
    }
  }
  static INLINE void zero(Vector (*sum)[kPerOutput]) {
#pragma GCC unroll 8
    for (int r = 0; r < kOutputs; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPerOutput; ++v) sum[r][v] = Vector{};
  }
  static INLINE void store(const UnrolledRows& rows, T* result, const Vector (*sum)[kPerOutput]) {
#pragma GCC unroll 8
    for (int r = 0; r < kOutputs; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kPerOutput; ++v)
        V::store(result + r * rows.result_output + vector_step(v), sum[r][v]);
  }

  static NOINLINE void forward(const UnrolledRows& rows, const T* value, const T* weight, T* result,
                               PrefetchLines lines) {
    Vector sum[kOutputs][kPerOutput];
    zero(sum);
    for (index_t a = 0; a < rows.count[0]; ++a)
      for (index_t b = 0; b < rows.count[1]; ++b)
        add_row(rows, value + a * rows.value_row[0] + b * rows.value_row[1],
                weight + a * rows.weight_row[0] + b * rows.weight_row[1], sum, lines);
    store(rows, result, sum);
  }

  static NOINLINE void input_gradient(const UnrolledRows& rows, const T* value, const T* weight,
                                      T* result, PrefetchLines lines) {
    for (index_t b = 0; b < rows.count[1]; ++b) {
      Vector sum[kOutputs][kPerOutput];
      if (b < rows.accumulated) {
#pragma GCC unroll 8
        for (int r = 0; r < kOutputs; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < kPerOutput; ++v)
            sum[r][v] = V::load(result + r * rows.result_output + vector_step(v));
      } else {
        zero(sum);
      }
      for (index_t phase = 0; phase < rows.plan.phases; ++phase)
        add_row(rows, value + rows.value_phases[phase], weight + rows.weight_phases[phase], sum,
                lines);
      store(rows, result, sum);
      weight += rows.weight_row[1];
      result += rows.result_row;
    }
  }
};

template <class T, int kLanes, int kTaps>
class Unrolled {
 public:
  Unrolled(const Plan& plan, const Region& region, const TensorView& values,
           const TensorView& weights, const TensorView& result)
      : plan_(plan), region_(region), values_(values), weights_(weights), result_(result) {
    const Dimension* d = plan.dimension;
    const index_t tap_weights = plan.weights.inner_padded;
    const index_t weight_position = weights.position_stride[2],
                  result_position = result.position_stride[2];
    tap_row_ = d[2].taps * tap_weights;
    rows_.value_column = d[2].source_step * values.position_stride[2];
    rows_.weight_column = tap_weights - (backward() ? weight_position : 0);
    rows_.weight_output = (backward() ? 0 : weight_position) - tap_weights;
    rows_.result_output = backward() ? -result_position : result_position;
    rows_.value_phases = values.phase_offsets;
    rows_.weight_phases = weights.phase_offsets;

    // The next tile reads a row of taps at each of kUnrolledOutputs further positions.
    constexpr index_t kLine = 64 / sizeof(T);
    const index_t row_lines = ceil_div(tap_row_, kLine) + 1;
    for (index_t r = 0; r < kUnrolledOutputs; ++r)
      for (index_t n = 0; n < row_lines && line_count_ < kMaxPrefetchLines; ++n)
        lines_[line_count_++] =
            ((backward() ? 1 : kUnrolledOutputs) + r) * weight_position + n * kLine;
  }

  void forward() {
    const Dimension* d = plan_.dimension;
    for (int n = 0; n < 2; ++n)
      rows_.value_row[n] = d[n].source_step * values_.position_stride[n];
    rows_.weight_row[1] = tap_row_;
    rows_.weight_row[0] = d[1].taps * tap_row_;
    for (index_t i = region_.low[0]; i < region_.high[0]; ++i)
      for (index_t j = region_.low[1]; j < region_.high[1]; ++j) {
        const TapRange &r0 = d[0].tap_ranges[i], &r1 = d[1].tap_ranges[j];
        rows_.count[0] = r0.count;
        rows_.count[1] = r1.count;
        compute_row(element_ptr<T>(values_, r0.source, r1.source, plan_.source_offset),
                    element_ptr<T>(weights_, i, j, 0) + (r0.tap * d[1].taps + r1.tap) * tap_row_,
                    element_ptr<T>(result_, i, j, 0));
      }
  }

  // Adds up, for each result, the rows of the source in ascending order.
  void input_gradient() {
    const Dimension* d = plan_.dimension;
    rows_.weight_row[1] = tap_row_;
    rows_.result_row = result_.position_stride[1];
    for (index_t i = region_.low[0]; i < region_.high[0]; ++i) {
      const TapRange r0 = d[0].tap_ranges[i];
      for (index_t j = region_.low[1]; j < region_.high[1]; ++j)
        if (r0.count * d[1].tap_ranges[j].count == 0) zero_row(i, j);
      for (index_t a = r0.count - 1; a >= 0; --a) {
        const index_t source0 = r0.source + a * d[0].source_step;
        const index_t tap0 = r0.tap + a * d[0].tap_step;
        index_t low = region_.low[1];
        for (index_t source = 0; source < d[1].source_size && low < region_.high[1]; ++source) {
          // The rows of the result that read it are consecutive: [low, high).
          while (low < region_.high[1] && d[1].tap_ranges[low].source < source) ++low;
          index_t high = low, accumulated = 0;
          for (; high < region_.high[1]; ++high) {
            const TapRange& r1 = d[1].tap_ranges[high];
            const index_t first = r1.source - (r1.count - 1);
            if (r1.count == 0 || first > source) break;
            if (first < source || a < r0.count - 1) ++accumulated;
          }
          if (high == low) continue;
          const TapRange& r1 = d[1].tap_ranges[low];
          const index_t tap1 = r1.tap + r1.source - source;
          rows_.count[1] = high - low;
          rows_.accumulated = accumulated;
          compute_row(element_ptr<T>(values_, source0, source, plan_.source_offset),
                      element_ptr<T>(weights_, source0, source, plan_.source_offset) +
                          (tap0 * d[1].taps + tap1) * tap_row_,
                      element_ptr<T>(result_, i, low, 0));
        }
      }
    }
  }

 private:
  bool backward() const { return plan_.pass == Pass::input_grad; }

  void zero_row(index_t i, index_t j) {
    for (index_t k = region_.low[2]; k < region_.high[2]; ++k) {
      T* const to = element_ptr<T>(result_, i, j, k);
      for (index_t c = 0; c < plan_.values.outer_count * plan_.values.inner_padded; ++c) to[c] = 0;
    }
  }

  // Computes a row, given the addresses for position 0 of the last dimension.
  void compute_row(const T* value, const T* weight, T* result) {
    constexpr int kShort = kUnrolledOutputs - 1;
    index_t k = region_.low[2];
    const index_t end = region_.high[2], width = end - k, tiles = ceil_div(width, kUnrolledOutputs);
    const index_t missing = tiles * kUnrolledOutputs - width;
    const bool fills = missing <= tiles;
    for (index_t n = fills ? missing : 1; n < tiles; ++n, k += kUnrolledOutputs)
      compute_outputs<kUnrolledOutputs>(value, weight, result, k);
    for (; fills && k < end; k += kShort) compute_outputs<kShort>(value, weight, result, k);
    for (; k < end; ++k) compute_outputs<1>(value, weight, result, k);
  }

  // Computes kOutputs outputs from position k, all channels.
  template <int kOutputs>
  void compute_outputs(const T* value, const T* weight, T* result, index_t k) {
    // In the input gradient, sources descend with the taps: the first output is the last position.
    const index_t first = backward() ? k + kOutputs - 1 : k, source = first + plan_.source_offset;
    const index_t size = plan_.dimension[2].source_size;
    const index_t before = backward() ? source - (size - 1) : -source,
                  after = backward() ? source + 1 : size - source;
    constexpr index_t kColumns = kTaps + kOutputs - 1;
    const index_t end = after < kColumns ? after : kColumns;
    rows_.first_column = before > 0 ? before : 0;
    // None where all windows are in the padding.
    rows_.column_count = end > rows_.first_column ? end - rows_.first_column : 0;
    value += first * values_.position_stride[2];
    weight += first * weights_.position_stride[2];
    result += first * result_.position_stride[2];

    const index_t padded = plan_.values.inner_padded, vectors = padded / kLanes,
                  groups = plan_.values.outer_count;
    const index_t tiles = vectors == 1 ? ceil_div(groups, 2) : groups * ceil_div(vectors, 2);
    const index_t lines_per_tile = ceil_div(line_count_, tiles);
    index_t line = 0;
    const auto run = [&](auto group_count, auto vector_count, index_t channel, index_t group) {
      constexpr int kGroups = decltype(group_count)::value,
                    kVectors = decltype(vector_count)::value;
      const index_t left = line_count_ - line;
      const PrefetchLines lines = {
          lines_ + line, static_cast<int>(left < lines_per_tile ? left : lines_per_tile)};
      line += lines.count;
      // One variant suffices for the few shorter tiles.
      using Clipped = UnrolledTile<T, kLanes, kTaps, kOutputs, kGroups, kVectors, true>;
      constexpr bool kAlwaysClip = kOutputs < kUnrolledOutputs;
      using Whole = UnrolledTile<T, kLanes, kTaps, kOutputs, kGroups, kVectors, kAlwaysClip>;
      const bool clip = rows_.column_count < kColumns;
      const auto tile = backward() ? clip ? Clipped::input_gradient : Whole::input_gradient
                        : clip     ? Clipped::forward
                                   : Whole::forward;
      tile(rows_, value + channel, weight + group, result + channel, lines);
    };
    if (vectors == 1) {
      for (index_t g = 0; g + 2 <= groups; g += 2) run(IntC<2>(), IntC<1>(), g * padded, g);
      if (groups % 2 != 0) run(IntC<1>(), IntC<1>(), (groups - 1) * padded, groups - 1);
      return;
    }
    for (index_t g = 0; g < groups; ++g) {
      for (index_t v = 0; v + 2 <= vectors; v += 2)
        run(IntC<1>(), IntC<2>(), g * padded + v * kLanes, g);
      if (vectors % 2 != 0) run(IntC<1>(), IntC<1>(), (g + 1) * padded - kLanes, g);
    }
  }

  const Plan& plan_;
  const Region& region_;
  const TensorView &values_, &weights_, &result_;
  index_t tap_row_;
  UnrolledRows rows_ = {plan_, 0, 0, 0, 0, nullptr, nullptr, 0, 0, {}, {}, {}, 0, 0};
  index_t lines_[kMaxPrefetchLines], line_count_ = 0;
};

// Computes the region, unless the window is not of the kind above. This must not depend on the
// region: the other kernels add up the input gradient in another order.
template <class T, int kLanes>
bool unrolled_sum(const Plan& plan, const Region& region, const TensorView& values,
                  const TensorView& weights, const TensorView& result) {
  const Dimension* d = plan.dimension;
  const bool backward = plan.pass == Pass::input_grad;
  if (!plan.unit_steps[2] || (backward && !plan.unit_steps[1])) return false;
  const auto run = [&](auto taps) {
    Unrolled<T, kLanes, decltype(taps)::value> unrolled(plan, region, values, weights, result);
    if (backward)
      unrolled.input_gradient();
    else
      unrolled.forward();
    return true;
  };
  return d[2].taps == 3   ? run(IntC<3>())
         : d[2].taps == 5 ? run(IntC<5>())
         : d[2].taps == 7 ? run(IntC<7>())
                          : false;
}
