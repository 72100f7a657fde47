#include "fused.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "partition.h"
#include "targets.h"
#include "thread_pool.h"

namespace involution {
namespace {

// Calls fn(positions, pointer into a, pointer into b) for runs of positions that are contiguous in
// both views.
template <class Fn>
void for_each_contiguous_run(const Region& region, const TensorView& a, const TensorView& b,
                             index_t bytes, Fn fn) {
  index_t size[3];
  for (int i = 0; i < 3; ++i) size[i] = region.high[i] - region.low[i];
  const auto is_contiguous = [&](int i) {
    return a.position_stride[i] == size[i + 1] * a.position_stride[i + 1] &&
           b.position_stride[i] == size[i + 1] * b.position_stride[i + 1];
  };
  const int loops = !is_contiguous(1) ? 2 : !is_contiguous(0) ? 1 : 0;
  const auto at = [&](const TensorView& view, index_t i, index_t j) {
    return static_cast<char*>(view.data) +
           bytes * ((i - view.origin[0]) * view.position_stride[0] +
                    (j - view.origin[1]) * view.position_stride[1] +
                    (region.low[2] - view.origin[2]) * view.position_stride[2]);
  };
  const index_t count = size[2] * (loops < 2 ? size[1] : 1) * (loops < 1 ? size[0] : 1);
  for (index_t i = region.low[0]; i < (loops < 1 ? region.low[0] + 1 : region.high[0]); ++i)
    for (index_t j = region.low[1]; j < (loops < 2 ? region.low[1] + 1 : region.high[1]); ++j)
      fn(count, at(a, i, j), at(b, i, j));
}

// Generates the kernels of one phase.
void compute_kernels(const Task& task, const KernelTable& target, const TensorView& hidden,
                     const TensorView& result) {
  const GeneratorWeights& g = *task.call.generator;
  GemmArgs gemm = {};
  gemm.columns = gemm.b_k_stride = gemm.c_row_stride = g.padded_columns;
  gemm.k = g.bf16_pairs ? g.hidden_channels / 2 : g.hidden_channels;
  gemm.a_row_stride = hidden.position_stride[2];
  gemm.a_k_stride = 1;
  gemm.b = g.weight + task.split * g.split_stride;
  gemm.bias = g.bias + task.split * g.split_stride;
  for_each_contiguous_run(task.kernel_region, hidden, result, task.call.acc_bytes,
                          [&](index_t count, const char* from, char* to) {
                            gemm.rows = count;
                            gemm.a = from;
                            gemm.c = to;
                            if (g.bf16_pairs)
                              target.gemm_bf16(gemm);
                            else
                              target.gemm(task.plan.type, gemm);
                          });
}

// Computes, from the gradients of the kernels, those of the hidden channels and this task's partial
// sums of the gradients of the weight and bias.
void accumulate_generator_grads(const Task& task, const KernelTable& target,
                                const TensorView& hidden, const TensorView& gradients,
                                const TensorView& dhidden, char* partial, bool add) {
  const GeneratorWeights& g = *task.call.generator;
  const DataType type = task.plan.type;
  const index_t bytes = task.call.acc_bytes;
  const double one = 1;
  const float one_float = 1;

  GemmArgs hidden_gemm = {};
  hidden_gemm.columns = hidden_gemm.b_k_stride = hidden_gemm.c_row_stride =
      g.padded_hidden_channels;
  hidden_gemm.k = g.columns;
  hidden_gemm.a_row_stride = g.padded_columns;
  hidden_gemm.a_k_stride = 1;
  hidden_gemm.b = g.transposed;
  hidden_gemm.c = dhidden.data;

  GemmArgs weight_gemm = {};
  weight_gemm.rows = g.hidden_channels;
  weight_gemm.columns = weight_gemm.b_k_stride = weight_gemm.c_row_stride = g.padded_columns;
  weight_gemm.a_row_stride = 1;
  weight_gemm.a_k_stride = hidden.position_stride[2];
  weight_gemm.c = partial;
  weight_gemm.accumulate = add;

  GemmArgs bias_gemm = weight_gemm;
  bias_gemm.rows = 1;
  bias_gemm.a = type == DataType::float64 ? static_cast<const void*>(&one) : &one_float;
  bias_gemm.a_row_stride = bias_gemm.a_k_stride = 0;
  bias_gemm.c = partial + g.hidden_channels * g.padded_columns * bytes;

  for_each_contiguous_run(
      task.region, hidden, gradients, bytes, [&](index_t count, const char* h, char* gradient) {
        hidden_gemm.rows = count;
        hidden_gemm.a = gradient;
        target.gemm(type, hidden_gemm);
        hidden_gemm.c =
            static_cast<char*>(hidden_gemm.c) + count * g.padded_hidden_channels * bytes;
        weight_gemm.k = bias_gemm.k = count;
        weight_gemm.a = h;
        weight_gemm.b = bias_gemm.b = gradient;
        target.gemm(type, weight_gemm);
        target.gemm(type, bias_gemm);
        weight_gemm.accumulate = bias_gemm.accumulate = true;
      });
}

void run_fused_task(void* context, index_t index) {
  TaskGrid& grid = *static_cast<TaskGrid*>(context);
  Task task(grid, index);
  if (!task.reserve()) return;
  const Plan& plan = task.plan;
  const GeneratorWeights& g = *task.call.generator;
  const Dimension& last = plan.dimension[2];
  const TensorView values =
      task.load(task.slice_groups(plan.values), task.halo, last.source_size, plan.phases);
  const TensorView kernels = task.allocate_rows(g.padded_columns, task.kernel_region, plan.phases);
  const Tensor result_slice = task.slice_groups(task.slice_phase(plan.result));
  const TensorView result = task.output_view(result_slice);
  const Task::Mark mark = task.mark();
  for (index_t n = 0; n < plan.phases; ++n) {
    task.release(mark);
    const Tensor part =
        plan.phases > 1 ? select_phase(task.call, g.hidden, n) : task.slice_phase(g.hidden);
    const TensorView hidden =
        task.load(part, task.kernel_region,
                  plan.pass == Pass::input_grad ? last.source_size : last.result_size);
    TensorView kernels_of_phase = kernels;
    kernels_of_phase.data =
        static_cast<char*>(kernels.data) + kernels.phase_offsets[n] * task.call.acc_bytes;
    compute_kernels(task, *grid.target, hidden, kernels_of_phase);
  }
  task.compute(values, kernels, result);
  if (grid.scale != nullptr)
    grid.target->scale(plan.type, task.region, result,
                       plan.result.outer_count * plan.result.inner_padded, grid.scale, grid.offset,
                       grid.relu);
  task.store(result_slice, result);
}

void run_fused_grad_task(void* context, index_t index) {
  TaskGrid& grid = *static_cast<TaskGrid*>(context);
  const index_t sample = index / grid.num_tasks(),
                first = index % grid.num_tasks() * grid.tiles_per_task;
  const CallPlan& p = *grid.call;
  const GeneratorWeights& g = *p.generator;
  char* const partial =
      grid.partial + index * (g.hidden_channels + 1) * g.padded_columns * p.acc_bytes;
  for (index_t n = first; n < std::min(first + grid.tiles_per_task, grid.num_tiles); ++n) {
    Task task(grid, sample * grid.num_tiles + n);
    if (!task.reserve()) return;
    const Plan& plan = task.plan;
    const Dimension& last = plan.dimension[2];
    const TensorView values = task.load(plan.values, task.halo, last.source_size);
    const TensorView hidden = task.load(task.slice_phase(g.hidden), task.region, last.result_size);
    const TensorView kernels = task.allocate_rows(g.padded_columns, task.region);
    const TensorView weights =
        task.load(task.slice_phase(plan.weights), task.region, last.result_size);
    const TensorView dhidden = task.allocate_rows(g.padded_hidden_channels, task.region);
    task.compute(values, weights, kernels);
    accumulate_generator_grads(task, *grid.target, hidden, kernels, dhidden, partial, n > first);
    task.store(task.slice_phase(grid.dhidden), dhidden);
  }
}

// Packs pairs of float32 rows, each element a bfloat16 value in its upper half, into one row.
void pack_bf16_pairs(char* rows, index_t count, index_t row) {
  const auto at = [&](index_t n, index_t f) { return rows + (n * row + f) * 4; };
  for (index_t n = 0; n < count; n += 2)
    for (index_t f = 0; f < row; ++f) {
      std::uint32_t first, second;
      std::memcpy(&first, at(n, f), 4);
      std::memcpy(&second, at(n + 1, f), 4);
      const std::uint32_t both = first >> 16 | (second & 0xffff0000);
      std::memcpy(at(n / 2, f), &both, 4);
    }
}

// Packs the generator's weight and bias into `memory`.
void pack_generator_weights(GeneratorWeights& g, const CallPlan& p, const KernelTable& target,
                            index_t groups, const void* weight, const void* bias, char* memory) {
  const index_t bytes = p.acc_bytes, padded = g.columns / p.taps;
  const index_t stored = item_size(p.plan.type);
  const auto copy = [&](const void* from, index_t rows, index_t split, char* to) {
    Tensor t = {};
    t.inner_count = groups / g.group_splits;
    t.data = static_cast<char*>(const_cast<void*>(from)) + split * t.inner_count * stored;
    t.position_stride[2] = p.taps * groups;
    t.outer_stride = groups;
    t.inner_stride = 1;
    t.outer_count = p.taps;
    t.inner_padded = padded;
    TensorView view = {};
    view.data = to;
    view.position_stride[2] = g.padded_columns;
    view.outer_stride = padded;
    view.inner_stride = 1;
    std::memset(to, 0, rows * g.padded_columns * bytes);
    target.pack(t, p.plan.type, 0, {{0, 0, 0}, {1, 1, rows}}, rows, view);
  };
  char* const biases = memory + g.hidden_channels * g.padded_columns * bytes;
  for (index_t split = 0; split < g.group_splits; ++split) {
    copy(weight, g.hidden_channels, split, memory + split * g.split_stride);
    if (bias != nullptr) copy(bias, 1, split, biases + split * g.split_stride);
  }
  g.weight = memory;
  g.bias = biases;
  if (g.bf16_pairs)
    for (index_t split = 0; split < g.group_splits; ++split)
      pack_bf16_pairs(memory + split * g.split_stride, g.hidden_channels, g.padded_columns);
  if (p.plan.pass != Pass::kernel_grad) return;
  char* const transposed = biases + g.padded_columns * bytes;
  g.transposed = transposed;
  std::memset(transposed, 0, g.columns * g.padded_hidden_channels * bytes);
  for (index_t n = 0; n < g.hidden_channels; ++n)
    for (index_t f = 0; f < g.columns; ++f)
      std::memcpy(transposed + (f * g.padded_hidden_channels + n) * bytes,
                  memory + (n * g.padded_columns + f) * bytes, bytes);
}

// Packs the scale and offset for the tasks of a grid; null if out of memory.
AlignedBuffer pack_scaling(const Scaling& scaling, const CallPlan& p, const KernelTable& target,
                           TaskGrid& grid) {
  Tensor t = p.plan.result;
  const index_t step = std::min(t.inner_stride, t.outer_stride);  // from a channel to the next
  t.inner_stride /= step;
  t.outer_stride /= step;
  const index_t bytes = t.outer_count * t.inner_padded * p.acc_bytes;
  AlignedBuffer memory = allocate_aligned(2 * bytes);
  if (memory == nullptr) return memory;
  TensorView view = {};
  view.outer_stride = t.inner_padded;
  view.inner_stride = 1;
  const void* const sources[] = {scaling.scale, scaling.offset};
  for (int n = 0; n < 2; ++n) {
    t.data = const_cast<void*>(sources[n]);
    view.data = memory.get() + n * bytes;
    target.pack(t, p.plan.type, 0, {{0, 0, 0}, {1, 1, 1}}, 1, view);
  }
  grid.scale = memory.get();
  grid.offset = memory.get() + bytes;
  grid.relu = scaling.relu;
  return memory;
}

// Whether the generator's weight and bias are laid out as packed ones would be.
bool has_packed_layout(const GeneratorWeights& g, const CallPlan& p, index_t groups) {
  return p.plan.pass != Pass::kernel_grad && item_size(p.plan.type) == p.acc_bytes &&
         g.group_splits == 1 && g.columns == p.taps * groups && g.padded_columns == g.columns;
}

// Halves the groups of a task, for the input gradient: with fewer groups, the kernels of a larger
// tile fit into the budget, and a smaller fraction of them belongs to the halo.
void split_groups(CallPlan& p, GeneratorWeights& g, index_t lanes) {
  Plan& plan = p.plan;
  g.group_splits *= 2;
  plan.values.outer_count /= 2;
  plan.result.outer_count /= 2;
  plan.weights.inner_count = plan.weights.inner_padded = plan.weights.inner_padded / 2;
  g.columns /= 2;
  g.padded_columns = round_up(g.columns, lanes);
}

// The number of kernel elements that all tasks generate.
index_t count_generated(const TaskGrid& grid) {
  const CallPlan& p = *grid.call;
  index_t sum = 0;
  for (index_t n = 0; n < grid.num_tiles; ++n)
    sum += num_positions(source_region(p.plan, region_of_tile(grid, n)));
  return sum * p.generator->group_splits * p.generator->padded_columns;
}

// Splits the groups while that saves work.
void choose_group_split(CallPlan& p, GeneratorWeights& g, TaskGrid& grid, index_t lanes,
                        int threads) {
  partition(grid, threads);
  index_t least = count_generated(grid);
  while (p.plan.vector_axis == VectorAxis::channels && p.plan.weights.inner_padded % 2 == 0) {
    const Plan plan_before = p.plan;
    const GeneratorWeights generator_before = g;
    split_groups(p, g, lanes);
    partition(grid, threads);
    const index_t now = count_generated(grid);
    if (now >= least) {
      p.plan = plan_before;
      g = generator_before;
      partition(grid, threads);
      return;
    }
    least = now;
  }
}

// The sum of the partial gradients of the weight and bias over the tasks of a sample.
struct Reduction {
  const TaskGrid* grid;
  index_t groups;
  void* result;
};

template <class T>
void reduce_partials(const Reduction& reduction, index_t sample) {
  const CallPlan& p = *reduction.grid->call;
  const GeneratorWeights& g = *p.generator;
  const index_t tasks = reduction.grid->num_tasks(),
                size = (g.hidden_channels + 1) * g.padded_columns;
  const index_t padded = g.columns / p.taps;
  const T* const partial =
      reinterpret_cast<const T*>(reduction.grid->partial) + sample * tasks * size;
  T* to = static_cast<T*>(reduction.result) +
          sample * (g.hidden_channels + 1) * p.taps * reduction.groups;
  for (index_t row = 0; row <= g.hidden_channels; ++row)
    for (index_t tap = 0; tap < p.taps; ++tap, to += reduction.groups) {
      const T* from = partial + row * g.padded_columns + tap * padded;
      std::copy(from, from + reduction.groups, to);
      for (index_t task = 1; task < tasks; ++task) {
        from += size;
        for (index_t n = 0; n < reduction.groups; ++n) to[n] += from[n];
      }
    }
}

void reduce_sample(void* context, index_t sample) {
  const Reduction& reduction = *static_cast<const Reduction*>(context);
  if (reduction.grid->call->plan.type == DataType::float64)
    reduce_partials<double>(reduction, sample);
  else
    reduce_partials<float>(reduction, sample);
}

}  // namespace

bool execute_fused(const InvolutionParams& params, index_t batch, int threads, const void* a,
                   const void* b, const void* c, const void* d, void* result, void* dweights,
                   const Scaling* scaling) {
  const Pass pass = static_cast<Pass>(params.pass);
  const DataType type = static_cast<DataType>(params.dtype);
  const bool is_kernel_grad = pass == Pass::kernel_grad, is_input_grad = pass == Pass::input_grad;
  if (batch == 0) return true;
  if (num_elements(result_size(params)) == 0) {
    // An empty sum is zero.
    if (is_kernel_grad)
      std::memset(dweights, 0,
                  batch * (params.hidden_channels + 1) * num_elements(params.kernel_size) *
                      params.groups * (type == DataType::float64 ? 8 : 4));
    return true;
  }
  const KernelTable& target = current_target();
  const Operands operands = is_input_grad ? Operands{result, nullptr, d}
                                          : Operands{a, nullptr, is_kernel_grad ? d : result};
  const void *const hidden = is_input_grad ? a : b, *const weight = is_input_grad ? b : c;
  const void* const bias = is_kernel_grad ? nullptr : is_input_grad ? c : d;

  CallPlan call = make_plan(params, batch, target, operands, true);
  const index_t lanes = target.vector_bytes / call.acc_bytes;
  GeneratorWeights g = {};
  g.hidden_channels = params.hidden_channels;
  g.columns = call.taps * (is_kernel_grad ? call.plan.result : call.plan.weights).inner_padded;
  g.padded_columns = round_up(g.columns, lanes);
  g.padded_hidden_channels = round_up(g.hidden_channels, lanes);
  const bool channels_first = params.channels_first != 0;
  g.bf16_pairs = !is_kernel_grad && type == DataType::bfloat16 && g.hidden_channels % 2 == 0 &&
                 !channels_first && has_avx512_bf16(target);
  const index_t hidden_elements = g.bf16_pairs ? g.hidden_channels / 2 : g.hidden_channels;
  g.hidden = make_output_tensor(params, hidden, hidden_elements, channels_first);
  split_channels(g.hidden, 1, hidden_elements, true);
  g.hidden.zero_copy = !channels_first && (g.bf16_pairs || type == DataType::float64 ||
                                           type == DataType::float32);
  g.group_splits = 1;
  call.generator = &g;

  TaskGrid grid;
  grid.call = &call;
  grid.target = &target;
  if (is_input_grad)
    choose_group_split(call, g, grid, lanes, threads);
  else
    partition(grid, threads);
  g.split_stride = (g.hidden_channels + 1) * g.padded_columns * call.acc_bytes;
  AlignedBuffer packed;
  if (has_packed_layout(g, call, params.groups)) {
    g.weight = static_cast<const char*>(weight);
    g.bias = static_cast<const char*>(bias);
  } else {
    packed = allocate_aligned(
        g.group_splits * g.split_stride +
        (is_kernel_grad ? g.columns * g.padded_hidden_channels * call.acc_bytes : 0));
    if (packed == nullptr) return false;
    pack_generator_weights(g, call, target, params.groups, weight, bias, packed.get());
  }
  const AlignedBuffer scales = scaling == nullptr ? AlignedBuffer()
                                                  : pack_scaling(*scaling, call, target, grid);
  if (scaling != nullptr && scales == nullptr) return false;
  if (!is_kernel_grad) {
    parallel_for(batch * g.group_splits * grid.num_tiles, grid.threads, run_fused_task, &grid);
    return !grid.failed.load();
  }
  const index_t tasks = batch * grid.num_tasks();
  const AlignedBuffer partial =
      allocate_aligned(tasks * (g.hidden_channels + 1) * g.padded_columns * call.acc_bytes);
  if (partial == nullptr) return false;
  grid.partial = partial.get();
  grid.dhidden = g.hidden;
  grid.dhidden.data = result;
  grid.dhidden.zero_copy = false;
  parallel_for(tasks, grid.threads, run_fused_grad_task, &grid);
  Reduction reduction = {&grid, params.groups, dweights};
  if (!grid.failed.load()) parallel_for(batch, grid.threads, reduce_sample, &reduction);
  return !grid.failed.load();
}

}  // namespace involution
