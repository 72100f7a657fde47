#include "involution.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "job.h"
#include "pool.h"

namespace involution {
namespace {

// --- Levels of instructions ----------------------------------------------------------------------

std::vector<const Level*> find_levels() {
  std::vector<const Level*> levels = {&plain_level};
#ifdef INVOLUTION_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(&avx2_level);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      levels.push_back(&avx512_level);
  }
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
  return {std::max<Size>(0, high - low + 1), low, first + low * d};
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
Across choose_across(const Call& c) {
  const Size members = c.channels / c.groups, groups = c.groups;
  // Rows are copied with zeros around them; these must not outgrow the row.
  const bool plain_rows = c.strides[2] == 1 && std::min(c.input[2], c.output[2]) >= 4 &&
                          (c.kernel_size[2] - 1) * c.dilation_rate[2] <= c.input[2] + 64;
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

struct Prepared {
  Job job;
  std::array<std::vector<Reach>, 3> reach;
  std::size_t bytes;  // of a number in a sum
  Size taps;
};

Prepared prepare(const Call& c, Size batch, const Level& level, const void* a, const void* b,
                 void* result) {
  Prepared p;
  Job& job = p.job;
  job.member = c.member;
  job.type = c.type;
  job.batch = batch;
  p.bytes = job.type == Type::float64 ? 8 : 4;
  p.taps = volume(c.kernel_size);

  const bool first = c.channels_first, backwards = job.member == Member::input;
  const Size members = c.channels / c.groups;
  job.across = choose_across(c);
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
    t->direct = same_type && (job.across == Across::positions
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
      job.values = place(x, a), job.weights = place(kernel, b), job.result = place(y, result);
      break;
    case Member::input:
      job.weights = place(kernel, a), job.values = place(y, b), job.result = place(x, result);
      break;
    case Member::kernel:
      job.values = place(x, a), job.weights = place(y, b), job.result = place(kernel, result);
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
    d.place_step = std::clamp(d.place_step, -d.places, d.places);
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

Size packed(const Job& job, const Box& box) {
  const Box around = places(job, box);
  return packed(job.values, around) +
         packed(job.weights, job.member == Member::input ? around : box) + packed(job.result, box);
}

struct Pieces {
  const Prepared* prepared;
  const Level* level;
  Size step[3], count[3];
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

void divide_up(Pieces& pieces, int threads) {
  const Prepared& p = *pieces.prepared;
  const Job& job = p.job;
  for (int i = 0; i < 3; ++i) pieces.step[i] = job.dimension[i].results;
  const Size wanted = threads > 1 ? threads * PIECES : 1;
  const Size work = p.taps * job.values.outers * job.values.inners;
  for (;;) {
    Box box = {};
    Size number = job.batch;
    for (int i = 0; i < 3; ++i) {
      box.high[i] = pieces.step[i];
      number *= (job.dimension[i].results + pieces.step[i] - 1) / pieces.step[i];
    }
    const bool few = number < wanted && positions(box) * work > 2 * SMALLEST_PIECE;
    const bool large = packed(job, box) * static_cast<Size>(p.bytes) > COPIES;
    const int i = pieces.step[0] > 1 ? 0 : pieces.step[1] > 1 ? 1 : 2;
    if (!(few || large) || pieces.step[i] == 1) break;
    pieces.step[i] = (pieces.step[i] + 1) / 2;
  }
  for (int i = 0; i < 3; ++i)
    pieces.count[i] = (job.dimension[i].results + pieces.step[i] - 1) / pieces.step[i];
}

// Memory of a thread's own that lasts from piece to piece, on a vector's boundary.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  char* take(std::size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  std::size_t size_ = 0;
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

void do_piece(void* context, Size index) {
  thread_local Scratch scratch;
  Pieces& pieces = *static_cast<Pieces*>(context);
  const Prepared& p = *pieces.prepared;
  const Job& job = p.job;
  const Size boxes = volume(pieces.count);
  const Size sample = index / boxes;
  const Box box = box_of(pieces, index % boxes), around = places(job, box);
  const Box& weighted = job.member == Member::input ? around : box;
  const std::size_t offsets = job.member == Member::kernel ? p.taps : 0;
  const std::size_t size = packed(job, box) * p.bytes + offsets * sizeof(Size) + 4 * 64;
  char* memory = scratch.take(size);
  if (memory == nullptr) {
    pieces.failed.store(true);
    return;
  }
  Size* const offset_memory = reinterpret_cast<Size*>(memory);
  memory += round_up(offsets * sizeof(Size), 64);

  const auto read = [&](const Tensor& t, const Box& part, Size size) {
    if (t.direct) return in_place(t, sample, p.bytes);
    const View view = copied(job, t, part, memory, p.bytes);
    pieces.level->pack(t, job.type, sample, part, size, view);
    return view;
  };
  const Dimension& last = job.dimension[2];
  const bool at_place = job.member == Member::input;
  const View values = read(job.values, around, last.places);
  const View weights = read(job.weights, weighted, at_place ? last.places : last.results);
  const View result = job.result.direct ? in_place(job.result, sample, p.bytes)
                                        : copied(job, job.result, box, memory, p.bytes);
  pieces.level->compute(job, box, values, weights, result, offset_memory);
  if (!job.result.direct) pieces.level->unpack(job.result, job.type, sample, box, result);
}

}  // namespace
}  // namespace involution

int involution_run(const std::int64_t* numbers, std::int64_t batch, int threads, const void* a,
                   const void* b, void* result) try {
  using namespace involution;
  const Call call(numbers);
  if (batch == 0 || volume(call.input) == 0) return 0;
  const Level& level = involution::level();
  const Prepared prepared = prepare(call, batch, level, a, b, result);
  Pieces pieces;
  pieces.prepared = &prepared;
  pieces.level = &level;
  divide_up(pieces, threads);
  share(batch * volume(pieces.count), threads, do_piece, &pieces);
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
