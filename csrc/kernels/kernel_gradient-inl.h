// Kernel gradient: dot products over the channels of a group; lanes along channels or groups.
// Included only by kernels.cpp, inside its unnamed namespace.

// Adds up the lanes of each of kCount vectors, product(n) for n from kFirst on, in a tree: lane n of
// a tree of kLanes vectors is the sum of vector n. First within 128 bits, then across them: each
// step takes two cheap shuffles and an addition. Depth first, to hold few vectors at a time.
template <class T, int kLanes, int kCount = kLanes, int kFirst = 0, class Product>
INLINE typename Simd<T, kLanes>::Vector reduce_lanes(Product& product) {
  if constexpr (kCount == 1) {
    return product(kFirst);
  } else {
    constexpr int kInside = 16 / sizeof(T) < kLanes ? 16 / sizeof(T) : kLanes;
    const auto a = reduce_lanes<T, kLanes, kCount / 2, kFirst>(product);
    const auto b = reduce_lanes<T, kLanes, kCount / 2, kFirst + kCount / 2>(product);
    constexpr int kSegment = kCount <= kInside ? kInside : kLanes;
    constexpr int kUnit = kCount <= kInside ? kInside / kCount : kLanes * kInside / kCount;
    return hadd_step<kLanes, kSegment, kUnit>(a, b, typename MakeIndexSequence<kLanes>::Type());
  }
}

// Stores kLanes sums, of kGroups neighboring groups for each of `taps` taps.
template <class T, int kLanes, int kGroups>
INLINE void store_sums(T* to, index_t groups, index_t taps, typename Simd<T, kLanes>::Vector sums) {
  constexpr int kTaps = kLanes / kGroups;
  if (groups == kGroups && taps == kTaps) return Simd<T, kLanes>::store(to, sums);
  T part[kLanes];
  Simd<T, kLanes>::store(part, sums);
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t)
    if (t < taps) __builtin_memcpy(to + t * groups, part + t * kGroups, kGroups * sizeof(T));
}

// A run of taps at a position.
template <class T>
struct GradientTaps {
  const T* values;
  const index_t* offsets;  // of each tap's values
  index_t taps;
  const T* weights;
  T* result;
  index_t groups, padded;
};

// Calls fn(offsets, first tap, count) for vectors of kTaps taps. The last vector overlaps the
// previous one; if there is only one, it may repeat its last tap.
template <int kTaps, class T, class Fn>
INLINE void for_each_tap_vector(const GradientTaps<T>& p, Fn fn) {
  const index_t taps = p.taps;
  if (taps < kTaps) {
    index_t offsets[kTaps];
    for (int t = 0; t < kTaps; ++t) offsets[t] = p.offsets[t < taps ? t : taps - 1];
    return fn(offsets, 0, taps);
  }
  const index_t* const offsets = p.offsets;
  for (index_t tap = 0; tap < taps; tap += kTaps) {
    if (tap + kTaps > taps) tap = taps - kTaps;
    fn(offsets + tap, tap, kTaps);
  }
}

// Tile: kLanes sums, of kGroups groups for each tap, with kVectors vectors of channels in a group.
// The output's gradient, kGroups * kVectors vectors, stays in registers. If the kLanes products fit
// beside it, all of them are computed before the reduction: with AVX-512 and 4 groups, 1.1 times as
// fast. Per sum: kVectors loads and multiply-adds, and 7/8 of a step of the tree with 8 lanes.
template <class T, int kLanes, int kVectors, int kGroups>
NOINLINE void kernel_gradient_groups(const GradientTaps<T>& p, index_t group) {
  using V = Simd<T, kLanes>;
  constexpr index_t kPadded = kVectors * kLanes;
  constexpr int kTaps = kLanes / kGroups;
  typename V::Vector y[kGroups * kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kGroups * kVectors; ++v) {
    y[v] = V::load(p.weights + group * kPadded + v * kLanes);
    keep_in_register(y[v]);
  }
  const T* const values = p.values + group * kPadded;
  T* const result = p.result + group;
  const index_t groups = p.groups;
  for_each_tap_vector<kTaps>(p, [&](const index_t* offsets, index_t tap,
                                    index_t count) INLINE_BODY {
    const auto product = [&](int n) INLINE_BODY {
      const int g = n % kGroups;
      const T* const from = values + offsets[n / kGroups] + g * kPadded;
      typename V::Vector sum = V::load(from) * y[g * kVectors];
#pragma GCC unroll 4
      for (int v = 1; v < kVectors; ++v) sum += V::load(from + v * kLanes) * y[g * kVectors + v];
      return sum;
    };
    const auto sums = [&]() INLINE_BODY {
      if constexpr (kLanes + kGroups * kVectors < kRegisters) {
        typename V::Vector products[kLanes];
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) keep_in_register(products[n] = product(n));
        const auto given = [&](int n) INLINE_BODY { return products[n]; };
        return reduce_lanes<T, kLanes>(given);
      } else {
        return reduce_lanes<T, kLanes>(product);
      }
    };
    store_sums<T, kLanes, kGroups>(result + tap * groups, groups, count, sums());
  });
}

// Tile: kLanes taps of one group, whose channels are any number of vectors. Per vector of channels:
// kLanes + 1 loads for kLanes multiply-adds.
template <class T, int kLanes>
NOINLINE void kernel_gradient_group(const GradientTaps<T>& p, index_t group) {
  using V = Simd<T, kLanes>;
  const index_t padded = p.padded, groups = p.groups;
  const T* const y = p.weights + group * padded;
  const T* const values = p.values + group * padded;
  T* const result = p.result + group;
  for_each_tap_vector<kLanes>(p, [&](const index_t* offsets, index_t tap,
                                     index_t count) INLINE_BODY {
    const T* x[kLanes];
    typename V::Vector sum[kLanes];
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) x[t] = values + offsets[t], sum[t] = typename V::Vector{};
    for (index_t c = 0; c < padded; c = opaque(c + kLanes)) {
      const typename V::Vector y_vec = V::load(y + c);
#pragma GCC unroll 16
      for (int t = 0; t < kLanes; ++t) sum[t] += V::load(x[t] + c) * y_vec;
    }
    const auto product = [&](int n) INLINE_BODY { return sum[n]; };
    store_sums<T, kLanes, 1>(result + tap * groups, groups, count,
                             reduce_lanes<T, kLanes>(product));
  });
}

template <class T, int kLanes>
void kernel_gradient_taps(const GradientTaps<T>& p) {
  // As many groups as fill half of the registers, with several vectors a half of 16; the others one
  // by one.
  const auto run = [&](auto vectors, auto max_groups) {
    constexpr int kVectors = decltype(vectors)::value, kMax = decltype(max_groups)::value,
                  kLargest = kMax < kLanes ? kMax : kLanes;
    for_each_pow2_tile<kLargest>(p.groups, [&](auto n, index_t g) {
      constexpr int kGroups = decltype(n)::value;
      if constexpr (kGroups > 1 || kVectors <= 2)
        kernel_gradient_groups<T, kLanes, kVectors, kGroups>(p, g);
      else
        kernel_gradient_group<T, kLanes>(p, g);
    });
  };
  switch (p.padded / kLanes) {
    case 1:
      return run(IntC<1>(), IntC<kRegisters / 2>());
    case 2:
      return run(IntC<2>(), IntC<4>());
    case 3:
      return run(IntC<3>(), IntC<2>());
    case 4:
      return run(IntC<4>(), IntC<2>());
    default:
      for (index_t g = 0; g < p.groups; ++g) kernel_gradient_group<T, kLanes>(p, g);
  }
}

// Lanes: groups. A sum over the channels of each group, for kTaps taps at a time.
template <class T, int kLanes, int kTaps>
inline void group_dot(T* result, const T* values, const T* weights, const index_t* tap_offsets,
                      index_t channels_per_group, index_t padded) {
  using V = Simd<T, kLanes>;
  for (index_t v = 0; v < padded; v += kLanes) {
    typename V::Vector sum[kTaps] = {};
    for (index_t c = 0; c < channels_per_group; ++c) {
      const typename V::Vector y = V::load(weights + c * padded + v);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t)
        sum[t] += V::load(values + tap_offsets[t] + c * padded + v) * y;
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) V::store(result + t * padded + v, sum[t]);
  }
}

template <class T, int kLanes>
void kernel_gradient(const Plan& plan, const Region& region, const TensorView& values,
                     const TensorView& weights, const TensorView& result, index_t* tap_offsets) {
  const Dimension* d = plan.dimension;
  const index_t padded = plan.values.inner_padded, outer_count = plan.values.outer_count;
  const index_t taps = d[0].taps * d[1].taps * d[2].taps, row = plan.result.inner_padded;

  // Offset of each tap's values from those of the first tap.
  index_t f = 0;
  for (index_t a = 0; a < d[0].taps; ++a)
    for (index_t b = 0; b < d[1].taps; ++b)
      for (index_t c = 0; c < d[2].taps; ++c)
        tap_offsets[f++] = a * d[0].source_step * values.position_stride[0] +
                           b * d[1].source_step * values.position_stride[1] +
                           c * d[2].source_step * values.position_stride[2];

  const auto run = [&](T* to, const T* x, const T* y, index_t count) {
    if (plan.vector_axis == VectorAxis::groups) {
      index_t tap = 0;
      for (; tap + 4 <= count; tap += 4)
        group_dot<T, kLanes, 4>(to + tap * row, x, y, tap_offsets + tap, outer_count, padded);
      for (; tap < count; ++tap)
        group_dot<T, kLanes, 1>(to + tap * row, x, y, tap_offsets + tap, outer_count, padded);
    } else {
      kernel_gradient_taps<T, kLanes>({x, tap_offsets, count, y, to, outer_count, padded});
    }
  };

  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t k = region.low[2]; k < region.high[2]; ++k) {
        const TapRange r0 = d[0].tap_ranges[i], r1 = d[1].tap_ranges[j], r2 = d[2].tap_ranges[k];
        const T* y = element_ptr<T>(weights, i, j, k);
        T* to = element_ptr<T>(result, i, j, k);
        if (r0.count * r1.count * r2.count == taps) {
          run(to, element_ptr<T>(values, r0.source, r1.source, r2.source), y, taps);
          continue;
        }
        for (index_t f = 0; f < taps * row; ++f) to[f] = 0;
        if (r2.count == 0) continue;
        for (index_t a = 0; a < r0.count; ++a)
          for (index_t b = 0; b < r1.count; ++b) {
            const index_t tap = ((r0.tap + a) * d[1].taps + r1.tap + b) * d[2].taps + r2.tap;
            run(to + tap * row,
                element_ptr<T>(values, r0.source + a * d[0].source_step,
                               r1.source + b * d[1].source_step, r2.source),
                y, r2.count);
          }
      }
}
