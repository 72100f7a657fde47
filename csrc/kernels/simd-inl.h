// SIMD vectors of any width by compiler extensions: one source for every target.
// Included only by kernels.cpp, inside its unnamed namespace.

#if INVOLUTION_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T, int kLanes>
struct Simd {
  typedef T Vector __attribute__((vector_size(sizeof(T) * kLanes)));
  typedef T Unaligned
      __attribute__((vector_size(sizeof(T) * kLanes), aligned(alignof(T)), may_alias));

  static Vector load(const T* from) { return *reinterpret_cast<const Unaligned*>(from); }
  static void store(T* to, Vector v) { *reinterpret_cast<Unaligned*>(to) = v; }
};

// std::integer_sequence, which the linker rule of kernels.cpp excludes.
template <int... kIndex>
struct IndexSequence {};
template <int kCount, int... kIndex>
struct MakeIndexSequence : MakeIndexSequence<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeIndexSequence<0, kIndex...> {
  using Type = IndexSequence<kIndex...>;
};

// A vector consists of segments, and a segment of units. A horizontal-add step of a and b adds
// adjacent units of each segment; a segment of the result holds the sums of a in its first half and
// those of b in its second. Returns the lane of (a, b) that lane i of the result takes as the first
// or second operand.
template <int kLanes, int kSegment, int kUnit>
constexpr int hadd_index(int i, int second) {
  const int in_half = i % (kSegment / 2), from_b = i % kSegment >= kSegment / 2;
  const int unit = 2 * (in_half / kUnit) + second;
  return from_b * kLanes + i / kSegment * kSegment + unit * kUnit + in_half % kUnit;
}

template <int kLanes, int kSegment, int kUnit, class Vector, int... kIndex>
inline Vector hadd_step(Vector a, Vector b, IndexSequence<kIndex...>) {
  return __builtin_shufflevector(a, b, hadd_index<kLanes, kSegment, kUnit>(kIndex, 0)...) +
         __builtin_shufflevector(a, b, hadd_index<kLanes, kSegment, kUnit>(kIndex, 1)...);
}

// Source of lane i of a pair of vectors a, b that swap blocks of kBlock lanes: the odd ones of a
// with the even ones of b.
template <int kLanes, int kBlock>
constexpr int butterfly_index(int i, int second) {
  return (i & kBlock) ? (second ? kLanes + i : kLanes + i - kBlock) : (second ? i + kBlock : i);
}

template <int kLanes, int kBlock, class Vector, int... kIndex>
inline void butterfly(Vector& a, Vector& b, IndexSequence<kIndex...>) {
  const Vector first = __builtin_shufflevector(a, b, butterfly_index<kLanes, kBlock>(kIndex, 0)...);
  b = __builtin_shufflevector(a, b, butterfly_index<kLanes, kBlock>(kIndex, 1)...);
  a = first;
}

// Transposes a matrix of kLanes vectors.
template <int kLanes, class Vector, int kBlock = 1>
inline void transpose(Vector* rows) {
  if constexpr (kBlock < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & kBlock) == 0)
        butterfly<kLanes, kBlock>(rows[i], rows[i + kBlock],
                                  typename MakeIndexSequence<kLanes>::Type());
    transpose<kLanes, Vector, 2 * kBlock>(rows);
  }
}

// kChannels interleaved channels in as many vectors, to one vector per channel, and back. Each
// result takes kChannels - 1 shuffles: step kNext inserts the lanes of vector kNext and keeps the
// others.
template <int kLanes, int kChannels, bool kDeinterleave>
constexpr int interleave_index(int to, int l, int next) {
  // Element lane l of vector v has index v * kLanes + l.
  const int number = kDeinterleave ? l * kChannels + to : to * kLanes + l;
  const int vector = kDeinterleave ? number / kLanes : number % kChannels;
  const int lane = kDeinterleave ? number % kLanes : number / kChannels;
  if (vector == next) return kLanes + lane;
  return next == 1 ? (vector == 0 ? lane : 0) : l;
}

template <int kLanes, int kChannels, bool kDeinterleave, int kTo, int kNext, class Vector,
          int... kIndex>
inline Vector gather_lanes(Vector so_far, const Vector* from, IndexSequence<kIndex...> lanes) {
  if constexpr (kNext < kChannels) {
    const Vector with = __builtin_shufflevector(
        so_far, from[kNext],
        interleave_index<kLanes, kChannels, kDeinterleave>(kTo, kIndex, kNext)...);
    return gather_lanes<kLanes, kChannels, kDeinterleave, kTo, kNext + 1>(with, from, lanes);
  } else {
    return so_far;
  }
}

template <int kLanes, int kChannels, bool kDeinterleave, int kTo = 0, class Vector>
inline void shuffle_interleaved(const Vector* from, Vector* to) {
  if constexpr (kTo < kChannels) {
    to[kTo] = gather_lanes<kLanes, kChannels, kDeinterleave, kTo, 1>(
        from[0], from, typename MakeIndexSequence<kLanes>::Type());
    shuffle_interleaved<kLanes, kChannels, kDeinterleave, kTo + 1>(from, to);
  }
}
