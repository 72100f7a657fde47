// Vectors of any number of lanes by the compiler's extensions, so that one text serves every level
// of instructions. Included by kernels.cpp alone, inside its unnamed namespace.

template <class S, int L>
struct Vectors {
  typedef S Vector __attribute__((vector_size(sizeof(S) * L)));
  typedef S Unaligned __attribute__((vector_size(sizeof(S) * L), aligned(alignof(S)), may_alias));

  static Vector load(const S* from) { return *reinterpret_cast<const Unaligned*>(from); }
  static void store(S* to, Vector v) { *reinterpret_cast<Unaligned*>(to) = v; }
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using Type = Indices<I...>;
};

// A vector is seen as segments, each a row of units. Folding a and b adds the units of each segment
// in pairs; a segment of the result has the sums from a in its first half, those from b in its
// second. `folded` is the lane of (a, b) that lane i of the result takes as a pair's first or
// second.
template <int L, int Segment, int Unit>
constexpr int folded(int i, int second) {
  const int in_half = i % (Segment / 2), from_b = i % Segment >= Segment / 2;
  const int unit = 2 * (in_half / Unit) + second;
  return from_b * L + i / Segment * Segment + unit * Unit + in_half % Unit;
}

template <int L, int Segment, int Unit, class Vector, int... I>
inline Vector fold(Vector a, Vector b, Indices<I...>) {
  return __builtin_shufflevector(a, b, folded<L, Segment, Unit>(I, 0)...) +
         __builtin_shufflevector(a, b, folded<L, Segment, Unit>(I, 1)...);
}

// Folds neighbours until a segment is one row of sums.
template <int L, int Segment, int Unit, int Smallest, class Vector>
inline void fold_all(Vector* parts, int& count) {
  if constexpr (Unit >= Smallest) {
    for (int i = 0; i < count / 2; ++i)
      parts[i] = fold<L, Segment, Unit>(parts[2 * i], parts[2 * i + 1],
                                        typename CountTo<L>::Type());
    count /= 2;
    fold_all<L, Segment, Unit / 2, Smallest>(parts, count);
  }
}

// Lane i of the result is the sum of vector i of L. First inside 128 bits, then across: each fold is
// two cheap shuffles and an addition.
template <class S, int L>
inline typename Vectors<S, L>::Vector sums(typename Vectors<S, L>::Vector* parts) {
  constexpr int inside = 16 / sizeof(S) < L ? 16 / sizeof(S) : L;
  int count = L;
  fold_all<L, inside, inside / 2, 1>(parts, count);
  fold_all<L, L, L / 2, inside>(parts, count);
  return parts[0];
}

// Lane i of a pair of vectors a, b after swapping blocks of H lanes: a's odd ones with b's even ones.
template <int L, int H>
constexpr int swapped(int i, int second) {
  return (i & H) ? (second ? L + i : L + i - H) : (second ? i + H : i);
}

template <int L, int H, class Vector, int... I>
inline void swap_blocks(Vector& a, Vector& b, Indices<I...>) {
  const Vector first = __builtin_shufflevector(a, b, swapped<L, H>(I, 0)...);
  b = __builtin_shufflevector(a, b, swapped<L, H>(I, 1)...);
  a = first;
}

// L vectors of L numbers, rows of a matrix, become its columns.
template <int L, class Vector, int H = 1>
inline void transpose(Vector* rows) {
  if constexpr (H < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if ((i & H) == 0) swap_blocks<L, H>(rows[i], rows[i + H], typename CountTo<L>::Type());
    transpose<L, Vector, 2 * H>(rows);
  }
}

// Channels that alternate, C of them in C vectors, to one vector for each channel, and back. Lane l
// of vector v is number v * L + l. Each result is made in C - 1 shuffles: `Next` brings in the lanes
// that vector Next has and keeps what is there.
template <int L, int C, bool Apart>
constexpr int alternating(int to, int l, int next) {
  // From which vector and lane this lane comes.
  const int number = Apart ? l * C + to : to * L + l;
  const int vector = Apart ? number / L : number % C;
  const int lane = Apart ? number % L : number / C;
  if (vector == next) return L + lane;
  return next == 1 ? (vector == 0 ? lane : 0) : l;
}

template <int L, int C, bool Apart, int To, int Next, class Vector, int... I>
inline Vector collect(Vector so_far, const Vector* from, Indices<I...> lanes) {
  if constexpr (Next < C) {
    const Vector with = __builtin_shufflevector(
        so_far, from[Next], alternating<L, C, Apart>(To, I, Next)...);
    return collect<L, C, Apart, To, Next + 1>(with, from, lanes);
  } else {
    return so_far;
  }
}

template <int L, int C, bool Apart, int To = 0, class Vector>
inline void alternate(const Vector* from, Vector* to) {
  if constexpr (To < C) {
    to[To] = collect<L, C, Apart, To, 1>(from[0], from, typename CountTo<L>::Type());
    alternate<L, C, Apart, To + 1>(from, to);
  }
}
