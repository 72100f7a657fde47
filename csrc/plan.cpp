#include "involution.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef INVOLUTION_X86
#include <cpuid.h>
#endif
#ifdef _WIN32
#include <malloc.h>
#endif

#include "job.h"
#include "pool.h"

namespace involution {
namespace {

// --- Levels of instructions ----------------------------------------------------------------------

#ifdef INVOLUTION_X86
struct Features {
  bool avx2 = false, avx512 = false, bf16 = false;
};

// Asked of the processor itself: the library that Zig links has no to all that
// __builtin_cpu_supports asks.
Features find_features() {
  Features found;
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return found;  // OSXSAVE
  const bool fma = c & (1u << 12);
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the registers that the system keeps
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  found.avx2 = fma && (low & 0x6) == 0x6 && (b & (1u << 5));
  found.avx512 = found.avx2 && (low & 0xe6) == 0xe6 && (b & avx512) == avx512;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    found.bf16 = found.avx512 && (a & (1u << 5));
  return found;
}

const Features& features() {
  static const Features found = find_features();
  return found;
}
#endif

std::vector<const Level*> find_levels() {
  std::vector<const Level*> levels = {&plain_level};
#ifdef INVOLUTION_X86
  if (features().avx2) levels.push_back(&avx2_level);
  if (features().avx512) levels.push_back(&avx512_level);
#endif
  return levels;
}

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> found = find_levels();
  return found;
}

std::atomic<int> chosen_level{-1};

const Level& level() {
  const int chosen = chosen_level.load(std::memory_order_relaxed);
  return chosen < 0 ? *levels().back() : *levels()[chosen];
}

// Whether this processor has the level's products of bfloat16.
bool has_pairs(const Level& level) {
  if (level.multiply_pairs == nullptr) return false;
#ifdef INVOLUTION_X86
  return features().bf16;
#else
  return false;
#endif
}

// --- From a call to a job -------------------------------------------------------------------------

// A call's numbers, by name.
struct Call {
  explicit Call(const Size* n)
      : member(static_cast<Member>(n[0])),
        type(static_cast<Type>(n[1])),
        channels_first(n[2] != 0),
        interleaved(n[3] != 0),
        channels(n[4]),
        groups(n[5]),
        input(n + 6),
        output(n + 9),
        kernel_size(n + 12),
        strides(n + 15),
        dilation_rate(n + 18),
        pads(n + 21) {}

  Member member;
  Type type;
  bool channels_first, interleaved;
  Size channels, groups;
  const Size *input, *output, *kernel_size, *strides, *dilation_rate, *pads;
};

Size gcd(Size a, Size b) { return b == 0 ? a : gcd(b, a % b); }
Size round_up(Size n, Size unit) { return (n + unit - 1) / unit * unit; }
// Rounding down, for negative n too.
Size divide(Size n, Size by) { return n / by - (n % by < 0); }

// For every output position: the taps that meet the input.
Reach from_output(const Call& c, int i, Size p) {
  const Size first = p * c.strides[i] - c.pads[i], d = c.dilation_rate[i];
  const Size low = std::max<Size>(0, divide(-first + d - 1, d));
  const Size high = std::min(c.kernel_size[i] - 1, divide(c.input[i] - 1 - first, d));
  if (low > high) return {0, 0, 0};
  return {high - low + 1, low, first + low * d};
}

// For every input position: the taps by which outputs read it.
Reach from_input(const Call& c, int i, Size q, Size tap_step) {
  const Size at = q + c.pads[i], s = c.strides[i], d = c.dilation_rate[i];
  const Size high = std::min(c.kernel_size[i] - 1, at / d);
  Size low = std::max<Size>(0, divide(at - (c.output[i] - 1) * s + d - 1, d));
  // Every tap_step-th tap lies a whole number of strides away.
  for (Size tried = 0; tried < tap_step && low <= high && (at - low * d) % s != 0; ++tried) ++low;
  if (low > high || (at - low * d) % s != 0) return {0, 0, 0};
  return {(high - low) / tap_step + 1, low, (at - low * d) / s};
}

Size volume(const Size* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

const Size* result_sizes(const Call& c) { return c.member == Member::input ? c.input : c.output; }

// A tensor of `channels` = outers x inners (for kernels: taps and groups) at each position.
Tensor tensor(const void* data, const Size* sizes, Size channels, bool first) {
  Tensor t = {};
  t.data = const_cast<void*>(data);
  t.batch = volume(sizes) * channels;
  const Size unit = first ? 1 : channels;
  t.position[2] = unit;
  t.position[1] = unit * sizes[2];
  t.position[0] = unit * sizes[2] * sizes[1];
  t.inner = first ? volume(sizes) : 1;  // from one channel to the next; `split` makes it two axes
  return t;
}

void split(Tensor& t, Size outers, Size inners, bool inner_is_fast) {
  const Size step = t.inner;
  t.outers = outers;
  t.inners = t.padded = inners;
  t.outer = inner_is_fast ? step * inners : step;
  t.inner = inner_is_fast ? step : step * outers;
}

// Vectors run across what there is enough of, and what lies together in memory if possible.
Across choose_across(const Call& c, bool generated) {
  const Size members = c.channels / c.groups, groups = c.groups;
  // Rows are copied with zeros around them; these must not outgrow the row.
  const bool plain_rows = c.strides[2] == 1 && std::min(c.input[2], c.output[2]) >= 4 &&
                          (c.kernel_size[2] - 1) * c.dilation_rate[2] <= c.input[2] + 64;
  // A position's kernel is generated as one row.
  if (generated) return members < 4 && groups > members ? Across::groups : Across::members;
  if (c.channels_first && plain_rows) return Across::positions;
  if (c.channels_first) return members < 4 && groups > members ? Across::groups : Across::members;
  if (c.interleaved && groups % 4 == 0) return Across::groups;
  if ((!c.interleaved || groups == 1) && members % 4 == 0) return Across::members;
  if (std::max(members, groups) < 4 && plain_rows) return Across::positions;
  return members < 4 && groups > members ? Across::groups : Across::members;
}

Size choose_lanes(Size count, Size most) {
  Size lanes = most;
  while (lanes > 4 && count % lanes != 0 && (count % (lanes / 2) == 0 || count <= lanes / 2))
    lanes /= 2;
  return lanes;
}

// What kernels are generated from. The copies are in the type that sums are made in, of rows that
// are whole vectors.
struct Generator {
  Tensor hidden;
  Size count;    // of hidden channels
  Size columns;  // numbers of a kernel, as the kernels of this job lie
  Size row;      // these, and what makes them whole vectors
  Size padded;   // hidden channels, likewise
  Size parts;    // into which the groups are divided: pieces of their own
  Size part;     // bytes from one part's copies to the next's
  bool pairs;    // of bfloat16: two hidden channels in one number, of hidden and weight both
  const char* weight;  // (count, row)
  const char* bias;    // (row)
  const char* turned;  // (columns, padded): the weight's transpose, for the gradients
};

struct Prepared {
  Job job;
  std::array<std::vector<Reach>, 3> reach;
  std::size_t bytes;  // of a number in a sum
  Size taps;
  const Generator* generator = nullptr;  // null: kernels are given
};

// Where the three tensors of a member are: x, the kernel and y, or their gradients.
struct Places {
  const void *x, *kernel, *y;
};

Prepared prepare(const Call& c, Size batch, const Level& level, const Places& at, bool generated) {
  Prepared p;
  Job& job = p.job;
  job.member = c.member;
  job.type = c.type;
  job.batch = batch;
  p.bytes = job.type == Type::float64 ? 8 : 4;
  p.taps = volume(c.kernel_size);

  const bool first = c.channels_first, backwards = job.member == Member::input;
  const Size members = c.channels / c.groups;
  job.across = choose_across(c, generated);
  // The last tap of a row comes first where places go backwards.
  job.first_place = backwards ? c.pads[2] : -c.pads[2];

  Tensor x = tensor(nullptr, c.input, c.channels, first);
  Tensor y = tensor(nullptr, c.output, c.channels, first);
  Tensor kernel = tensor(nullptr, c.output, p.taps * c.groups, first);
  const bool groups_inside = job.across == Across::groups;
  const Size outers = groups_inside ? members : c.groups;
  const Size inners = groups_inside ? c.groups : members;
  const bool inner_is_fast = groups_inside == static_cast<bool>(c.interleaved);
  split(x, outers, inners, inner_is_fast);
  split(y, outers, inners, inner_is_fast);
  split(kernel, p.taps, c.groups, true);

  const int most = level.bytes / static_cast<int>(p.bytes);
  job.lanes = static_cast<int>(choose_lanes(inners, most));
  if (job.across != Across::positions) x.padded = y.padded = round_up(inners, job.lanes);
  if (groups_inside) kernel.padded = x.padded;
  const bool same_type = job.type == Type::float64 || job.type == Type::float32;
  for (Tensor* t : {&x, &y, &kernel})
    // An empty tensor has no place in memory to count from; its copy has.
    t->direct = same_type && t->batch > 0 && (job.across == Across::positions
                                  ? t->position[2] == 1
                                  : t->inner == 1 && t->padded == t->inners &&
                                        (t->outer == t->padded || t->outers == 1));

  if (job.across == Across::positions) {
    // What is read beside a result's own position needs zeros around it.
    if (backwards)
      y.direct = kernel.direct = false;
    else
      x.direct = false;
  }

  const auto place = [](Tensor t, const void* data) {
    t.data = const_cast<void*>(data);
    return t;
  };
  switch (job.member) {
    case Member::output:
      job.values = place(x, at.x), job.weights = place(kernel, at.kernel), job.result = place(y, at.y);
      break;
    case Member::input:
      job.values = place(y, at.y), job.weights = place(kernel, at.kernel), job.result = place(x, at.x);
      break;
    case Member::kernel:
      job.values = place(x, at.x), job.weights = place(y, at.y), job.result = place(kernel, at.kernel);
      break;
  }

  for (int i = 0; i < 3; ++i) {
    const Size common = gcd(c.strides[i], c.dilation_rate[i]);
    Dimension& d = job.dimension[i];
    d.taps = c.kernel_size[i];
    d.results = backwards ? c.input[i] : c.output[i];
    d.tap_step = backwards ? c.strides[i] / common : 1;
    d.place_step = backwards ? -(c.dilation_rate[i] / common) : c.dilation_rate[i];
    d.places = backwards ? c.output[i] : c.input[i];
    p.reach[i].resize(d.results);
    for (Size n = 0; n < d.results; ++n)
      p.reach[i][n] = backwards ? from_input(c, i, n, d.tap_step) : from_output(c, i, n);
    d.reach = p.reach[i].data();
    // Steps that lead out of the tensor are never taken, and may be too large to multiply; but for
    // those into the zeros of copied rows, which choose_across bounds.
    if (i == 2 && job.across == Across::positions) continue;
    d.tap_step = std::min(d.tap_step, d.taps);
    const Size farthest = std::max<Size>(d.places, 1);  // a step is never 0
    d.place_step = std::clamp(d.place_step, -farthest, farthest);
  }
  return p;
}

// --- Boxes: the pieces that threads share ----------------------------------------------------------

// Numbers of sums that a piece should have at least, so that handing it out costs little.
constexpr Size SMALLEST_PIECE = 1 << 16;
// Pieces for each thread, so that none waits long for the last.
constexpr Size PIECES = 4;
// Bytes of copies for a piece: they should fit into a core's second cache. The larger a piece, the
// fewer of its neighbours' rows are copied twice.
constexpr Size COPIES = 1 << 20;
// Pieces of a sample at most where each has a gradient of the generator's weight, which must be added
// up: enough for some threads, few enough that these gradients take little memory.
constexpr Size SUMMED_PIECES = 16;

// The places that a box of results reads.
Box places(const Job& job, const Box& box) {
  Box around = {};
  for (int i = 0; i < 3; ++i) {
    const Dimension& d = job.dimension[i];
    bool any = false;
    for (Size n = box.low[i]; n < box.high[i]; ++n) {
      const Reach& r = d.reach[n];
      if (r.count == 0) continue;
      const Size last = r.place + (r.count - 1) * d.place_step;
      const Size low = std::min(r.place, last), high = std::max(r.place, last) + 1;
      around.low[i] = any ? std::min(around.low[i], low) : low;
      around.high[i] = any ? std::max(around.high[i], high) : high;
      any = true;
    }
  }
  if (job.across == Across::positions) {
    const Size reach = (job.dimension[2].taps - 1) * job.dimension[2].place_step;
    around.low[2] = box.low[2] + job.first_place + std::min<Size>(0, reach);
    around.high[2] = box.high[2] + job.first_place + std::max<Size>(0, reach);
  }
  return around;
}

Size positions(const Box& box) {
  Size n = 1;
  for (int i = 0; i < 3; ++i) n *= box.high[i] - box.low[i];
  return n;
}

Size packed(const Tensor& t, const Box& box) {
  return t.direct ? 0 : positions(box) * t.outers * t.padded;
}

// The positions whose kernels a box of results needs, or makes.
const Box& kernels_of(const Job& job, const Box& box, const Box& around) {
  return job.member == Member::input ? around : box;
}

// Numbers in the copies that a box takes.
Size packed(const Prepared& p, const Box& box) {
  const Job& job = p.job;
  const Box around = places(job, box);
  const Box& kernels = kernels_of(job, box, around);
  const Generator* const g = p.generator;
  const bool gradient = job.member == Member::kernel;
  Size count = packed(job.values, around);
  count += gradient ? packed(job.weights, box) : packed(job.result, box);
  if (g == nullptr) return count + packed(gradient ? job.result : job.weights, kernels);
  count += packed(g->hidden, kernels) + positions(kernels) * g->row;
  return count + (gradient ? positions(kernels) * g->padded : 0);
}

struct Pieces {
  const Prepared* prepared;
  const Level* level;
  Size step[3], count[3];
  Size boxes;   // in all
  Size stride;  // boxes that a piece does, one after the other
  Size number() const { return (boxes + stride - 1) / stride; }  // of pieces of a sample
  // Of gradients of a generator: each piece's of the weight and bias, (count + 1, row), and where
  // the hidden channels' go.
  char* partial = nullptr;
  Tensor dhidden = {};
  std::atomic<bool> failed{false};
};

Box box_of(const Pieces& pieces, Size index) {
  Box box;
  for (int i = 2; i >= 0; --i) {
    const Size n = index % pieces.count[i];
    index /= pieces.count[i];
    box.low[i] = n * pieces.step[i];
    box.high[i] = std::min(box.low[i] + pieces.step[i], pieces.prepared->job.dimension[i].results);
  }
  return box;
}

Size parts(const Prepared& p) { return p.generator == nullptr ? 1 : p.generator->parts; }

void divide_up(Pieces& pieces, int threads) {
  const Prepared& p = *pieces.prepared;
  const Job& job = p.job;
  for (int i = 0; i < 3; ++i) pieces.step[i] = job.dimension[i].results;
  // Where pieces add up what is one sum, threads and other samples must not change its order.
  const bool added_up = p.generator != nullptr && job.member == Member::kernel;
  const Size wanted = threads > 1 && !added_up ? threads * PIECES : 1;
  const Size work = p.taps * job.values.outers * job.values.inners;
  for (;;) {
    Box box = {};
    Size number = job.batch * parts(p);
    for (int i = 0; i < 3; ++i) {
      box.high[i] = pieces.step[i];
      number *= (job.dimension[i].results + pieces.step[i] - 1) / pieces.step[i];
    }
    const bool few = number < wanted && positions(box) * work > 2 * SMALLEST_PIECE;
    const bool large = packed(p, box) * static_cast<Size>(p.bytes) > COPIES;
    int i = pieces.step[0] > 1 ? 0 : pieces.step[1] > 1 ? 1 : 2;
    // The kernels around a piece are generated more than once: it should have a short border.
    if (p.generator != nullptr && job.member == Member::input)
      i = static_cast<int>(std::max_element(pieces.step, pieces.step + 3) - pieces.step);
    if (!(few || large) || pieces.step[i] == 1) break;
    pieces.step[i] = (pieces.step[i] + 1) / 2;
  }
  for (int i = 0; i < 3; ++i)
    pieces.count[i] = (job.dimension[i].results + pieces.step[i] - 1) / pieces.step[i];
  pieces.boxes = volume(pieces.count);
  pieces.stride = added_up ? (pieces.boxes + SUMMED_PIECES - 1) / SUMMED_PIECES : 1;
}

// Memory on a vector's boundary; null where there is none. Not std::aligned_alloc, which macOS has
// from 10.15 on.
struct Free {
  void operator()(char* memory) const {
#ifdef _WIN32
    _aligned_free(memory);
#else
    std::free(memory);
#endif
  }
};
using Memory = std::unique_ptr<char, Free>;

Memory take_memory(Size bytes) {
  const auto size = static_cast<std::size_t>(std::max<Size>(bytes, 1));
#ifdef _WIN32
  void* const memory = _aligned_malloc(size, 64);
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size) != 0) memory = nullptr;
#endif
  return Memory(static_cast<char*>(memory));
}

// Memory of a thread's own that lasts from piece to piece.
class Scratch {
 public:
  char* take(Size bytes) {
    if (bytes > size_) {
      memory_.reset();
      memory_ = take_memory(bytes);
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_.get();
  }

 private:
  Memory memory_;
  Size size_ = 0;
};

View in_place(const Tensor& t, Size sample, std::size_t bytes) {
  View view = {};
  view.data = static_cast<char*>(t.data) + sample * t.batch * static_cast<Size>(bytes);
  std::copy(t.position, t.position + 3, view.position);
  view.outer = t.outer;
  view.inner = t.inner;
  return view;
}

View copied(const Job& job, const Tensor& t, const Box& box, char*& memory, std::size_t bytes) {
  View view = {};
  view.data = memory;
  const Size channels = t.outers * t.padded;
  Size size[3];
  for (int i = 0; i < 3; ++i) size[i] = box.high[i] - box.low[i];
  view.position[2] = job.across == Across::positions ? 1 : channels;
  view.inner = job.across == Across::positions ? size[2] : 1;
  view.outer = view.inner * t.padded;
  view.position[1] = channels * size[2];
  view.position[0] = channels * size[2] * size[1];
  std::copy(box.low, box.low + 3, view.origin);
  memory += round_up(packed(t, box) * bytes, 64);
  return view;
}

// One piece: which it is, and its copies.
class Piece {
 public:
  Piece(Pieces& pieces, Size index)
      : pieces_(pieces),
        prepared(*pieces.prepared),
        job(prepared.job),
        sample(index / pieces.boxes / parts(prepared)),
        part(index / pieces.boxes % parts(prepared)),
        box(box_of(pieces, index % pieces.boxes)),
        around(places(job, box)),
        kernels(kernels_of(job, box, around)) {}

  // False where there is no memory.
  bool take() {
    thread_local Scratch scratch;
    const Size bytes = static_cast<Size>(prepared.bytes);
    const Size offset_bytes =
        job.member == Member::kernel ? round_up(prepared.taps * Size(sizeof(Size)), 64) : 0;
    memory_ = scratch.take(packed(prepared, box) * bytes + offset_bytes + 6 * 64);
    if (memory_ == nullptr) {
      pieces_.failed.store(true);
      return false;
    }
    offsets = reinterpret_cast<Size*>(memory_);
    memory_ += offset_bytes;
    return true;
  }

  View room(const Tensor& t, const Box& around) {
    return copied(job, t, around, memory_, prepared.bytes);
  }

  // Room for rows of numbers, one for each position of the box.
  View rows(Size numbers, const Box& positions) {
    Tensor t = {};
    t.outers = 1;
    t.padded = numbers;
    return room(t, positions);
  }

  // A tensor's groups of this part.
  Tensor own(Tensor t) const {
    const Size bytes = job.type == Type::float64 ? 8 : job.type == Type::float32 ? 4 : 2;
    t.data = static_cast<char*>(t.data) + part * t.outers * t.outer * bytes;
    return t;
  }

  View read(const Tensor& t, const Box& around, Size size) {
    if (t.direct) return in_place(t, sample, prepared.bytes);
    const View view = room(t, around);
    pieces_.level->pack(t, job.type, sample, around, size, view);
    return view;
  }

  View to_write(const Tensor& t) {
    return t.direct ? in_place(t, sample, prepared.bytes) : room(t, box);
  }

  void compute(const View& values, const View& weights, const View& result) {
    pieces_.level->compute(job, box, values, weights, result, offsets);
  }

  void write(const Tensor& t, const View& view) {
    if (!t.direct) pieces_.level->unpack(t, job.type, sample, box, view);
  }

 private:
  Pieces& pieces_;
  char* memory_ = nullptr;

 public:
  const Prepared& prepared;
  const Job& job;
  const Size sample, part;
  const Box box, around;
  const Box& kernels;
  Size* offsets = nullptr;
};

void do_piece(void* context, Size index) {
  Pieces& pieces = *static_cast<Pieces*>(context);
  Piece piece(pieces, index);
  if (!piece.take()) return;
  const Job& job = piece.job;
  const Dimension& last = job.dimension[2];
  const View values = piece.read(job.values, piece.around, last.places);
  const View weights = piece.read(job.weights, piece.kernels,
                                  job.member == Member::input ? last.places : last.results);
  const View result = piece.to_write(job.result);
  piece.compute(values, weights, result);
  piece.write(job.result, result);
}

// --- Kernels that are generated --------------------------------------------------------------------

// Calls visit(positions, in a, in b) for positions of the box that follow each other in both views.
template <class Visit>
void each_run(const Box& box, const View& a, const View& b, std::size_t bytes, Visit visit) {
  Size size[3];
  for (int i = 0; i < 3; ++i) size[i] = box.high[i] - box.low[i];
  const auto joined = [&](int i) {
    return a.position[i] == size[i + 1] * a.position[i + 1] &&
           b.position[i] == size[i + 1] * b.position[i + 1];
  };
  const int levels = !joined(1) ? 2 : !joined(0) ? 1 : 0;
  const auto at = [&](const View& view, Size i, Size j) {
    return static_cast<char*>(view.data) +
           static_cast<Size>(bytes) * ((i - view.origin[0]) * view.position[0] +
                                       (j - view.origin[1]) * view.position[1] +
                                       (box.low[2] - view.origin[2]) * view.position[2]);
  };
  const Size count = size[2] * (levels < 2 ? size[1] : 1) * (levels < 1 ? size[0] : 1);
  for (Size i = box.low[0]; i < (levels < 1 ? box.low[0] + 1 : box.high[0]); ++i)
    for (Size j = box.low[1]; j < (levels < 2 ? box.low[1] + 1 : box.high[1]); ++j)
      visit(count, at(a, i, j), at(b, i, j));
}

void generate(const Piece& piece, const Level& level, const View& hidden, const View& kernels) {
  const Generator& g = *piece.prepared.generator;
  Product product = {};
  product.columns = product.b_term = product.c_row = g.row;
  product.terms = g.pairs ? g.count / 2 : g.count;
  product.a_row = hidden.position[2];
  product.a_term = 1;
  product.b = g.weight + piece.part * g.part;
  product.start = g.bias + piece.part * g.part;
  each_run(piece.kernels, hidden, kernels, piece.prepared.bytes,
           [&](Size count, const char* from, char* to) {
             product.rows = count;
             product.a = from;
             product.c = to;
             if (g.pairs)
               level.multiply_pairs(product);
             else
               level.multiply(piece.job.type, product);
           });
}

// From the kernels' gradients those of the hidden channels, and this piece's share of the weight's
// and the bias's.
void take_gradients(const Piece& piece, const Level& level, const View& hidden,
                    const View& gradients, const View& dhidden, char* partial, bool add) {
  const Generator& g = *piece.prepared.generator;
  const Type type = piece.job.type;
  const std::size_t bytes = piece.prepared.bytes;
  const double one = 1;
  const float one_float = 1;

  Product of_hidden = {};
  of_hidden.columns = of_hidden.b_term = of_hidden.c_row = g.padded;
  of_hidden.terms = g.columns;
  of_hidden.a_row = g.row;
  of_hidden.a_term = 1;
  of_hidden.b = g.turned;
  of_hidden.c = dhidden.data;

  Product of_weight = {};
  of_weight.rows = g.count;
  of_weight.columns = of_weight.b_term = of_weight.c_row = g.row;
  of_weight.a_row = 1;
  of_weight.a_term = hidden.position[2];
  of_weight.c = partial;
  of_weight.add = add;

  Product of_bias = of_weight;
  of_bias.rows = 1;
  of_bias.a = type == Type::float64 ? static_cast<const void*>(&one) : &one_float;
  of_bias.a_row = of_bias.a_term = 0;
  of_bias.c = partial + g.count * g.row * static_cast<Size>(bytes);

  each_run(piece.box, hidden, gradients, bytes, [&](Size count, const char* h, char* gradient) {
    of_hidden.rows = count;
    of_hidden.a = gradient;
    level.multiply(type, of_hidden);
    of_hidden.c = static_cast<char*>(of_hidden.c) + count * g.padded * static_cast<Size>(bytes);
    of_weight.terms = of_bias.terms = count;
    of_weight.a = h;
    of_weight.b = of_bias.b = gradient;
    level.multiply(type, of_weight);
    level.multiply(type, of_bias);
    of_weight.add = of_bias.add = true;
  });
}

void do_generated_piece(void* context, Size index) {
  Pieces& pieces = *static_cast<Pieces*>(context);
  Piece piece(pieces, index);
  if (!piece.take()) return;
  const Job& job = piece.job;
  const Generator& g = *piece.prepared.generator;
  const Dimension& last = job.dimension[2];
  const View values = piece.read(piece.own(job.values), piece.around, last.places);
  const View hidden = piece.read(g.hidden, piece.kernels,
                                 job.member == Member::input ? last.places : last.results);
  const View kernels = piece.rows(g.row, piece.kernels);
  const Tensor own = piece.own(job.result);
  const View result = piece.to_write(own);
  generate(piece, *pieces.level, hidden, kernels);
  piece.compute(values, kernels, result);
  piece.write(own, result);
}

void do_gradient_piece(void* context, Size index) {
  Pieces& pieces = *static_cast<Pieces*>(context);
  const Size sample = index / pieces.number(), first = index % pieces.number() * pieces.stride;
  const Prepared& p = *pieces.prepared;
  const Generator& g = *p.generator;
  char* const partial = pieces.partial + index * (g.count + 1) * g.row * static_cast<Size>(p.bytes);
  for (Size n = first; n < std::min(first + pieces.stride, pieces.boxes); ++n) {
    Piece piece(pieces, sample * pieces.boxes + n);
    if (!piece.take()) return;
    const Job& job = piece.job;
    const Dimension& last = job.dimension[2];
    const View values = piece.read(job.values, piece.around, last.places);
    const View hidden = piece.read(g.hidden, piece.box, last.results);
    const View kernels = piece.rows(g.row, piece.box);
    const View weights = piece.read(job.weights, piece.box, last.results);
    const View dhidden = piece.rows(g.padded, piece.box);
    piece.compute(values, weights, kernels);
    take_gradients(piece, *pieces.level, hidden, kernels, dhidden, partial, n > first);
    piece.write(pieces.dhidden, dhidden);
  }
}

// Rows of float32 that are bfloat16, the upper halves: two of them to one.
void pair_up(char* rows, Size count, Size row) {
  const auto at = [&](Size n, Size f) { return rows + (n * row + f) * 4; };
  for (Size n = 0; n < count; n += 2)
    for (Size f = 0; f < row; ++f) {
      std::uint32_t first, second;
      std::memcpy(&first, at(n, f), 4);
      std::memcpy(&second, at(n + 1, f), 4);
      const std::uint32_t both = first >> 16 | (second & 0xffff0000);
      std::memcpy(at(n / 2, f), &both, 4);
    }
}

// Copies of the generator's weight and bias, for which `memory` has room.
void copy_weights(Generator& g, const Prepared& p, const Level& level, Size groups,
                  const void* weight, const void* bias, char* memory) {
  const Size bytes = static_cast<Size>(p.bytes), padded = g.columns / p.taps;
  const Size stored = p.job.type == Type::float64 ? 8 : p.job.type == Type::float32 ? 4 : 2;
  const auto copy = [&](const void* from, Size rows, Size part, char* to) {
    Tensor t = {};
    t.inners = groups / g.parts;
    t.data = static_cast<char*>(const_cast<void*>(from)) + part * t.inners * stored;
    t.position[2] = p.taps * groups;
    t.outer = groups;
    t.inner = 1;
    t.outers = p.taps;
    t.padded = padded;
    View view = {};
    view.data = to;
    view.position[2] = g.row;
    view.outer = padded;
    view.inner = 1;
    std::memset(to, 0, rows * g.row * bytes);
    level.pack(t, p.job.type, 0, {{0, 0, 0}, {1, 1, rows}}, rows, view);
  };
  char* const biases = memory + g.count * g.row * bytes;
  for (Size part = 0; part < g.parts; ++part) {
    copy(weight, g.count, part, memory + part * g.part);
    if (bias != nullptr) copy(bias, 1, part, biases + part * g.part);
  }
  g.weight = memory;
  g.bias = biases;
  if (g.pairs)
    for (Size part = 0; part < g.parts; ++part)
      pair_up(memory + part * g.part, g.count, g.row);
  if (p.job.member != Member::kernel) return;
  char* const turned = biases + g.row * bytes;
  g.turned = turned;
  std::memset(turned, 0, g.columns * g.padded * bytes);
  for (Size n = 0; n < g.count; ++n)
    for (Size f = 0; f < g.columns; ++f)
      std::memcpy(turned + (f * g.padded + n) * bytes, memory + (n * g.row + f) * bytes, bytes);
}

// Divides the groups of an input gradient into more parts: of fewer groups a piece holds the kernels
// at more positions, and relatively fewer of these lie around it.
void take_part(Prepared& p, Generator& g, Size lanes) {
  Job& job = p.job;
  g.parts *= 2;
  job.values.outers /= 2;
  job.result.outers /= 2;
  job.weights.inners = job.weights.padded = job.weights.padded / 2;
  g.columns /= 2;
  g.row = round_up(g.columns, lanes);
}

// Numbers of kernels that are generated in all.
Size generated(const Pieces& pieces) {
  const Prepared& p = *pieces.prepared;
  Size sum = 0;
  for (Size n = 0; n < pieces.boxes; ++n)
    sum += positions(places(p.job, box_of(pieces, n)));
  return sum * p.generator->parts * p.generator->row;
}

// Divides groups as often as that saves work.
void divide_groups(Prepared& p, Generator& g, Pieces& pieces, Size lanes, int threads) {
  divide_up(pieces, threads);
  Size least = generated(pieces);
  while (p.job.across == Across::members && p.job.weights.padded % 2 == 0) {
    const Job job_before = p.job;
    const Generator generator_before = g;
    take_part(p, g, lanes);
    divide_up(pieces, threads);
    const Size now = generated(pieces);
    if (now >= least) {
      p.job = job_before;
      g = generator_before;
      divide_up(pieces, threads);
      return;
    }
    least = now;
  }
}

// What it takes to add up the gradients of the weight and the bias.
struct Sums {
  const Pieces* pieces;
  Size groups;
  void* result;
};

template <class S>
void add_up(const Sums& sums, Size sample) {
  const Prepared& p = *sums.pieces->prepared;
  const Generator& g = *p.generator;
  const Size boxes = sums.pieces->number(), size = (g.count + 1) * g.row;
  const Size padded = g.columns / p.taps;
  const S* const partial = reinterpret_cast<const S*>(sums.pieces->partial) + sample * boxes * size;
  S* to = static_cast<S*>(sums.result) + sample * (g.count + 1) * p.taps * sums.groups;
  for (Size row = 0; row <= g.count; ++row)
    for (Size tap = 0; tap < p.taps; ++tap, to += sums.groups) {
      const S* from = partial + row * g.row + tap * padded;
      std::copy(from, from + sums.groups, to);
      for (Size box = 1; box < boxes; ++box) {
        from += size;
        for (Size n = 0; n < sums.groups; ++n) to[n] += from[n];
      }
    }
}

void add_up_sample(void* context, Size sample) {
  const Sums& sums = *static_cast<const Sums*>(context);
  if (sums.pieces->prepared->job.type == Type::float64)
    add_up<double>(sums, sample);
  else
    add_up<float>(sums, sample);
}

}  // namespace
}  // namespace involution

int involution_run(const std::int64_t* numbers, std::int64_t batch, int threads, const void* a,
                   const void* b, void* result) try {
  using namespace involution;
  const Call call(numbers);
  if (batch == 0 || volume(result_sizes(call)) == 0) return 0;
  const Level& level = involution::level();
  const Places places = call.member == Member::output  ? Places{a, b, result}
                        : call.member == Member::input ? Places{result, a, b}
                                                       : Places{a, result, b};
  const Prepared prepared = prepare(call, batch, level, places, false);
  Pieces pieces;
  pieces.prepared = &prepared;
  pieces.level = &level;
  divide_up(pieces, threads);
  share(batch * pieces.boxes, threads, do_piece, &pieces);
  return pieces.failed.load() ? -1 : 0;
} catch (const std::bad_alloc&) {
  return -1;
}

int involution_run_fused(const std::int64_t* numbers, std::int64_t batch, int threads,
                         const void* a, const void* b, const void* c, const void* d, void* result,
                         void* second) try {
  using namespace involution;
  const Call call(numbers);
  const bool gradient = call.member == Member::kernel, backwards = call.member == Member::input;
  if (batch == 0) return 0;
  if (volume(result_sizes(call)) == 0) {
    // A sum over no positions.
    if (gradient)
      std::memset(second, 0, batch * (numbers[INVOLUTION_NUMBERS] + 1) * volume(call.kernel_size) *
                                 call.groups * (call.type == Type::float64 ? 8 : 4));
    return 0;
  }
  const Level& level = involution::level();
  const Places places = backwards ? Places{result, nullptr, d}
                                  : Places{a, nullptr, gradient ? d : result};
  const void *const hidden = backwards ? a : b, *const weight = backwards ? b : c;
  const void* const bias = gradient ? nullptr : backwards ? c : d;

  Prepared prepared = prepare(call, batch, level, places, true);
  const Size lanes = level.bytes / static_cast<Size>(prepared.bytes);
  Generator g = {};
  g.count = numbers[INVOLUTION_NUMBERS];
  g.columns = prepared.taps * (gradient ? prepared.job.result : prepared.job.weights).padded;
  g.row = round_up(g.columns, lanes);
  g.padded = round_up(g.count, lanes);
  g.pairs = !gradient && call.type == Type::bfloat16 && g.count % 2 == 0 && has_pairs(level);
  const Size numbers_of_place = g.pairs ? g.count / 2 : g.count;
  g.hidden = tensor(hidden, call.output, numbers_of_place, false);
  split(g.hidden, 1, numbers_of_place, true);
  g.hidden.direct = g.pairs || call.type == Type::float64 || call.type == Type::float32;
  g.parts = 1;
  prepared.generator = &g;

  Pieces pieces;
  pieces.prepared = &prepared;
  pieces.level = &level;
  if (backwards)
    divide_groups(prepared, g, pieces, lanes, threads);
  else
    divide_up(pieces, threads);
  g.part = (g.count + 1) * g.row * static_cast<Size>(prepared.bytes);
  const Memory copies = take_memory(
      g.parts * g.part + (gradient ? g.columns * g.padded * static_cast<Size>(prepared.bytes) : 0));
  if (copies == nullptr) return -1;
  copy_weights(g, prepared, level, call.groups, weight, bias, copies.get());
  if (!gradient) {
    share(batch * g.parts * pieces.boxes, threads, do_generated_piece, &pieces);
    return pieces.failed.load() ? -1 : 0;
  }
  const Size count = batch * pieces.number();
  const Memory partial =
      take_memory(count * (g.count + 1) * g.row * static_cast<Size>(prepared.bytes));
  if (partial == nullptr) return -1;
  pieces.partial = partial.get();
  pieces.dhidden = g.hidden;
  pieces.dhidden.data = result;
  pieces.dhidden.direct = false;
  share(count, threads, do_gradient_piece, &pieces);
  Sums sums = {&pieces, call.groups, second};
  if (!pieces.failed.load()) share(batch, threads, add_up_sample, &sums);
  return pieces.failed.load() ? -1 : 0;
} catch (const std::bad_alloc&) {
  return -1;
}

void involution_use_team(void* gomp_parallel) {
  involution::use_team(reinterpret_cast<involution::Team>(gomp_parallel));
}

const char* involution_level(int level) {
  const auto& found = involution::levels();
  return level >= 0 && level < static_cast<int>(found.size()) ? found[level]->name : nullptr;
}

void involution_use_level(int level) {
  if (involution_level(level) != nullptr) involution::chosen_level.store(level);
}

double involution_multiply_add(std::int64_t times) {
  const involution::Level& level = involution::level();
  // Of no use, but made: the compiler must not leave it out.
  [[maybe_unused]] volatile const float made = level.multiply_add(times);
  return 2.0 * 12 * (level.bytes / 4) * static_cast<double>(times);
}
