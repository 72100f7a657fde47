// The CPU kernels. Compiled once for each target (instruction set), with INVOLUTION_TARGET as its
// name and INVOLUTION_VECTOR_BYTES as the width of its vectors.
//
// No `std::` templates here, nor any other function with external linkage: the linker keeps one
// copy of each, possibly the AVX-512 one.
#include <cstdint>
#include <cstring>
#if INVOLUTION_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "kernels.h"

namespace involution {
namespace {

// For functions whose accumulators must stay in registers.
#define INLINE inline __attribute__((always_inline))

#include "half-inl.h"
#include "simd-inl.h"

// Compilers fold a load into each instruction that uses it, and so repeat the load. The empty asm
// claims to modify the vector, which forces it into a register.
template <class Vector>
INLINE void keep_in_register([[maybe_unused]] Vector& x) {
#if defined(__x86_64__)
  // Clang has no registers for shorter vectors; no target uses them here.
  if constexpr (sizeof x >= 16) asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// --- Packing: copies between tensors and views --------------------------------------------------
template <class T>
struct StridedMatrix {
  T* data;
  index_t channel_stride, position_stride;
};

// Prefetches `bytes` at 4 KiB ahead; hardware prefetchers miss short strided rows.
inline void prefetch(const void* from, index_t bytes) {
  constexpr index_t kPrefetchDistance = 4096, kCacheLineBytes = 64;
  for (index_t at = 0; at < bytes; at += kCacheLineBytes)
    __builtin_prefetch(static_cast<const char*>(from) + kPrefetchDistance + at);
}

// From kChannels interleaved channels to planes.
template <class T, int kChannels>
void deinterleave(const T* from, T* to, index_t to_step, index_t count) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / sizeof(T);
  using V = Simd<T, kLanes>;
  index_t p = 0;
  for (; p + kLanes <= count; p += kLanes) {
    prefetch(from + p * kChannels, kChannels * kLanes * sizeof(T));
    typename V::Vector in[kChannels], out[kChannels];
    for (int c = 0; c < kChannels; ++c) in[c] = V::load(from + p * kChannels + c * kLanes);
    shuffle_interleaved<kLanes, kChannels, true>(in, out);
    for (int c = 0; c < kChannels; ++c) V::store(to + c * to_step + p, out[c]);
  }
  for (; p < count; ++p)
    for (int c = 0; c < kChannels; ++c) to[c * to_step + p] = from[p * kChannels + c];
}

// From planes to kChannels interleaved channels.
template <class T, int kChannels>
void interleave(const T* from, index_t from_step, T* to, index_t count) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / sizeof(T);
  using V = Simd<T, kLanes>;
  index_t p = 0;
  for (; p + kLanes <= count; p += kLanes) {
    typename V::Vector in[kChannels], out[kChannels];
    for (int c = 0; c < kChannels; ++c) in[c] = V::load(from + c * from_step + p);
    shuffle_interleaved<kLanes, kChannels, false>(in, out);
    for (int c = 0; c < kChannels; ++c) V::store(to + p * kChannels + c * kLanes, out[c]);
  }
  for (; p < count; ++p)
    for (int c = 0; c < kChannels; ++c) to[p * kChannels + c] = from[c * from_step + p];
}

// Matrix transpose in square tiles: rows are contiguous in `from`, columns in `to`.
template <class T>
void transpose_copy(const T* from, index_t from_step, T* to, index_t to_step, index_t rows,
                    index_t columns) {
  constexpr int kMaxLanes = INVOLUTION_VECTOR_BYTES / sizeof(T);
  constexpr int kLanes = kMaxLanes < 8 ? kMaxLanes : 8;
  using V = Simd<T, kLanes>;
  if (columns == from_step && columns > 1 && columns <= 4)
    return columns == 2   ? deinterleave<T, 2>(from, to, to_step, rows)
           : columns == 3 ? deinterleave<T, 3>(from, to, to_step, rows)
                          : deinterleave<T, 4>(from, to, to_step, rows);
  if (rows == to_step && rows > 1 && rows <= 4)
    return rows == 2   ? interleave<T, 2>(from, from_step, to, columns)
           : rows == 3 ? interleave<T, 3>(from, from_step, to, columns)
                       : interleave<T, 4>(from, from_step, to, columns);
  index_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    if (from_step < 64) prefetch(from + r * from_step, kLanes * from_step * sizeof(T));
    index_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      typename V::Vector square[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) square[i] = V::load(from + (r + i) * from_step + c);
      transpose<kLanes>(square);
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) V::store(to + (c + i) * to_step + r, square[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < kLanes; ++i) to[c * to_step + r + i] = from[(r + i) * from_step + c];
  }
  for (; r < rows; ++r)
    for (index_t c = 0; c < columns; ++c) to[c * to_step + r] = from[r * from_step + c];
}

inline void convert(double from, double& to) { to = from; }
inline void convert(float from, float& to) { to = from; }
template <class T>
inline void convert(T from, float& to) {
  to = to_float(from);
}
template <class T>
inline void convert(float from, T& to) {
  from_float(from, to);
}

template <class Stored, class T>
void copy(StridedMatrix<const Stored> from, StridedMatrix<T> to, index_t channels,
          index_t positions) {
  if (from.channel_stride == 1 && to.channel_stride == 1) {
    for (index_t p = 0; p < positions; ++p) {
      const Stored* const source = from.data + p * from.position_stride;
      T* const target = to.data + p * to.position_stride;
      for (index_t c = 0; c < channels; ++c) convert(source[c], target[c]);
    }
    return;
  }
  if constexpr (sizeof(Stored) == sizeof(T)) {  // the same type
    if (from.channel_stride == 1 && to.position_stride == 1)
      return transpose_copy(from.data, from.position_stride, to.data, to.channel_stride, positions,
                            channels);
    if (from.position_stride == 1 && to.channel_stride == 1)
      return transpose_copy(from.data, from.channel_stride, to.data, to.position_stride, channels,
                            positions);
  }
  for (index_t c = 0; c < channels; ++c) {
    const Stored* const source = from.data + c * from.channel_stride;
    T* const target = to.data + c * to.channel_stride;
    for (index_t p = 0; p < positions; ++p)
      convert(source[p * from.position_stride], target[p * to.position_stride]);
  }
}

// Tile of a packing copy: at least kTilePositions, for whole cache lines where channels are planes,
// and with few channels as many as give kTileElements, which fit into L1.
constexpr index_t kTilePositions = 16, kTileElements = 512;

// Calls fn(matrix in the tensor, matrix in the view, channels, positions) for tiles that cover the
// region.
template <class Stored, class T, class Fn>
inline void for_each_tile(const Tensor& t, index_t sample, const Region& region,
                          const TensorView& view, Fn fn) {
  const bool one_axis =
      t.inner_padded == t.inner_count && t.outer_stride == t.inner_stride * t.inner_count;
  const bool single = t.inner_padded == 1;
  const index_t runs = one_axis || single ? 1 : t.outer_count;
  const index_t channels = one_axis ? t.outer_count * t.inner_count
                           : single ? t.outer_count
                                    : t.inner_count;
  const index_t tensor_channel_stride = single ? t.outer_stride : t.inner_stride,
                view_channel_stride = single ? view.outer_stride : view.inner_stride;
  const index_t tile = channels * kTilePositions < kTileElements
                           ? kTileElements / channels / kTilePositions * kTilePositions
                           : kTilePositions;
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t k = region.low[2]; k < region.high[2]; k += tile)
        for (index_t o = 0; o < runs; ++o) {
          Stored* const in_tensor = static_cast<Stored*>(t.data) + sample * t.batch_stride +
                                    i * t.position_stride[0] + j * t.position_stride[1] +
                                    k * t.position_stride[2] + o * t.outer_stride;
          T* const in_view = static_cast<T*>(view.data) +
                             (i - view.origin[0]) * view.position_stride[0] +
                             (j - view.origin[1]) * view.position_stride[1] +
                             (k - view.origin[2]) * view.position_stride[2] + o * view.outer_stride;
          fn(StridedMatrix<Stored>{in_tensor, tensor_channel_stride, t.position_stride[2]},
             StridedMatrix<T>{in_view, view_channel_stride, view.position_stride[2]}, channels,
             region.high[2] - k < tile ? region.high[2] - k : tile);
        }
}

// Zeros the inner channels [low, high) at the positions [low2, high2) of every row. Runs are so
// short that a call of memset costs more than the stores.
template <class T>
#ifndef __clang__
__attribute__((optimize("no-tree-loop-distribute-patterns")))
#endif
void zero_fill(const Tensor& t, const Region& region, const TensorView& view, index_t low,
               index_t high, index_t low2, index_t high2) {
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t o = 0; o < t.outer_count; ++o)
        for (index_t n = low; n < high; ++n)
          for (index_t k = low2; k < high2; ++k)
            static_cast<T*>(view.data)[(i - view.origin[0]) * view.position_stride[0] +
                                       (j - view.origin[1]) * view.position_stride[1] +
                                       (k - view.origin[2]) * view.position_stride[2] +
                                       o * view.outer_stride + n * view.inner_stride] = 0;
}

template <class Stored, class T>
void pack_typed(const Tensor& t, index_t sample, const Region& region, index_t size,
                const TensorView& view) {
  Region inside = region;
  if (inside.low[2] < 0) inside.low[2] = 0;
  if (inside.high[2] > size) inside.high[2] = size;
  zero_fill<T>(t, region, view, 0, t.inner_count, region.low[2], inside.low[2]);
  zero_fill<T>(t, region, view, 0, t.inner_count, inside.high[2], region.high[2]);
  zero_fill<T>(t, region, view, t.inner_count, t.inner_padded, region.low[2], region.high[2]);
  for_each_tile<Stored, T>(
      t, sample, inside, view,
      [](StridedMatrix<Stored> from, StridedMatrix<T> to, index_t channels, index_t positions) {
        copy<Stored, T>({from.data, from.channel_stride, from.position_stride}, to, channels,
                        positions);
      });
}

template <class Stored, class T>
void unpack_typed(const Tensor& t, index_t sample, const Region& region, const TensorView& view) {
  for_each_tile<Stored, T>(
      t, sample, region, view,
      [](StridedMatrix<Stored> to, StridedMatrix<T> from, index_t channels, index_t positions) {
        copy<T, Stored>({from.data, from.channel_stride, from.position_stride}, to, channels,
                        positions);
      });
}

void pack(const Tensor& t, DataType type, index_t sample, const Region& region, index_t size,
          const TensorView& view) {
  switch (type) {
    case DataType::float64:
      return pack_typed<double, double>(t, sample, region, size, view);
    case DataType::float32:
      return pack_typed<float, float>(t, sample, region, size, view);
    case DataType::bfloat16:
      return pack_typed<BFloat16, float>(t, sample, region, size, view);
    case DataType::float16:
      return pack_typed<Float16, float>(t, sample, region, size, view);
  }
}

void unpack(const Tensor& t, DataType type, index_t sample, const Region& region,
            const TensorView& view) {
  switch (type) {
    case DataType::float64:
      return unpack_typed<double, double>(t, sample, region, view);
    case DataType::float32:
      return unpack_typed<float, float>(t, sample, region, view);
    case DataType::bfloat16:
      return unpack_typed<BFloat16, float>(t, sample, region, view);
    case DataType::float16:
      return unpack_typed<Float16, float>(t, sample, region, view);
  }
}

// --- Forward and input gradient: weighted sums over taps ----------------------------------------

template <class T>
inline T* element_ptr(const TensorView& view, index_t i, index_t j, index_t k) {
  return static_cast<T*>(view.data) + (i - view.origin[0]) * view.position_stride[0] +
         (j - view.origin[1]) * view.position_stride[1] +
         (k - view.origin[2]) * view.position_stride[2];
}

// Lanes: channels of a group. Tile: kGroupsPerTile groups x kVectorsPerGroup vectors; with more
// than one group, kVectorsPerGroup covers a whole group. Weights are broadcast.
template <class T, int kLanes, int kGroupsPerTile, int kVectorsPerGroup>
struct ChannelLanes {
  using Value = T;
  using V = Simd<T, kLanes>;
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
  for (index_t phase = 0; phase < plan.phases; ++phase) {
    const index_t value_offset = row.values.phase_offsets[phase],
                  weight_offset = row.weights.phase_offsets[phase];
    for (index_t a = 0; a < r0.count; ++a)
      for (index_t b = 0; b < r1.count; ++b) {
        tap_row.value = value + value_offset + a * value_step[0] + b * value_step[1];
#pragma GCC unroll 8
        for (int r = 0; r < kOutputs; ++r) {
          tap_row.weight[r] = weight[r] + weight_offset + a * weight_step[0] + b * weight_step[1];
          for (index_t n = 0; n < row_elements; n += 64 / sizeof(T))
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

// Register tile: kOutputTile outputs of a row x kVectorTile vectors of each.
constexpr int kOutputTile = INVOLUTION_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kVectorTile = 4;

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
  for (index_t k = low; k < high;) k += compute_next_tile<Microkernel, kOutputTile>(row, k, high);
}

// std::integral_constant, which the linker rule at the top excludes.
template <int kValue>
struct IntC {
  static constexpr int value = kValue;
};

// Calls fn(IntC<n>(), first) for tiles of n = kLargest, then kLargest / 2, and so on to 1, which
// cover `total`.
template <int kLargest, class Fn>
inline void for_each_pow2_tile(index_t total, Fn fn, index_t first = 0) {
  for (; total - first >= kLargest; first += kLargest) fn(IntC<kLargest>(), first);
  if constexpr (kLargest > 1) for_each_pow2_tile<kLargest / 2>(total, fn, first);
}

// The same with tiles of kLargest and one tail of any size below.
template <int kLeft, class Fn>
inline void dispatch_tail(index_t left, index_t first, Fn fn) {
  if constexpr (kLeft > 0) {
    if (left == kLeft) return fn(IntC<kLeft>(), first);
    dispatch_tail<kLeft - 1>(left, first, fn);
  }
}
template <int kLargest, class Fn>
inline void for_each_tile_with_tail(index_t total, Fn fn) {
  index_t first = 0;
  for (; total - first >= kLargest; first += kLargest) fn(IntC<kLargest>(), first);
  dispatch_tail<kLargest - 1>(total - first, first, fn);
}

template <class T, int kLanes>
void weighted_sum(const Plan& plan, const Region& region, const TensorView& values,
                  const TensorView& weights, const TensorView& result) {
  const index_t padded = plan.values.inner_padded, vectors = padded / kLanes,
                outer_count = plan.values.outer_count;
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j) {
      const auto run_row = [&](auto microkernel, index_t channel, index_t weight) {
        compute_row<decltype(microkernel)>({plan, values, weights, result, i, j, channel, weight},
                                           region.low[2], region.high[2]);
      };
      // Tiles of whole groups with kVectorsPerGroup vectors each.
      const auto run_groups = [&](auto count) {
        constexpr int kVectorsPerGroup = decltype(count)::value;
        for_each_pow2_tile<kVectorTile / kVectorsPerGroup>(outer_count, [&](auto n, index_t g) {
          run_row(ChannelLanes<T, kLanes, decltype(n)::value, kVectorsPerGroup>(), g * padded, g);
        });
      };
      if (plan.vector_axis == VectorAxis::groups) {
        for (index_t v = 0; v < padded; v += kLanes)
          for_each_pow2_tile<kVectorTile>(outer_count, [&](auto n, index_t c) {
            run_row(GroupLanes<T, kLanes, decltype(n)::value>(), c * padded + v, v);
          });
      } else if (vectors == 1) {
        run_groups(IntC<1>());
      } else if (vectors == 2) {
        run_groups(IntC<2>());
      } else {
        for (index_t g = 0; g < outer_count; ++g)
          for_each_pow2_tile<kVectorTile>(vectors, [&](auto n, index_t v) {
            run_row(ChannelLanes<T, kLanes, 1, decltype(n)::value>(), g * padded + v * kLanes, g);
          });
      }
    }
}

// --- Kernel gradient: dot products over the channels of a group ----------------------------------

// Lanes: channels of a group, kVectors vectors of them (0: `vectors`, known at run time). One
// partial vector for each of kLanes consecutive results, in which groups vary faster than taps,
// then one transposing reduction for all of them.
template <class T, int kLanes, int kVectors>
struct KernelGradient {
  using V = Simd<T, kLanes>;

  static inline typename V::Vector dot(const T* x, const T* y, index_t vectors) {
    const index_t count = kVectors ? kVectors : vectors;
    typename V::Vector sum = V::load(x) * V::load(y);
    for (index_t v = 1; v < count; ++v) sum += V::load(x + v * kLanes) * V::load(y + v * kLanes);
    return sum;
  }

  // Any number of groups.
  static void generic(T* result, const T* values, const T* weights, const index_t* tap_offsets,
                      index_t taps, index_t groups, index_t padded, index_t vectors) {
    typename V::Vector partials[kLanes];
    index_t tap = 0, group = 0;
    for (index_t f = 0; f < taps * groups; f += kLanes) {
      int count = 0;
      for (; count < kLanes && tap < taps; ++count) {
        partials[count] =
            dot(values + tap_offsets[tap] + group * padded, weights + group * padded, vectors);
        if (++group == groups) group = 0, ++tap;
      }
      for (int l = count; l < kLanes; ++l) partials[l] = typename V::Vector{};
      const typename V::Vector sum = transpose_reduce<T, kLanes>(partials);
      if (count == kLanes)
        V::store(result + f, sum);
      else
        for (int l = 0; l < count; ++l) result[f + l] = sum[l];
    }
  }

  // kGroups divides kLanes: the weights stay in registers.
  template <int kGroups>
  static void small_groups(T* result, const T* values, const T* weights, const index_t* tap_offsets,
                           index_t taps, index_t padded, index_t vectors) {
    constexpr int kTaps = kLanes / kGroups;
    if (taps < kTaps)
      return generic(result, values, weights, tap_offsets, taps, kGroups, padded, vectors);
    typename V::Vector partials[kLanes], y[kGroups];
    if (kVectors == 1)
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) y[g] = V::load(weights + g * padded);
    for (index_t tap = 0; tap < taps; tap += kTaps) {
      // The last vector overlaps the previous one and stores the same values.
      if (tap + kTaps > taps) tap = taps - kTaps;
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        const T* x = values + tap_offsets[tap + l / kGroups] + l % kGroups * padded;
        partials[l] = kVectors == 1 ? V::load(x) * y[l % kGroups]
                                    : dot(x, weights + l % kGroups * padded, vectors);
      }
      V::store(result + tap * kGroups, transpose_reduce<T, kLanes>(partials));
    }
  }

  // kLanes divides the number of groups.
  static void large_groups(T* result, const T* values, const T* weights, const index_t* tap_offsets,
                           index_t taps, index_t groups, index_t padded, index_t vectors) {
    typename V::Vector partials[kLanes], y[kLanes];
    for (index_t g = 0; g < groups; g += kLanes) {
      if (kVectors == 1)
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) y[l] = V::load(weights + (g + l) * padded);
      for (index_t tap = 0; tap < taps; ++tap) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          const T* x = values + tap_offsets[tap] + (g + l) * padded;
          partials[l] =
              kVectors == 1 ? V::load(x) * y[l] : dot(x, weights + (g + l) * padded, vectors);
        }
        V::store(result + tap * groups + g, transpose_reduce<T, kLanes>(partials));
      }
    }
  }

  static void run(T* result, const T* values, const T* weights, const index_t* tap_offsets,
                  index_t taps, index_t groups, index_t padded, index_t vectors) {
#define SMALL_GROUPS(n) \
  small_groups<(n <= kLanes ? n : 1)>(result, values, weights, tap_offsets, taps, padded, vectors)
    if (groups % kLanes == 0)
      large_groups(result, values, weights, tap_offsets, taps, groups, padded, vectors);
    else if (groups == 1)
      SMALL_GROUPS(1);
    else if (groups == 2)
      SMALL_GROUPS(2);
    else if (groups == 4)
      SMALL_GROUPS(4);
    else if (groups == 8)
      SMALL_GROUPS(8);
    else
      generic(result, values, weights, tap_offsets, taps, groups, padded, vectors);
#undef SMALL_GROUPS
  }
};

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
  const index_t padded = plan.values.inner_padded, outer_count = plan.values.outer_count,
                vectors = padded / kLanes;
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
      const auto gradient =
          vectors == 1 ? KernelGradient<T, kLanes, 1>::run : KernelGradient<T, kLanes, 0>::run;
      gradient(to, x, y, tap_offsets, count, outer_count, padded, vectors);
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

// --- Lanes along the positions of a row ---------------------------------------------------------

// Calls fn(IntC<n>(), first) for pairs of vectors, then single ones, that cover [low, high). The
// last vector overlaps the previous one, so that all are full; both compute the same values.
template <int kLanes, class Fn>
inline void for_each_vector_overlapping(index_t low, index_t high, Fn fn) {
  index_t k = low;
  for (; k + 2 * kLanes <= high; k += 2 * kLanes) fn(IntC<2>(), k);
  if (k + kLanes <= high) fn(IntC<1>(), k), k += kLanes;
  if (k < high) fn(IntC<1>(), high - kLanes);
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

// Tile: kVectors vectors of positions x kTaps taps of a row, from the tap that x and `to` point to.
template <class T, int kLanes, int kVectors, int kTaps>
inline void kernel_gradient_tile(const Plan& plan, const TensorView& values,
                                 const TensorView& weights, const TensorView& result, const T* x,
                                 const T* y, T* to) {
  using V = Simd<T, kLanes>;
  const index_t step = plan.dimension[2].source_step;
  typename V::Vector sum[kVectors][kTaps] = {};
  for (index_t c = 0; c < plan.values.inner_count; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const typename V::Vector y_vec = V::load(y + v * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) sum[v][t] += V::load(x + v * kLanes + t * step) * y_vec;
    }
    x += values.inner_stride;
    y += weights.inner_stride;
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) V::store(to + v * kLanes + t * result.outer_stride, sum[v][t]);
}

template <class T, int kLanes>
void kernel_gradient_positions(const Plan& plan, const Region& region, const TensorView& values,
                               const TensorView& weights, const TensorView& result) {
  using V = Simd<T, kLanes>;
  const Dimension* d = plan.dimension;
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t g = 0; g < plan.values.outer_count; ++g)
        for_each_vector_overlapping<kLanes>(
            region.low[2], region.high[2], [&](auto count, index_t k) {
              constexpr int kVectors = decltype(count)::value;
              const TapRange r0 = d[0].tap_ranges[i], r1 = d[1].tap_ranges[j];
              const T* const y = element_ptr<T>(weights, i, j, k) + g * weights.outer_stride;
              T* const to = element_ptr<T>(result, i, j, k) + g * result.inner_stride;
              if (r0.count * r1.count < d[0].taps * d[1].taps)
                for (index_t t = 0; t < d[0].taps * d[1].taps * d[2].taps; ++t)
                  for (int v = 0; v < kVectors; ++v)
                    V::store(to + v * kLanes + t * result.outer_stride, typename V::Vector{});
              for (index_t a = 0; a < r0.count; ++a)
                for (index_t b = 0; b < r1.count; ++b) {
                  const index_t tap = ((r0.tap + a) * d[1].taps + r1.tap + b) * d[2].taps;
                  const T* const x =
                      element_ptr<T>(values, r0.source + a * d[0].source_step,
                                     r1.source + b * d[1].source_step, k + plan.source_offset) +
                      g * values.outer_stride;
                  for_each_tile_with_tail<8 / kVectors>(d[2].taps, [&](auto n, index_t c) {
                    kernel_gradient_tile<T, kLanes, kVectors, decltype(n)::value>(
                        plan, values, weights, result, x + c * d[2].source_step, y,
                        to + (tap + c) * result.outer_stride);
                  });
                }
            });
}

// --- Matrix products ----------------------------------------------------------------------------

#include "gemm-inl.h"

// --- Peak FLOP/s --------------------------------------------------------------------------------

// Twelve independent chains hide the latency of every FMA unit and fit into 16 registers.
float fma_peak_loop(index_t times) {
  constexpr int kLanes = INVOLUTION_VECTOR_BYTES / 4, kIndependentChains = 12;
  typename Simd<float, kLanes>::Vector sum[kIndependentChains] = {}, x = {}, y = {};
  for (int l = 0; l < kLanes; ++l) x[l] = 0.5f, y[l] = 0.25f;
  for (int c = 0; c < kIndependentChains; ++c) sum[c] = sum[c] + static_cast<float>(c);
  for (index_t n = 0; n < times; ++n) {
#pragma GCC unroll 12
    for (int c = 0; c < kIndependentChains; ++c) sum[c] = sum[c] * x + y;
  }
  float total = 0;
  for (int c = 0; c < kIndependentChains; ++c)
    for (int l = 0; l < kLanes; ++l) total += sum[c][l];
  return total;
}

// --- Taps outside the input ---------------------------------------------------------------------
//
// The input is 0 there, and its product with a non-finite kernel weight (forward) or output
// gradient (kernel gradient) is NaN. The loops above skip these taps, except in rows packed with
// zeros. For finite values they add nothing; non-finite ones are detected and added here.

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

// Adds them at `count` positions of a row, with lanes along positions.
template <class T>
inline void add_outside_taps_row(const Plan& plan, const TapRange& r0, const TapRange& r1,
                                 index_t count, const T* weights, const TensorView& w, T* result,
                                 const TensorView& to) {
  const auto add = [&](const T* factors, T* sums) {
    for (index_t k = 0; k < count; ++k) sums[k] += factors[k] * T(0);
  };
  const index_t taps = plan.dimension[2].taps, groups = plan.values.outer_count,
                channels_per_group = plan.values.inner_count;
  const auto for_each_tap = [&](auto fn) {
    for_each_outside_run(plan.dimension, r0, r1, {taps, 0, 0}, [&](index_t tap, index_t count) {
      for (index_t t = tap; t < tap + count; ++t) fn(t);
    });
  };
  for (index_t g = 0; g < groups; ++g)
    if (plan.pass == Pass::forward)
      for_each_tap([&](index_t t) {
        const T* const factors = weights + t * w.outer_stride + g * w.inner_stride;
        if (finite(factors, count)) return;
        for (index_t c = 0; c < channels_per_group; ++c)
          add(factors, result + g * to.outer_stride + c * to.inner_stride);
      });
    else
      for (index_t c = 0; c < channels_per_group; ++c) {
        const T* const factors = weights + g * w.outer_stride + c * w.inner_stride;
        if (finite(factors, count)) continue;
        for_each_tap(
            [&](index_t t) { add(factors, result + t * to.outer_stride + g * to.inner_stride); });
      }
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

// --- Dispatch by axis, vector width and type ----------------------------------------------------

template <class T, int kLanes>
void dispatch_axis(const Plan& plan, const Region& region, const TensorView& values,
                   const TensorView& weights, const TensorView& result, index_t* tap_offsets) {
  const bool kernel_grad = plan.pass == Pass::kernel_grad;
  if (plan.vector_axis == VectorAxis::positions) {
    if (kernel_grad)
      return kernel_gradient_positions<T, kLanes>(plan, region, values, weights, result);
    return weighted_sum_positions<T, kLanes>(plan, region, values, weights, result);
  }
  if constexpr (kLanes > 1) {
    if (kernel_grad)
      return kernel_gradient<T, kLanes>(plan, region, values, weights, result, tap_offsets);
    return weighted_sum<T, kLanes>(plan, region, values, weights, result);
  }
}

template <class T, int kLanes>
void dispatch_width(const Plan& plan, const Region& region, const TensorView& values,
                    const TensorView& weights, const TensorView& result, index_t* tap_offsets) {
  // With lanes along positions, a row may be shorter than a vector.
  const index_t row = region.high[2] - region.low[2];
  if constexpr (kLanes > 1)
    if (plan.vector_axis == VectorAxis::positions ? row < kLanes : plan.lanes < kLanes)
      return dispatch_width<T, kLanes / 2>(plan, region, values, weights, result, tap_offsets);
  dispatch_axis<T, kLanes>(plan, region, values, weights, result, tap_offsets);
}

void compute(const Plan& plan, const Region& region, const TensorView& values,
             const TensorView& weights, const TensorView& result, index_t* tap_offsets) {
  const bool has_outside_taps = plan.pass != Pass::input_grad;
  if (plan.type == DataType::float64) {
    dispatch_width<double, INVOLUTION_VECTOR_BYTES / 8>(plan, region, values, weights, result,
                                                        tap_offsets);
    if (has_outside_taps) add_outside_taps<double>(plan, region, weights, result);
  } else {
    dispatch_width<float, INVOLUTION_VECTOR_BYTES / 4>(plan, region, values, weights, result,
                                                       tap_offsets);
    if (has_outside_taps) add_outside_taps<float>(plan, region, weights, result);
  }
}

}  // namespace

#define INVOLUTION_JOIN(a, b) a##b
#define INVOLUTION_NAME(target) INVOLUTION_JOIN(target, _kernels)
#define INVOLUTION_TEXT(target) #target
#define INVOLUTION_STRING(target) INVOLUTION_TEXT(target)

extern const KernelTable INVOLUTION_NAME(INVOLUTION_TARGET) = {INVOLUTION_STRING(INVOLUTION_TARGET),
                                                               INVOLUTION_VECTOR_BYTES,
                                                               pack,
                                                               unpack,
                                                               compute,
                                                               gemm,
#if INVOLUTION_VECTOR_BYTES == 64
                                                               gemm_bf16,
#else
                                                               nullptr,
#endif
                                                               fma_peak_loop};

}  // namespace involution
