// The loops. Compiled once for each level of instructions, with INVOLUTION_LEVEL as its name and
// INVOLUTION_BYTES as the size of its vectors.
//
// Nothing here may call code that other files are compiled with too, templates of the standard
// library among it: the linker might keep the copy that this machine cannot run.
#include <cstdint>
#include <cstring>
#if INVOLUTION_BYTES == 64
#include <immintrin.h>
#endif

#include "job.h"

namespace involution {
namespace {

// Where sums must stay in registers.
#define INLINE inline __attribute__((always_inline))

#include "numbers.h"
#include "vectors.h"

// Compilers load a vector from memory again for each of its uses, if an instruction can do that
// beside its own work; what is said to change here must be in a register.
template <class Vector>
INLINE void keep_in_register([[maybe_unused]] Vector& x) {
#if defined(__x86_64__)
  // Clang has no registers for shorter vectors, which no level takes here.
  if constexpr (sizeof x >= 16) asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// --- Copies between storage and views -----------------------------------------------------------

// A rectangle of numbers, channels by positions, and how far apart they lie.
template <class T>
struct Rectangle {
  T* data;
  Size channel, position;  // strides
};

// Brings nearer what will be read soon: `bytes` of it, some pages' worth of copying ahead. Reading in
// short rows, processors do not see by themselves where it goes on.
inline void fetch_ahead(const void* from, Size bytes) {
  constexpr Size AHEAD = 4096, LINE = 64;
  for (Size at = 0; at < bytes; at += LINE)
    __builtin_prefetch(static_cast<const char*>(from) + AHEAD + at);
}

// A few channels that alternate, to planes and back.
template <class T, int C>
void take_apart(const T* from, T* to, Size to_step, Size count) {
  constexpr int L = INVOLUTION_BYTES / sizeof(T);
  using V = Vectors<T, L>;
  Size p = 0;
  for (; p + L <= count; p += L) {
    fetch_ahead(from + p * C, C * L * sizeof(T));
    typename V::Vector in[C], out[C];
    for (int c = 0; c < C; ++c) in[c] = V::load(from + p * C + c * L);
    alternate<L, C, true>(in, out);
    for (int c = 0; c < C; ++c) V::store(to + c * to_step + p, out[c]);
  }
  for (; p < count; ++p)
    for (int c = 0; c < C; ++c) to[c * to_step + p] = from[p * C + c];
}

template <class T, int C>
void put_together(const T* from, Size from_step, T* to, Size count) {
  constexpr int L = INVOLUTION_BYTES / sizeof(T);
  using V = Vectors<T, L>;
  Size p = 0;
  for (; p + L <= count; p += L) {
    typename V::Vector in[C], out[C];
    for (int c = 0; c < C; ++c) in[c] = V::load(from + c * from_step + p);
    alternate<L, C, false>(in, out);
    for (int c = 0; c < C; ++c) V::store(to + p * C + c * L, out[c]);
  }
  for (; p < count; ++p)
    for (int c = 0; c < C; ++c) to[p * C + c] = from[c * from_step + p];
}

// Where channels follow each other on one side, and positions on the other: by squares.
template <class T>
void copy_turned(const T* from, Size from_step, T* to, Size to_step, Size rows, Size columns) {
  constexpr int most = INVOLUTION_BYTES / sizeof(T), L = most < 8 ? most : 8;
  using V = Vectors<T, L>;
  if (columns == from_step && columns > 1 && columns <= 4)
    return columns == 2   ? take_apart<T, 2>(from, to, to_step, rows)
           : columns == 3 ? take_apart<T, 3>(from, to, to_step, rows)
                          : take_apart<T, 4>(from, to, to_step, rows);
  if (rows == to_step && rows > 1 && rows <= 4)
    return rows == 2   ? put_together<T, 2>(from, from_step, to, columns)
           : rows == 3 ? put_together<T, 3>(from, from_step, to, columns)
                       : put_together<T, 4>(from, from_step, to, columns);
  Size r = 0;
  for (; r + L <= rows; r += L) {
    if (from_step < 64) fetch_ahead(from + r * from_step, L * from_step * sizeof(T));
    Size c = 0;
    for (; c + L <= columns; c += L) {
      typename V::Vector square[L];
#pragma GCC unroll 8
      for (int i = 0; i < L; ++i) square[i] = V::load(from + (r + i) * from_step + c);
      transpose<L>(square);
#pragma GCC unroll 8
      for (int i = 0; i < L; ++i) V::store(to + (c + i) * to_step + r, square[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < L; ++i) to[c * to_step + r + i] = from[(r + i) * from_step + c];
  }
  for (; r < rows; ++r)
    for (Size c = 0; c < columns; ++c) to[c * to_step + r] = from[r * from_step + c];
}

inline void convert(double from, double& to) { to = from; }
inline void convert(float from, float& to) { to = from; }
template <class T>
inline void convert(T from, float& to) { to = widen(from); }
template <class T>
inline void convert(float from, T& to) { narrow(from, to); }

template <class T, class S>
void copy(Rectangle<const T> from, Rectangle<S> to, Size channels, Size positions) {
  if (from.channel == 1 && to.channel == 1) {
    for (Size p = 0; p < positions; ++p) {
      const T* const source = from.data + p * from.position;
      S* const target = to.data + p * to.position;
      for (Size c = 0; c < channels; ++c) convert(source[c], target[c]);
    }
    return;
  }
  if constexpr (sizeof(T) == sizeof(S)) {  // the same type
    if (from.channel == 1 && to.position == 1)
      return copy_turned(from.data, from.position, to.data, to.channel, positions, channels);
    if (from.position == 1 && to.channel == 1)
      return copy_turned(from.data, from.channel, to.data, to.position, channels, positions);
  }
  for (Size c = 0; c < channels; ++c) {
    const T* const source = from.data + c * from.channel;
    S* const target = to.data + c * to.channel;
    for (Size p = 0; p < positions; ++p) convert(source[p * from.position], target[p * to.position]);
  }
}

// Positions of a row that are copied together: enough for whole lines of memory where channels lie
// planes apart, few enough for the first cache; of a few channels, more.
constexpr Size STRIP = 16, NUMBERS = 512;

// Calls visit(in the tensor, in the view, channels, positions) for rectangles that make up the box.
template <class T, class S, class Visit>
inline void each_rectangle(const Tensor& t, Size sample, const Box& box, const View& view,
                           Visit visit) {
  const bool one_axis = t.padded == t.inners && t.outer == t.inner * t.inners;
  const bool single = t.padded == 1;
  const Size runs = one_axis || single ? 1 : t.outers;
  const Size channels = one_axis ? t.outers * t.inners : single ? t.outers : t.inners;
  const Size stored = single ? t.outer : t.inner, seen = single ? view.outer : view.inner;
  const Size strip = channels * STRIP < NUMBERS ? NUMBERS / channels / STRIP * STRIP : STRIP;
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j)
      for (Size k = box.low[2]; k < box.high[2]; k += strip)
        for (Size o = 0; o < runs; ++o) {
          T* const in_tensor = static_cast<T*>(t.data) + sample * t.batch + i * t.position[0] +
                               j * t.position[1] + k * t.position[2] + o * t.outer;
          S* const in_view = static_cast<S*>(view.data) +
                             (i - view.origin[0]) * view.position[0] +
                             (j - view.origin[1]) * view.position[1] +
                             (k - view.origin[2]) * view.position[2] + o * view.outer;
          visit(Rectangle<T>{in_tensor, stored, t.position[2]},
                Rectangle<S>{in_view, seen, view.position[2]}, channels,
                box.high[2] - k < strip ? box.high[2] - k : strip);
        }
}

// Zeros for the channels low to high of every group, at positions low2 to high2 of every row: a few
// at a time, for which calling memset takes longer than the zeros do.
template <class S>
#ifndef __clang__
__attribute__((optimize("no-tree-loop-distribute-patterns")))
#endif
void clear(const Tensor& t, const Box& box, const View& view, Size low, Size high, Size low2,
           Size high2) {
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j)
      for (Size o = 0; o < t.outers; ++o)
        for (Size n = low; n < high; ++n)
          for (Size k = low2; k < high2; ++k)
            static_cast<S*>(view.data)[(i - view.origin[0]) * view.position[0] +
                                       (j - view.origin[1]) * view.position[1] +
                                       (k - view.origin[2]) * view.position[2] +
                                       o * view.outer + n * view.inner] = 0;
}

template <class T, class S>
void pack_as(const Tensor& t, Size sample, const Box& box, Size size, const View& view) {
  Box inside = box;
  if (inside.low[2] < 0) inside.low[2] = 0;
  if (inside.high[2] > size) inside.high[2] = size;
  clear<S>(t, box, view, 0, t.inners, box.low[2], inside.low[2]);
  clear<S>(t, box, view, 0, t.inners, inside.high[2], box.high[2]);
  clear<S>(t, box, view, t.inners, t.padded, box.low[2], box.high[2]);
  each_rectangle<T, S>(t, sample, inside, view,
                       [](Rectangle<T> from, Rectangle<S> to, Size channels, Size positions) {
                         copy<T, S>({from.data, from.channel, from.position}, to, channels,
                                    positions);
                       });
}

template <class T, class S>
void unpack_as(const Tensor& t, Size sample, const Box& box, const View& view) {
  each_rectangle<T, S>(t, sample, box, view,
                       [](Rectangle<T> to, Rectangle<S> from, Size channels, Size positions) {
                         copy<S, T>({from.data, from.channel, from.position}, to, channels,
                                    positions);
                       });
}

void pack(const Tensor& t, Type type, Size sample, const Box& box, Size size, const View& view) {
  switch (type) {
    case Type::float64: return pack_as<double, double>(t, sample, box, size, view);
    case Type::float32: return pack_as<float, float>(t, sample, box, size, view);
    case Type::bfloat16: return pack_as<BFloat16, float>(t, sample, box, size, view);
    case Type::float16: return pack_as<Float16, float>(t, sample, box, size, view);
  }
}

void unpack(const Tensor& t, Type type, Size sample, const Box& box, const View& view) {
  switch (type) {
    case Type::float64: return unpack_as<double, double>(t, sample, box, view);
    case Type::float32: return unpack_as<float, float>(t, sample, box, view);
    case Type::bfloat16: return unpack_as<BFloat16, float>(t, sample, box, view);
    case Type::float16: return unpack_as<Float16, float>(t, sample, box, view);
  }
}

// --- Sums over taps: the output and the input gradient ------------------------------------------

template <class S>
inline S* at(const View& view, Size i, Size j, Size k) {
  return static_cast<S*>(view.data) + (i - view.origin[0]) * view.position[0] +
         (j - view.origin[1]) * view.position[1] + (k - view.origin[2]) * view.position[2];
}

// Vectors across the channels of a group: `Groups` groups of `Count` vectors at a time, which with
// more than one are all that a group has. The weight of a tap and group is one number.
template <class S, int L, int Groups, int Count>
struct AcrossMembers {
  using Number = S;
  using V = Vectors<S, L>;
  static constexpr int VECTORS = Groups * Count;

  // Adds one tap's terms to the sums of the results First to Last - 1, which share its values.
  template <int First, int Last>
  static INLINE void add(typename V::Vector (*sum)[VECTORS], const S* values,
                         const S* const* weights, Size) {
    constexpr Size padded = Count * L;
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < Count; ++v) {
        typename V::Vector x = V::load(values + g * padded + v * L);
        if (Last - First > 1) keep_in_register(x);
#pragma GCC unroll 8
        for (int r = First; r < Last; ++r) sum[r][g * Count + v] += weights[r][g] * x;
      }
  }
  static INLINE void store(S* to, const typename V::Vector* sum, Size) {
    constexpr Size padded = Count * L;
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < Count; ++v) V::store(to + g * padded + v * L, sum[g * Count + v]);
  }
};

// Vectors across groups, for `Count` channels of each at a time. A tap's weights are a vector.
template <class S, int L, int Count>
struct AcrossGroups {
  using Number = S;
  using V = Vectors<S, L>;
  static constexpr int VECTORS = Count;

  template <int First, int Last>
  static INLINE void add(typename V::Vector (*sum)[VECTORS], const S* values,
                         const S* const* weights, Size padded) {
#pragma GCC unroll 8
    for (int r = First; r < Last; ++r) {
      const typename V::Vector w = V::load(weights[r]);
#pragma GCC unroll 8
      for (int m = 0; m < Count; ++m) sum[r][m] += w * V::load(values + m * padded);
    }
  }
  static INLINE void store(S* to, const typename V::Vector* sum, Size padded) {
#pragma GCC unroll 8
    for (int m = 0; m < Count; ++m) V::store(to + m * padded, sum[m]);
  }
};

// A row of taps, for neighbouring results: they read the same columns of the input, each from one
// of its own to one of its own. Columns are counted in steps of the places.
template <int Results>
struct Columns {
  Size low[Results], high[Results];

  // True if both ends ascend and the last result begins before the first has ended: then those that
  // read a column are always neighbours.
  bool make(const Reach* reach, Size step) {
    for (int r = 0; r < Results; ++r) {
      const Size apart = reach[r].place - reach[0].place;
      if (apart % step != 0) return false;
      low[r] = apart / step;
      high[r] = low[r] + reach[r].count;
      if (r > 0 && (low[r] < low[r - 1] || high[r] < high[r - 1])) return false;
    }
    return low[Results - 1] <= high[0];
  }
};

// The loops over a row of taps, by which results read the columns.
template <class Way, int Results>
struct Row {
  using S = typename Way::Number;
  using Vector = typename Way::V::Vector;

  Vector (*sum)[Way::VECTORS];
  const S* value;
  const S* weight[Results];
  Size value_step, weight_step, padded;
  Size ahead_of_column;

  template <int First, int Last>
  INLINE void column() {
    if (ahead_of_column != 0) {
      __builtin_prefetch(weight[First] + ahead_of_column);
      if (Last - First > 1) __builtin_prefetch(weight[Last - 1] + ahead_of_column);
    }
    Way::template add<First, Last>(sum, value, weight, padded);
    value += value_step;
#pragma GCC unroll 8
    for (int r = First; r < Last; ++r) weight[r] += weight_step;
  }
  template <int First, int Last>
  INLINE void columns(Size count) {
    for (Size c = 0; c < count; ++c) column<First, Last>();
  }
  // Those where results 0 to Last - 1 have begun, then those where only First and later go on.
  template <int Last>
  INLINE void begin(const Columns<Results>& at) {
    if constexpr (Last < Results) {
      columns<0, Last>(at.low[Last] - at.low[Last - 1]);
      begin<Last + 1>(at);
    }
  }
  template <int First>
  INLINE void end(const Columns<Results>& at) {
    if constexpr (First < Results) {
      columns<First, Results>(at.high[First] - at.high[First - 1]);
      end<First + 1>(at);
    }
  }
  INLINE void all(const Columns<Results>& at) {
    begin<1>(at);
    columns<0, Results>(at.high[0] - at.low[Results - 1]);
    end<1>(at);
  }
};

// What is the same for all results of a row.
struct Line {
  const Job& job;
  const View &values, &weights, &result;
  Size i, j, channel, weight;  // the row, and the first channel's and weight's place in a position
};

// Results k to k + Results - 1 of a line, in the order in which their columns ascend.
template <class Way, int Results>
inline void gather_results(const Line& line, const Columns<Results>& columns, Size k) {
  using S = typename Way::Number;
  const Job& job = line.job;
  const Dimension *d0 = &job.dimension[0], *d1 = &job.dimension[1], *d2 = &job.dimension[2];
  const Reach r0 = d0->reach[line.i], r1 = d1->reach[line.j];
  const bool at_place = job.member == Member::input, reverse = d2->place_step < 0;
  const Size tap_weights = job.weights.padded;

  typename Way::V::Vector sum[Results][Way::VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < Results; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Way::VECTORS; ++v) sum[r][v] = typename Way::V::Vector{};

  // From one tap to the next, in each dimension, in the values and in the weights.
  const Size tap_size[3] = {d1->taps * d2->taps * tap_weights, d2->taps * tap_weights, tap_weights};
  Size value_step[3], weight_step[3];
  for (int n = 0; n < 3; ++n) {
    const Dimension& d = job.dimension[n];
    value_step[n] = d.place_step * line.values.position[n];
    weight_step[n] = d.tap_step * tap_size[n] +
                     (at_place ? d.place_step * line.weights.position[n] : 0);
  }

  Row<Way, Results> row;
  row.sum = sum;
  row.padded = job.values.padded;
  row.value_step = value_step[2];
  row.weight_step = weight_step[2];
  const Size first = r0.tap * tap_size[0] + r1.tap * tap_size[1] + line.weight;
  const S *value = nullptr, *weight[Results];
#pragma GCC unroll 8
  for (int r = 0; r < Results; ++r) {
    const Size n = k + (reverse ? Results - 1 - r : r);
    const Reach r2 = d2->reach[n];
    if (r == 0) value = at<S>(line.values, r0.place, r1.place, r2.place) + line.channel;
    weight[r] = (at_place ? at<S>(line.weights, r0.place, r1.place, r2.place)
                          : at<S>(line.weights, line.i, line.j, n)) +
                first + r2.tap * tap_size[2];
  }
  // While these results are made, the next ones' weights come nearer.
  const Size ahead = Results * line.weights.position[2];
  row.ahead_of_column = at_place ? ahead : 0;
  const Size row_size = at_place ? 0 : (columns.high[0] - columns.low[0]) * tap_weights;
  for (Size a = 0; a < r0.count; ++a)
    for (Size b = 0; b < r1.count; ++b) {
      row.value = value + a * value_step[0] + b * value_step[1];
#pragma GCC unroll 8
      for (int r = 0; r < Results; ++r) {
        row.weight[r] = weight[r] + a * weight_step[0] + b * weight_step[1];
        for (Size n = 0; n < row_size; n += 64 / sizeof(S))
          __builtin_prefetch(row.weight[r] + ahead + n);
      }
      row.all(columns);
    }
#pragma GCC unroll 8
  for (int r = 0; r < Results; ++r) {
    const Size n = k + (reverse ? Results - 1 - r : r);
    Way::store(at<S>(line.result, line.i, line.j, n) + line.channel, sum[r], row.padded);
  }
}

// Results of a line that are made together, and vectors of each: their sums fit into registers.
constexpr int TOGETHER = INVOLUTION_BYTES == 64 ? 4 : 2;
constexpr int SUMS = 4;

// The next results of a line, at most `Most` of them together; returns how many were made.
template <class Way, int Most>
inline Size gather_next(const Line& line, Size k, Size high) {
  const Dimension& d = line.job.dimension[2];
  if (k + Most <= high) {
    Reach reach[Most];
    for (int r = 0; r < Most; ++r) reach[r] = d.reach[k + (d.place_step < 0 ? Most - 1 - r : r)];
    Columns<Most> columns;
    if (columns.make(reach, d.place_step) || Most == 1) {
      gather_results<Way, Most>(line, columns, k);
      return Most;
    }
  }
  if constexpr (Most > 1) return gather_next<Way, Most / 2>(line, k, high);
  return 1;
}

template <class Way>
void gather_line(const Line& line, Size low, Size high) {
  for (Size k = low; k < high;) k += gather_next<Way, TOGETHER>(line, k, high);
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls visit(Int<n>(), first) for pieces of `total`, as large as can be: of Largest, half of that,
// and so on to 1.
template <int Largest, class Visit>
inline void each_piece(Size total, Visit visit, Size first = 0) {
  for (; total - first >= Largest; first += Largest) visit(Int<Largest>(), first);
  if constexpr (Largest > 1) each_piece<Largest / 2>(total, visit, first);
}

// The last piece is what is left, whatever its size.
template <int Left, class Visit>
inline void last_piece(Size left, Size first, Visit visit) {
  if constexpr (Left > 0) {
    if (left == Left) return visit(Int<Left>(), first);
    last_piece<Left - 1>(left, first, visit);
  }
}
template <int Largest, class Visit>
inline void few_pieces(Size total, Visit visit) {
  Size first = 0;
  for (; total - first >= Largest; first += Largest) visit(Int<Largest>(), first);
  last_piece<Largest - 1>(total - first, first, visit);
}

template <class S, int L>
void gather(const Job& job, const Box& box, const View& values, const View& weights,
            const View& result) {
  const Size padded = job.values.padded, vectors = padded / L, outers = job.values.outers;
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j) {
      const auto line = [&](auto way, Size channel, Size weight) {
        gather_line<decltype(way)>({job, values, weights, result, i, j, channel, weight},
                                   box.low[2], box.high[2]);
      };
      // Whole groups of Count vectors each, or pieces of one group's vectors.
      const auto whole = [&](auto count) {
        constexpr int Count = decltype(count)::value;
        each_piece<SUMS / Count>(outers, [&](auto n, Size g) {
          line(AcrossMembers<S, L, decltype(n)::value, Count>(), g * padded, g);
        });
      };
      if (job.across == Across::groups) {
        for (Size v = 0; v < padded; v += L)
          each_piece<SUMS>(outers, [&](auto n, Size m) {
            line(AcrossGroups<S, L, decltype(n)::value>(), m * padded + v, v);
          });
      } else if (vectors == 1) {
        whole(Int<1>());
      } else if (vectors == 2) {
        whole(Int<2>());
      } else {
        for (Size g = 0; g < outers; ++g)
          each_piece<SUMS>(vectors, [&](auto n, Size v) {
            line(AcrossMembers<S, L, 1, decltype(n)::value>(), g * padded + v * L, g);
          });
      }
    }
}

// --- Sums over the channels of a group: the kernel gradient --------------------------------------

// Vectors across the channels of a group, `Count` of them (0: as many as there are). The sums for L
// neighbours in the result, which counts groups faster than taps, are made from one product each.
template <class S, int L, int Count>
struct Products {
  using V = Vectors<S, L>;

  static inline typename V::Vector product(const S* x, const S* y, Size vectors) {
    const Size count = Count ? Count : vectors;
    typename V::Vector sum = V::load(x) * V::load(y);
    for (Size v = 1; v < count; ++v) sum += V::load(x + v * L) * V::load(y + v * L);
    return sum;
  }

  // Any number of groups and taps.
  static void some(S* result, const S* values, const S* weights, const Size* value_at, Size taps,
                   Size groups, Size padded, Size vectors) {
    typename V::Vector parts[L];
    Size tap = 0, group = 0;
    for (Size f = 0; f < taps * groups; f += L) {
      int count = 0;
      for (; count < L && tap < taps; ++count) {
        parts[count] = product(values + value_at[tap] + group * padded, weights + group * padded,
                               vectors);
        if (++group == groups) group = 0, ++tap;
      }
      for (int l = count; l < L; ++l) parts[l] = typename V::Vector{};
      const typename V::Vector sum = sums<S, L>(parts);
      if (count == L)
        V::store(result + f, sum);
      else
        for (int l = 0; l < count; ++l) result[f + l] = sum[l];
    }
  }

  // `Groups` of them divide L: the weights stay in registers.
  template <int Groups>
  static void few_groups(S* result, const S* values, const S* weights, const Size* value_at,
                         Size taps, Size padded, Size vectors) {
    constexpr int Taps = L / Groups;
    if (taps < Taps) return some(result, values, weights, value_at, taps, Groups, padded, vectors);
    typename V::Vector parts[L], y[Groups];
    if (Count == 1)
#pragma GCC unroll 16
      for (int g = 0; g < Groups; ++g) y[g] = V::load(weights + g * padded);
    for (Size tap = 0; tap < taps; tap += Taps) {
      // The last vector reaches back over the one before it: what both make is the same.
      if (tap + Taps > taps) tap = taps - Taps;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        const S* x = values + value_at[tap + l / Groups] + l % Groups * padded;
        parts[l] = Count == 1 ? V::load(x) * y[l % Groups]
                              : product(x, weights + l % Groups * padded, vectors);
      }
      V::store(result + tap * Groups, sums<S, L>(parts));
    }
  }

  // L divides the number of groups.
  static void many_groups(S* result, const S* values, const S* weights, const Size* value_at,
                          Size taps, Size groups, Size padded, Size vectors) {
    typename V::Vector parts[L], y[L];
    for (Size g = 0; g < groups; g += L) {
      if (Count == 1)
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) y[l] = V::load(weights + (g + l) * padded);
      for (Size tap = 0; tap < taps; ++tap) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          const S* x = values + value_at[tap] + (g + l) * padded;
          parts[l] = Count == 1 ? V::load(x) * y[l]
                                : product(x, weights + (g + l) * padded, vectors);
        }
        V::store(result + tap * groups + g, sums<S, L>(parts));
      }
    }
  }

  static void all(S* result, const S* values, const S* weights, const Size* value_at, Size taps,
                  Size groups, Size padded, Size vectors) {
#define FEW(n) \
  few_groups<(n <= L ? n : 1)>(result, values, weights, value_at, taps, padded, vectors)
    if (groups % L == 0)
      many_groups(result, values, weights, value_at, taps, groups, padded, vectors);
    else if (groups == 1)
      FEW(1);
    else if (groups == 2)
      FEW(2);
    else if (groups == 4)
      FEW(4);
    else if (groups == 8)
      FEW(8);
    else
      some(result, values, weights, value_at, taps, groups, padded, vectors);
#undef FEW
  }
};

// Vectors across groups: a plain sum over the channels of each, for four taps at a time.
template <class S, int L, int Taps>
inline void product_of_groups(S* result, const S* values, const S* weights, const Size* value_at,
                              Size members, Size padded) {
  using V = Vectors<S, L>;
  for (Size v = 0; v < padded; v += L) {
    typename V::Vector sum[Taps] = {};
    for (Size m = 0; m < members; ++m) {
      const typename V::Vector y = V::load(weights + m * padded + v);
#pragma GCC unroll 4
      for (int t = 0; t < Taps; ++t) sum[t] += V::load(values + value_at[t] + m * padded + v) * y;
    }
#pragma GCC unroll 4
    for (int t = 0; t < Taps; ++t) V::store(result + t * padded + v, sum[t]);
  }
}

template <class S, int L>
void kernel_gradient(const Job& job, const Box& box, const View& values, const View& weights,
                     const View& result, Size* offsets) {
  const Dimension* d = job.dimension;
  const Size padded = job.values.padded, outers = job.values.outers, vectors = padded / L;
  const Size taps = d[0].taps * d[1].taps * d[2].taps, row = job.result.padded;

  // Where the values of every tap lie, from the first tap's.
  Size f = 0;
  for (Size a = 0; a < d[0].taps; ++a)
    for (Size b = 0; b < d[1].taps; ++b)
      for (Size c = 0; c < d[2].taps; ++c)
        offsets[f++] = a * d[0].place_step * values.position[0] +
                       b * d[1].place_step * values.position[1] +
                       c * d[2].place_step * values.position[2];

  const auto run = [&](S* to, const S* x, const S* y, Size count) {
    if (job.across == Across::groups) {
      Size tap = 0;
      for (; tap + 4 <= count; tap += 4)
        product_of_groups<S, L, 4>(to + tap * row, x, y, offsets + tap, outers, padded);
      for (; tap < count; ++tap)
        product_of_groups<S, L, 1>(to + tap * row, x, y, offsets + tap, outers, padded);
    } else {
      const auto products = vectors == 1 ? Products<S, L, 1>::all : Products<S, L, 0>::all;
      products(to, x, y, offsets, count, outers, padded, vectors);
    }
  };

  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j)
      for (Size k = box.low[2]; k < box.high[2]; ++k) {
        const Reach r0 = d[0].reach[i], r1 = d[1].reach[j], r2 = d[2].reach[k];
        const S* y = at<S>(weights, i, j, k);
        S* to = at<S>(result, i, j, k);
        if (r0.count * r1.count * r2.count == taps) {
          run(to, at<S>(values, r0.place, r1.place, r2.place), y, taps);
          continue;
        }
        for (Size f = 0; f < taps * row; ++f) to[f] = 0;
        for (Size a = 0; a < r0.count; ++a)
          for (Size b = 0; b < r1.count; ++b) {
            const Size tap = ((r0.tap + a) * d[1].taps + r1.tap + b) * d[2].taps + r2.tap;
            run(to + tap * row,
                at<S>(values, r0.place + a * d[0].place_step, r1.place + b * d[1].place_step,
                      r2.place),
                y, r2.count);
          }
      }
}

// --- Vectors across the positions of a row ---------------------------------------------------------

// Calls visit(Int<n>(), first) for pairs of vectors of L, or single ones, that cover low to high. The
// last one reaches back over the one before it, so that all are whole: what both make is the same.
template <int L, class Visit>
inline void each_vector(Size low, Size high, Visit visit) {
  Size k = low;
  for (; k + 2 * L <= high; k += 2 * L) visit(Int<2>(), k);
  if (k + L <= high) visit(Int<1>(), k), k += L;
  if (k < high) visit(Int<1>(), high - L);
}

// Sums for `Count` vectors of positions and `Members` channels.
template <class S, int L, int Count, int Members>
inline void gather_vectors(const Job& job, const View& values, const View& weights,
                           const View& result, Size i, Size j, Size k, Size g, Size m) {
  using V = Vectors<S, L>;
  const Dimension *d0 = &job.dimension[0], *d1 = &job.dimension[1], *d2 = &job.dimension[2];
  const Reach r0 = d0->reach[i], r1 = d1->reach[j];
  const bool at_place = job.member == Member::input;
  // All taps of a row, from the first: copies have zeros where a tap meets nothing.
  const Size place2 = k + job.first_place;
  const Size value_step = d2->place_step;
  const Size weight_step = d2->tap_step * weights.outer + (at_place ? d2->place_step : 0);
  typename V::Vector sum[Count][Members];
#pragma GCC unroll 2
  for (int v = 0; v < Count; ++v)
#pragma GCC unroll 8
    for (int n = 0; n < Members; ++n) sum[v][n] = typename V::Vector{};
  for (Size a = 0; a < r0.count; ++a)
    for (Size b = 0; b < r1.count; ++b) {
      const Size place0 = r0.place + a * d0->place_step, place1 = r1.place + b * d1->place_step;
      const Size tap =
          ((r0.tap + a * d0->tap_step) * d1->taps + r1.tap + b * d1->tap_step) * d2->taps;
      const S* value = at<S>(values, place0, place1, place2) + g * values.outer + m * values.inner;
      const S* weight = (at_place ? at<S>(weights, place0, place1, place2)
                                  : at<S>(weights, i, j, k)) +
                        tap * weights.outer + g * weights.inner;
      for (Size c = 0; c < d2->taps; ++c) {
#pragma GCC unroll 2
        for (int v = 0; v < Count; ++v) {
          const typename V::Vector w = V::load(weight + v * L);
#pragma GCC unroll 8
          for (int n = 0; n < Members; ++n)
            sum[v][n] += w * V::load(value + v * L + n * values.inner);
        }
        value += value_step;
        weight += weight_step;
      }
    }
  S* const to = at<S>(result, i, j, k) + g * result.outer + m * result.inner;
#pragma GCC unroll 2
  for (int v = 0; v < Count; ++v)
#pragma GCC unroll 8
    for (int n = 0; n < Members; ++n) V::store(to + v * L + n * result.inner, sum[v][n]);
}

template <class S, int L>
void gather_positions(const Job& job, const Box& box, const View& values, const View& weights,
                      const View& result) {
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j)
      for (Size g = 0; g < job.values.outers; ++g)
        each_vector<L>(box.low[2], box.high[2], [&](auto count, Size k) {
          constexpr int Count = decltype(count)::value;
          few_pieces<8 / Count>(job.values.inners, [&](auto n, Size m) {
            gather_vectors<S, L, Count, decltype(n)::value>(job, values, weights, result, i, j, k,
                                                            g, m);
          });
        });
}

// The gradients of `Taps` taps of a row, from the one that x and `to` are at, for `Count` vectors of
// positions.
template <class S, int L, int Count, int Taps>
inline void product_vectors(const Job& job, const View& values, const View& weights,
                            const View& result, const S* x, const S* y, S* to) {
  using V = Vectors<S, L>;
  const Size step = job.dimension[2].place_step;
  typename V::Vector sum[Count][Taps] = {};
  for (Size m = 0; m < job.values.inners; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Count; ++v) {
      const typename V::Vector by = V::load(y + v * L);
#pragma GCC unroll 8
      for (int t = 0; t < Taps; ++t) sum[v][t] += V::load(x + v * L + t * step) * by;
    }
    x += values.inner;
    y += weights.inner;
  }
#pragma GCC unroll 2
  for (int v = 0; v < Count; ++v)
#pragma GCC unroll 8
    for (int t = 0; t < Taps; ++t) V::store(to + v * L + t * result.outer, sum[v][t]);
}

template <class S, int L>
void kernel_gradient_positions(const Job& job, const Box& box, const View& values,
                               const View& weights, const View& result) {
  using V = Vectors<S, L>;
  const Dimension* d = job.dimension;
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j)
      for (Size g = 0; g < job.values.outers; ++g)
        each_vector<L>(box.low[2], box.high[2], [&](auto count, Size k) {
          constexpr int Count = decltype(count)::value;
          const Reach r0 = d[0].reach[i], r1 = d[1].reach[j];
          const S* const y = at<S>(weights, i, j, k) + g * weights.outer;
          S* const to = at<S>(result, i, j, k) + g * result.inner;
          if (r0.count * r1.count < d[0].taps * d[1].taps)
            for (Size t = 0; t < d[0].taps * d[1].taps * d[2].taps; ++t)
              for (int v = 0; v < Count; ++v)
                V::store(to + v * L + t * result.outer, typename V::Vector{});
          for (Size a = 0; a < r0.count; ++a)
            for (Size b = 0; b < r1.count; ++b) {
              const Size tap = ((r0.tap + a) * d[1].taps + r1.tap + b) * d[2].taps;
              const S* const x = at<S>(values, r0.place + a * d[0].place_step,
                                       r1.place + b * d[1].place_step, k + job.first_place) +
                                 g * values.outer;
              few_pieces<8 / Count>(d[2].taps, [&](auto n, Size c) {
                product_vectors<S, L, Count, decltype(n)::value>(
                    job, values, weights, result, x + c * d[2].place_step, y,
                    to + (tap + c) * result.outer);
              });
            }
        });
}

// --- Kernels that are generated ---------------------------------------------------------------------

#include "product.h"

// --- What the machine can do ------------------------------------------------------------------------

// Twelve independent chains of multiply-adds: enough for every multiplier, few enough for the
// registers.
float multiply_add(Size times) {
  constexpr int L = INVOLUTION_BYTES / 4, CHAINS = 12;
  typename Vectors<float, L>::Vector sum[CHAINS] = {}, x = {}, y = {};
  for (int l = 0; l < L; ++l) x[l] = 0.5f, y[l] = 0.25f;
  for (int c = 0; c < CHAINS; ++c) sum[c] = sum[c] + static_cast<float>(c);
  for (Size n = 0; n < times; ++n) {
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) sum[c] = sum[c] * x + y;
  }
  float total = 0;
  for (int c = 0; c < CHAINS; ++c)
    for (int l = 0; l < L; ++l) total += sum[c][l];
  return total;
}

// --- Taps that meet nothing ------------------------------------------------------------------------
//
// The input is 0 there, and its product with what is not finite is NaN: with a kernel's number in the
// output, with the output's gradient in the kernel's. The loops above leave these taps out, but for
// those in a row that is copied with zeros around it. Where all numbers are finite they add nothing:
// so that is looked for, and what there is else is added here.

// Whether numbers that follow each other are all finite.
template <class S>
inline bool finite(const S* from, Size count) {
  constexpr int L = INVOLUTION_BYTES / sizeof(S);
  using V = Vectors<S, L>;
  S part[L] = {};
  if (count < L) {
    for (Size n = 0; n < count; ++n) part[n] = from[n] * S(0);
  } else {
    typename V::Vector sum[2] = {};
    Size n = 0;
    for (; n + 2 * L <= count; n += 2 * L)
      for (int v = 0; v < 2; ++v) sum[v] += V::load(from + n + v * L) * S(0);
    if (n + L <= count) sum[0] += V::load(from + n) * S(0);
    // The last vector reaches back over the one before it.
    sum[1] += V::load(from + count - L) * S(0);
    V::store(part, sum[0] + sum[1]);
  }
  for (int half = L / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0] == 0;
}

// Calls visit(first tap, count) for runs of a window's taps, given those that meet something.
template <class Visit>
inline void each_outside(const Dimension* d, const Reach& r0, const Reach& r1, const Reach& r2,
                         Visit visit) {
  const auto meets = [](const Reach& r, Size tap) { return tap >= r.tap && tap < r.tap + r.count; };
  for (Size a = 0; a < d[0].taps; ++a)
    for (Size b = 0; b < d[1].taps; ++b) {
      const Size row = (a * d[1].taps + b) * d[2].taps, end = r2.tap + r2.count;
      if (!meets(r0, a) || !meets(r1, b)) {
        visit(row, d[2].taps);
      } else {
        if (r2.tap > 0) visit(row, r2.tap);
        if (end < d[2].taps) visit(row + end, d[2].taps - end);
      }
    }
}

constexpr Size FEW_NUMBERS = 512;

// One position's, across members or groups.
template <class S>
inline void add_outside(const Job& job, const Reach& r0, const Reach& r1, const Reach& r2,
                        const S* weights, S* result) {
  const Dimension* d = job.dimension;
  const bool inside = job.across == Across::groups;
  const Tensor &w = job.weights, &to = job.result;
  if (job.member == Member::output) {
    // Of few numbers all are looked at sooner than those of each run.
    const Size numbers = d[0].taps * d[1].taps * d[2].taps * w.padded;
    bool all = numbers <= FEW_NUMBERS && finite(weights, numbers);
    if (!all) {
      all = true;
      each_outside(d, r0, r1, r2, [&](Size tap, Size count) {
        all = all && finite(weights + tap * w.padded, count * w.padded);
      });
    }
    if (all) return;
    each_outside(d, r0, r1, r2, [&](Size tap, Size count) {
      for (Size t = tap; t < tap + count; ++t)
        for (Size g = 0; g < w.inners; ++g) {
          const S product = weights[t * w.padded + g] * S(0);
          for (Size m = 0; m < (inside ? to.outers : to.inners); ++m)
            result[inside ? m * to.padded + g : g * to.padded + m] += product;
        }
    });
  } else if (!finite(weights, w.outers * w.padded)) {
    for (Size g = 0; g < to.inners; ++g) {
      S sum = 0;
      for (Size m = 0; m < (inside ? w.outers : w.inners); ++m)
        sum += weights[inside ? m * w.padded + g : g * w.padded + m] * S(0);
      each_outside(d, r0, r1, r2, [&](Size tap, Size count) {
        for (Size t = tap; t < tap + count; ++t) result[t * to.padded + g] += sum;
      });
    }
  }
}

// A row's, across its positions: `count` of them.
template <class S>
inline void add_outside_row(const Job& job, const Reach& r0, const Reach& r1, Size count,
                            const S* weights, const View& w, S* result, const View& to) {
  const auto add = [&](const S* factors, S* sums) {
    for (Size k = 0; k < count; ++k) sums[k] += factors[k] * S(0);
  };
  const Size taps = job.dimension[2].taps, groups = job.values.outers, members = job.values.inners;
  const auto each_tap = [&](auto visit) {
    each_outside(job.dimension, r0, r1, {taps, 0, 0}, [&](Size tap, Size count) {
      for (Size t = tap; t < tap + count; ++t) visit(t);
    });
  };
  for (Size g = 0; g < groups; ++g)
    if (job.member == Member::output)
      each_tap([&](Size t) {
        const S* const factors = weights + t * w.outer + g * w.inner;
        if (finite(factors, count)) return;
        for (Size m = 0; m < members; ++m) add(factors, result + g * to.outer + m * to.inner);
      });
    else
      for (Size m = 0; m < members; ++m) {
        const S* const factors = weights + g * w.outer + m * w.inner;
        if (finite(factors, count)) continue;
        each_tap([&](Size t) { add(factors, result + t * to.outer + g * to.inner); });
      }
}

template <class S>
void add_outside(const Job& job, const Box& box, const View& weights, const View& result) {
  const Dimension* d = job.dimension;
  for (Size i = box.low[0]; i < box.high[0]; ++i)
    for (Size j = box.low[1]; j < box.high[1]; ++j) {
      const Reach &r0 = d[0].reach[i], &r1 = d[1].reach[j];
      const bool rows_meet = r0.count * r1.count == d[0].taps * d[1].taps;
      if (job.across == Across::positions) {
        if (!rows_meet)
          add_outside_row(job, r0, r1, box.high[2] - box.low[2], at<S>(weights, i, j, box.low[2]),
                          weights, at<S>(result, i, j, box.low[2]), result);
        continue;
      }
      for (Size k = box.low[2]; k < box.high[2]; ++k)
        if (!rows_meet || d[2].reach[k].count < d[2].taps)
          add_outside(job, r0, r1, d[2].reach[k], at<S>(weights, i, j, k), at<S>(result, i, j, k));
    }
}

// --- Choice of the loops for one box --------------------------------------------------------------

template <class S, int L>
void compute_with(const Job& job, const Box& box, const View& values, const View& weights,
                  const View& result, Size* offsets) {
  const bool kernel = job.member == Member::kernel;
  if (job.across == Across::positions) {
    if (kernel) return kernel_gradient_positions<S, L>(job, box, values, weights, result);
    return gather_positions<S, L>(job, box, values, weights, result);
  }
  if constexpr (L > 1) {
    if (kernel) return kernel_gradient<S, L>(job, box, values, weights, result, offsets);
    return gather<S, L>(job, box, values, weights, result);
  }
}

template <class S, int L>
void compute_as(const Job& job, const Box& box, const View& values, const View& weights,
                const View& result, Size* offsets) {
  // Across positions a row may be shorter than any vector.
  const Size row = box.high[2] - box.low[2];
  if constexpr (L > 1)
    if (job.across == Across::positions ? row < L : job.lanes < L)
      return compute_as<S, L / 2>(job, box, values, weights, result, offsets);
  compute_with<S, L>(job, box, values, weights, result, offsets);
}

void compute(const Job& job, const Box& box, const View& values, const View& weights,
             const View& result, Size* offsets) {
  const bool outside = job.member != Member::input;  // windows hold taps that meet nothing
  if (job.type == Type::float64) {
    compute_as<double, INVOLUTION_BYTES / 8>(job, box, values, weights, result, offsets);
    if (outside) add_outside<double>(job, box, weights, result);
  } else {
    compute_as<float, INVOLUTION_BYTES / 4>(job, box, values, weights, result, offsets);
    if (outside) add_outside<float>(job, box, weights, result);
  }
}

}  // namespace

#define INVOLUTION_JOIN(a, b) a##b
#define INVOLUTION_NAME(level) INVOLUTION_JOIN(level, _level)
#define INVOLUTION_TEXT(level) #level
#define INVOLUTION_STRING(level) INVOLUTION_TEXT(level)

extern const Level INVOLUTION_NAME(INVOLUTION_LEVEL) = {
    INVOLUTION_STRING(INVOLUTION_LEVEL), INVOLUTION_BYTES, pack, unpack, compute, multiply,
#if INVOLUTION_BYTES == 64
    multiply_pairs,
#else
    nullptr,
#endif
    multiply_add};

}  // namespace involution
