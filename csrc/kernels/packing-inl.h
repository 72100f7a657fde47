// Packing: copies between tensors and views, which convert between layouts and types. Included only
// by kernels.cpp, inside its unnamed namespace.

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
