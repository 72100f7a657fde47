// What the kernels are given: one involution, or one of its gradients, prepared for loops.
//
// Ranks 1 to 3 are all of rank 3 here: missing spatial dimensions, the first ones, have size 1.
#pragma once

#include <cstdint>

namespace involution {

using Size = std::int64_t;

enum class Type : int { float64, float32, bfloat16, float16 };

// How one tensor lies in memory. Strides count elements. The channels of x and y, and the taps and
// groups of a kernel, are two axes: the inner one is what vectors run along.
struct Tensor {
  void* data;
  Size batch;         // strides
  Size position[3];
  Size outer, inner;
  Size outers, inners;  // counts
  Size padded;          // inners, rounded up to whole vectors where vectors run across them
  bool direct;          // the kernels can read and write it where it lies
};

// Which taps of a window meet which positions, in one dimension, seen from one position of the
// result: `count` taps from `tap`, at `place` of the other tensor. Both advance by fixed steps.
struct Reach {
  Size count, tap, place;
};

// What the lanes of a vector are.
enum class Across { members, groups, positions };

struct Dimension {
  const Reach* reach;  // one for each position of the result
  Size results;        // number of these
  Size places;         // number of positions of the other tensor
  Size taps;           // size of the window
  Size tap_step, place_step;
};

enum class Member : int { output, input, kernel };  // as in ops/gradients.py

// output, input:  result[p] = sum over taps of weights[tap] * values[place], the weights lying at p
//                 for `output` and at the place for `input`.
// kernel:         result[p, tap] = sum over a group's channels of values[place] * weights[p], the
//                 weights being the output's gradient.
struct Job {
  Member member;
  Type type;
  Across across;
  Size first_place;  // across positions: the place of the first tap of a row, from the result's
  int lanes;  // of a vector
  Size batch;
  Dimension dimension[3];
  Tensor values, weights, result;
};

// A tensor as the kernels see it: one sample, or a box of it, in the type that sums are made in.
// Across members and groups a position's channels lie together; across positions a row's positions.
struct View {
  void* data;
  Size position[3];
  Size origin[3];      // the position that `data` points to
  Size outer, inner;   // strides of the channels, as in a tensor
};

struct Box {
  Size low[3], high[3];
};

// c[row, column] = start[column] + sum over terms of a[row, term] * b[term, column], all in the type
// that sums are made in. Columns are whole vectors of the level, and follow each other in b and c.
struct Product {
  Size rows, columns, terms;
  const void* a;
  Size a_row, a_term;  // strides
  const void* b;
  Size b_term;
  void* c;
  Size c_row;
  const void* start;  // null: zeros
  bool add;           // to what c holds, in place of start
};

// The code for one level of instructions.
struct Level {
  const char* name;
  int bytes;  // of a vector
  // Copies a box of a sample to where the view points, converting, with zeros where the box reaches
  // beyond the tensor's `size` in the last dimension; and back.
  void (*pack)(const Tensor&, Type, Size sample, const Box&, Size size, const View&);
  void (*unpack)(const Tensor&, Type, Size sample, const Box&, const View&);
  // The results of one box. `offsets` has room for a window's taps.
  void (*compute)(const Job&, const Box&, const View& values, const View& weights,
                  const View& result, Size* offsets);
  void (*multiply)(Type, const Product&);
  // The same of bfloat16, whose terms come in pairs, two in one number of a and b, and which has a
  // start; null where the level has no such products. Not every processor of a level has them.
  // Numbers below the smallest normal one count as zero.
  void (*multiply_pairs)(const Product&);
  // Multiply-adds of vectors of float32 in registers, 12 each time: for measuring what is possible.
  float (*multiply_add)(Size times);
};

extern const Level plain_level;
#ifdef INVOLUTION_X86
extern const Level avx2_level;
extern const Level avx512_level;
#endif

}  // namespace involution
