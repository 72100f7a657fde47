// Loops over tiles whose size is known to the compiler. Included only by kernels.cpp, inside its
// unnamed namespace.

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

// Calls fn(IntC<n>(), first) for the fewest tiles of at most kLargest that cover `total`, of two
// neighboring sizes.
template <int kLargest, class Fn>
inline void for_each_balanced_tile(index_t total, Fn fn) {
  if (total <= kLargest) return dispatch_tail<kLargest>(total, 0, fn);
  for (index_t first = 0, tiles = ceil_div(total, kLargest); tiles > 0; --tiles) {
    const index_t size = ceil_div(total - first, tiles);
    dispatch_tail<kLargest>(size, first, fn);
    first += size;
  }
}

template <class T>
inline T* element_ptr(const TensorView& view, index_t i, index_t j, index_t k) {
  return static_cast<T*>(view.data) + (i - view.origin[0]) * view.position_stride[0] +
         (j - view.origin[1]) * view.position_stride[1] +
         (k - view.origin[2]) * view.position_stride[2];
}
