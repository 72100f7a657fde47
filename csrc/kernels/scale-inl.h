// Scales and offsets of the channels of a result. Included only by kernels.cpp, inside its unnamed
// namespace.

template <class T>
void scale_typed(const Region& region, const TensorView& view, index_t channels, const T* scale,
                 const T* offset, bool relu) {
  for (index_t i = region.low[0]; i < region.high[0]; ++i)
    for (index_t j = region.low[1]; j < region.high[1]; ++j)
      for (index_t k = region.low[2]; k < region.high[2]; ++k) {
        T* const at = static_cast<T*>(view.data) +
                      (i - view.origin[0]) * view.position_stride[0] +
                      (j - view.origin[1]) * view.position_stride[1] +
                      (k - view.origin[2]) * view.position_stride[2];
        for (index_t c = 0; c < channels; ++c) {
          const T value = at[c] * scale[c] + offset[c];
          at[c] = relu && value < 0 ? 0 : value;  // NaN stays
        }
      }
}

void scale(DataType type, const Region& region, const TensorView& view, index_t channels,
           const void* scale, const void* offset, bool relu) {
  if (type == DataType::float64)
    scale_typed(region, view, channels, static_cast<const double*>(scale),
                static_cast<const double*>(offset), relu);
  else
    scale_typed(region, view, channels, static_cast<const float*>(scale),
                static_cast<const float*>(offset), relu);
}
