// The tasks of a call, each of which computes regions of the result in packed copies that fit into
// L2.
#pragma once

#include <atomic>
#include <memory>

#include "plan.h"

namespace involution {

// The tiles of one sample, and the tasks that compute them. With upsampling, each phase of a result
// at outputs has its own tasks.
struct TaskGrid {
  const CallPlan* call;
  const KernelTable* target;
  index_t tile[3], tiles[3];  // positions of a tile; number of tiles
  index_t task_phases;        // phases with their own tasks
  index_t num_tiles;          // product of `tiles` and `task_phases`
  index_t tiles_per_task;     // computed in sequence
  int threads;                // fewer where the work would not amortize waking them
  index_t num_tasks() const { return ceil_div(num_tiles, tiles_per_task); }  // of a sample
  // Kernel gradient of a generator: each task's gradient of the weight and bias,
  // (hidden_channels + 1, padded_columns), and the gradient of the hidden channels.
  char* partial = nullptr;
  Tensor dhidden = {};
  // Forward pass with a scaling: the scale and offset of each channel, in the layout of the result.
  const char *scale = nullptr, *offset = nullptr;
  bool relu = false;
  std::atomic<bool> failed{false};
};

// Chooses the number of threads, at most `threads`, and tiles: enough tasks for the threads, and
// copies within the budget.
void partition(TaskGrid& grid, int threads);

Region region_of_tile(const TaskGrid& grid, index_t index);

// The positions of the other tensor that a region of the result reads.
Region source_region(const Plan& plan, const Region& region);

index_t num_positions(const Region& region);

struct AlignedDeleter {
  void operator()(char* memory) const;
};
using AlignedBuffer = std::unique_ptr<char, AlignedDeleter>;

// Memory aligned for vectors; null if out of memory.
AlignedBuffer allocate_aligned(index_t bytes);

// A task: the region that it computes, and its packed copies.
class Task {
 public:
  Task(TaskGrid& grid, index_t index);

  // Reserves memory for the copies; false if out of memory.
  bool reserve();

  // Space for a region of a tensor, once for each of `phases`.
  TensorView allocate(const Tensor& t, const Region& region, index_t phases = 1);

  // Space for a row of `elements` at each position of a region.
  TensorView allocate_rows(index_t elements, const Region& region, index_t phases = 1);

  // Releases the space allocated after a mark.
  using Mark = char*;
  Mark mark() const { return memory_; }
  void release(Mark mark) { memory_ = mark; }

  // The part of a tensor at outputs with this task's phase.
  Tensor slice_phase(const Tensor& t) const;

  // The part of a tensor with the groups of this task's split.
  Tensor slice_groups(Tensor t) const;

  // A view of a region, in place or packed; `size` is the tensor's size in the last dimension,
  // `phases` the number of phases that are loaded.
  TensorView load(const Tensor& t, const Region& region, index_t size, index_t phases = 1);

  // A view for this task's region of the result, and the copy into the tensor where it is packed.
  TensorView output_view(const Tensor& t);
  void store(const Tensor& t, const TensorView& view);

  void compute(const TensorView& values, const TensorView& weights, const TensorView& result);

 private:
  TaskGrid& grid_;
  char* memory_ = nullptr;
  char* kernel_scratch_ = nullptr;
  index_t* phase_offsets_ = nullptr;  // of the next view with several phases

 public:
  const CallPlan& call;
  const Plan& plan;
  const index_t sample, split, phase;
  const Region region;         // of the result
  const Region padded_region;  // the same, with space for whole vectors
  const Region halo;           // of the other tensor
  const Region& kernel_region;
};

}  // namespace involution
