#include "partition.h"

#include <algorithm>
#include <cstdlib>
#ifdef _WIN32
#include <malloc.h>
#endif

namespace involution {
namespace {

// Minimum multiply-adds per task, to amortize the cost of scheduling.
constexpr index_t kMinTaskMacs = 1 << 16;
// Minimum multiply-adds per thread: about 20 microseconds, as long as waking a thread may take.
constexpr index_t kMinThreadMacs = 1 << 19;
// For load balance.
constexpr index_t kTasksPerThread = 4;
// Size of a task's packed copies, which should fit into L2. Larger tiles duplicate less halo.
constexpr index_t kPackBudgetBytes = 1 << 20;
// Size of the values and weights of a row in a task, which are read for each vector of channels.
constexpr index_t kRowBudgetBytes = 1 << 19;
// Maximum tasks per sample in a reduction, each with its own partial gradient of the generator's
// weight: enough for a few threads, few enough to use little memory.
constexpr index_t kMaxReductionTasks = 16;

index_t group_splits(const CallPlan& p) {
  return p.generator == nullptr ? 1 : p.generator->group_splits;
}

index_t packed_elements(const Tensor& t, const Region& region) {
  return t.zero_copy ? 0 : num_positions(region) * t.outer_count * t.inner_padded;
}

// The positions whose kernels a region of the result needs, or for the kernel gradient, computes.
const Region& region_of_kernels(const Plan& plan, const Region& region, const Region& halo) {
  return plan.pass == Pass::input_grad ? halo : region;
}

// The region, with space for a vector in each row where lanes run along positions.
Region with_whole_vectors(const Plan& plan, Region region) {
  if (plan.vector_axis == VectorAxis::positions)
    region.high[2] = std::max(region.high[2], region.low[2] + plan.lanes);
  return region;
}

const index_t kNoOffset = 0;

// Elements of the packed copies of a task.
index_t packed_elements(const CallPlan& p, const Region& of_result) {
  const Plan& plan = p.plan;
  const Region region = with_whole_vectors(plan, of_result);
  const Region halo = source_region(plan, region);
  const Region& kernels = region_of_kernels(plan, region, halo);
  const GeneratorWeights* const g = p.generator;
  const bool gradient = plan.pass == Pass::kernel_grad;
  index_t count = packed_elements(plan.values, halo) * plan.phases;
  count += gradient ? packed_elements(plan.weights, region) : packed_elements(plan.result, region);
  if (g == nullptr)
    return count + packed_elements(gradient ? plan.result : plan.weights, kernels) * plan.phases;
  count += packed_elements(g->hidden, kernels) +
           num_positions(kernels) * g->padded_columns * plan.phases;
  return count + (gradient ? num_positions(kernels) * g->padded_hidden_channels : 0);
}

// Bytes that the kernels read at a position of a row.
index_t bytes_per_position(const CallPlan& p) {
  const Plan& plan = p.plan;
  index_t count = plan.values.outer_count * plan.values.inner_padded;
  count += plan.weights.outer_count * plan.weights.inner_padded;
  return count * plan.phases * p.acc_bytes;
}

// Memory of a thread, reused by its next task.
class Scratch {
 public:
  char* reserve(index_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      memory_ = allocate_aligned(bytes);
      size_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_.get();
  }

 private:
  AlignedBuffer memory_;
  index_t size_ = 0;
};

TensorView view_of(const Tensor& t, index_t sample, index_t bytes) {
  TensorView view = {};
  view.data = static_cast<char*>(t.data) + sample * t.batch_stride * bytes;
  std::copy(t.position_stride, t.position_stride + 3, view.position_stride);
  view.outer_stride = t.outer_stride;
  view.inner_stride = t.inner_stride;
  view.phase_offsets = &kNoOffset;
  return view;
}

TensorView packed_view(const Plan& plan, const Tensor& t, const Region& region, char*& memory,
                       index_t bytes) {
  TensorView view = {};
  view.data = memory;
  view.phase_offsets = &kNoOffset;
  const index_t channels = t.outer_count * t.inner_padded;
  index_t size[3];
  for (int i = 0; i < 3; ++i) size[i] = region.high[i] - region.low[i];
  view.position_stride[2] = plan.vector_axis == VectorAxis::positions ? 1 : channels;
  view.inner_stride = plan.vector_axis == VectorAxis::positions ? size[2] : 1;
  view.outer_stride = view.inner_stride * t.inner_padded;
  view.position_stride[1] = channels * size[2];
  view.position_stride[0] = channels * size[2] * size[1];
  std::copy(region.low, region.low + 3, view.origin);
  memory += round_up(packed_elements(t, region) * bytes, 64);
  return view;
}

}  // namespace

index_t num_positions(const Region& region) {
  index_t n = 1;
  for (int i = 0; i < 3; ++i) n *= region.high[i] - region.low[i];
  return n;
}

Region source_region(const Plan& plan, const Region& region) {
  Region halo = {};
  for (int i = 0; i < 3; ++i) {
    const Dimension& d = plan.dimension[i];
    if (i == 2 && plan.vector_axis == VectorAxis::positions) {
      // All taps, also those in the zero padding.
      const index_t extent = (d.taps - 1) * d.source_step;
      halo.low[i] = region.low[i] + plan.source_offset + std::min<index_t>(0, extent);
      halo.high[i] = region.high[i] + plan.source_offset + std::max<index_t>(0, extent);
      break;
    }
    bool any = false;
    for (index_t n = region.low[i]; n < region.high[i]; ++n) {
      const TapRange& r = d.tap_ranges[n];
      if (r.count == 0) continue;
      const index_t last = r.source + (r.count - 1) * d.source_step;
      const index_t low = std::min(r.source, last), high = std::max(r.source, last) + 1;
      halo.low[i] = any ? std::min(halo.low[i], low) : low;
      halo.high[i] = any ? std::max(halo.high[i], high) : high;
      any = true;
    }
  }
  return halo;
}

Region region_of_tile(const TaskGrid& grid, index_t index) {
  Region region;
  // Phases vary fastest: the tasks of a tile read the same input.
  index /= grid.task_phases;
  for (int i = 2; i >= 0; --i) {
    const index_t tiles = grid.tiles[i], n = index % tiles;
    const index_t size = grid.call->plan.dimension[i].result_size;
    index /= tiles;
    region.low[i] = n * size / tiles;
    region.high[i] = (n + 1) * size / tiles;
  }
  return region;
}

void partition(TaskGrid& grid, int threads) {
  const CallPlan& p = *grid.call;
  const Plan& plan = p.plan;
  for (int i = 0; i < 3; ++i) grid.tile[i] = plan.dimension[i].result_size;
  index_t work = p.taps * plan.values.outer_count * plan.values.inner_count * plan.phases;
  if (p.generator != nullptr)
    work += p.generator->hidden_channels * p.generator->padded_columns * plan.phases;
  grid.task_phases = plan.phases > 1 ? 1 : p.phases;
  index_t results = plan.batch * group_splits(p) * grid.task_phases;
  for (const Dimension& d : plan.dimension) results *= d.result_size;
  grid.threads = static_cast<int>(
      std::clamp<index_t>(results * work / kMinThreadMacs, 1, std::max(threads, 1)));
  // The order of a reduction must not depend on the threads or on other samples.
  const bool is_reduction = p.generator != nullptr && plan.pass == Pass::kernel_grad;
  const index_t wanted = grid.threads > 1 && !is_reduction ? grid.threads * kTasksPerThread : 1;
  // Rows with lanes along positions are at least a vector long, also the shorter one of two sizes.
  const index_t min_row = plan.vector_axis == VectorAxis::positions ? 2 * plan.lanes : 1;
  for (;;) {
    Region region = {};
    index_t number = plan.batch * group_splits(p) * grid.task_phases;
    for (int i = 0; i < 3; ++i) {
      region.high[i] = grid.tile[i];
      number *= ceil_div(plan.dimension[i].result_size, grid.tile[i]);
    }
    const bool too_few_tasks = number < wanted && num_positions(region) * work > 2 * kMinTaskMacs;
    const bool exceeds_cache = packed_elements(p, region) * p.acc_bytes > kPackBudgetBytes;
    if (p.generator == nullptr && grid.tile[2] >= 2 * min_row &&
        grid.tile[2] * bytes_per_position(p) > kRowBudgetBytes) {
      grid.tile[2] = (grid.tile[2] + 1) / 2;
      continue;
    }
    int i = grid.tile[0] > 1 ? 0 : grid.tile[1] > 1 ? 1 : 2;
    // Kernels in the halo are generated by several tasks: a tile should have a short border.
    if (p.generator != nullptr && plan.pass == Pass::input_grad)
      i = static_cast<int>(std::max_element(grid.tile, grid.tile + 3) - grid.tile);
    if (!(too_few_tasks || exceeds_cache) || grid.tile[i] < (i == 2 ? 2 * min_row : 2)) break;
    grid.tile[i] = (grid.tile[i] + 1) / 2;
  }
  for (int i = 0; i < 3; ++i)
    grid.tiles[i] = ceil_div(plan.dimension[i].result_size, grid.tile[i]);
  grid.num_tiles = num_elements(grid.tiles) * grid.task_phases;
  grid.tiles_per_task =
      is_reduction ? ceil_div(grid.num_tiles, kMaxReductionTasks) : 1;
}

// Not std::aligned_alloc, which macOS has only from 10.15 on.
void AlignedDeleter::operator()(char* memory) const {
#ifdef _WIN32
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

AlignedBuffer allocate_aligned(index_t bytes) {
  const auto size = static_cast<std::size_t>(std::max<index_t>(bytes, 1));
#ifdef _WIN32
  void* const memory = _aligned_malloc(size, 64);
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size) != 0) memory = nullptr;
#endif
  return AlignedBuffer(static_cast<char*>(memory));
}

Task::Task(TaskGrid& grid, index_t index)
    : grid_(grid),
      call(*grid.call),
      plan(call.plan),
      sample(index / grid.num_tiles / group_splits(call)),
      split(index / grid.num_tiles % group_splits(call)),
      phase(index % grid.task_phases),
      region(region_of_tile(grid, index % grid.num_tiles)),
      padded_region(with_whole_vectors(plan, region)),
      halo(source_region(plan, padded_region)),
      kernel_region(region_of_kernels(plan, padded_region, halo)) {}

bool Task::reserve() {
  thread_local Scratch scratch;
  const index_t kernel_scratch = round_up(scratch_bytes(call), 64);
  const index_t phase_bytes =  // for two views
      plan.phases > 1 ? round_up(2 * plan.phases * index_t(sizeof(index_t)), 64) : 0;
  // Each phase of at most 6 views starts at a multiple of 64 bytes.
  memory_ = scratch.reserve(packed_elements(call, region) * call.acc_bytes + kernel_scratch +
                            phase_bytes + 6 * plan.phases * 64);
  if (memory_ == nullptr) {
    grid_.failed.store(true);
    return false;
  }
  kernel_scratch_ = memory_;
  memory_ += kernel_scratch;
  phase_offsets_ = reinterpret_cast<index_t*>(memory_);
  memory_ += phase_bytes;
  return true;
}

TensorView Task::allocate(const Tensor& t, const Region& region, index_t phases) {
  TensorView view = packed_view(plan, t, region, memory_, call.acc_bytes);
  if (phases == 1) return view;
  view.phase_offsets = phase_offsets_;
  const index_t bytes = memory_ - static_cast<char*>(view.data);
  for (index_t n = 0; n < phases; ++n) *phase_offsets_++ = n * (bytes / call.acc_bytes);
  memory_ += (phases - 1) * bytes;
  return view;
}

TensorView Task::allocate_rows(index_t elements, const Region& region, index_t phases) {
  Tensor t = {};
  t.outer_count = 1;
  t.inner_padded = elements;
  return allocate(t, region, phases);
}

Tensor Task::slice_phase(const Tensor& t) const {
  return phase == 0 ? t : select_phase(call, t, phase);
}

Tensor Task::slice_groups(Tensor t) const {
  t.data =
      static_cast<char*>(t.data) + split * t.outer_count * t.outer_stride * item_size(plan.type);
  return t;
}

TensorView Task::load(const Tensor& t, const Region& region, index_t size, index_t phases) {
  if (t.zero_copy) {
    TensorView view = view_of(t, sample, call.acc_bytes);
    if (phases == 1) return view;
    view.phase_offsets = phase_offsets_;
    for (index_t n = 0; n < phases; ++n) *phase_offsets_++ = phase_offset(call, t, n);
    return view;
  }
  const TensorView view = allocate(t, region, phases);
  for (index_t n = 0; n < phases; ++n) {
    TensorView part = view;
    part.data = static_cast<char*>(view.data) + view.phase_offsets[n] * call.acc_bytes;
    grid_.target->pack(phases == 1 ? t : select_phase(call, t, n), plan.type, sample, region, size,
                       part);
  }
  return view;
}

TensorView Task::output_view(const Tensor& t) {
  return t.zero_copy ? view_of(t, sample, call.acc_bytes) : allocate(t, padded_region);
}

void Task::store(const Tensor& t, const TensorView& view) {
  if (!t.zero_copy) grid_.target->unpack(t, plan.type, sample, region, view);
}

void Task::compute(const TensorView& values, const TensorView& weights, const TensorView& result) {
  grid_.target->compute(plan, region, values, weights, result, kernel_scratch_);
}

}  // namespace involution
