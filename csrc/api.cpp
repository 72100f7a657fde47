#include <new>

#include "fused.h"
#include "params.h"
#include "partition.h"
#include "plan.h"
#include "targets.h"
#include "thread_pool.h"

namespace involution {
namespace {

void run_task(void* context, index_t index) {
  TaskGrid& grid = *static_cast<TaskGrid*>(context);
  Task task(grid, index);
  if (!task.reserve()) return;
  const Plan& plan = task.plan;
  const Dimension& last = plan.dimension[2];
  const TensorView values = task.load(plan.values, task.halo, last.source_size, plan.phases);
  const TensorView weights =
      task.load(task.slice_phase(plan.weights), task.kernel_region,
                plan.pass == Pass::input_grad ? last.source_size : last.result_size, plan.phases);
  const Tensor result_slice = task.slice_phase(plan.result);
  const TensorView result = task.output_view(result_slice);
  task.compute(values, weights, result);
  task.store(result_slice, result);
}

bool execute(const InvolutionParams& params, index_t batch, int threads, const void* a,
             const void* b, void* result) {
  if (batch == 0 || num_elements(result_size(params)) == 0) return true;
  const Pass pass = static_cast<Pass>(params.pass);
  const Operands operands = pass == Pass::forward      ? Operands{a, b, result}
                            : pass == Pass::input_grad ? Operands{result, a, b}
                                                       : Operands{a, result, b};
  const KernelTable& target = current_target();
  const CallPlan call = make_plan(params, batch, target, operands, false);
  TaskGrid grid;
  grid.call = &call;
  grid.target = &target;
  partition(grid, threads);
  parallel_for(batch * grid.num_tiles, grid.threads, run_task, &grid);
  return !grid.failed.load();
}

}  // namespace
}  // namespace involution

int involution_execute(const InvolutionParams* params, std::int64_t batch, int threads,
                       const void* a, const void* b, void* result) try {
  return involution::execute(*params, batch, threads, a, b, result) ? 0 : -1;
} catch (const std::bad_alloc&) {
  return -1;
}

int involution_execute_fused(const InvolutionParams* params, std::int64_t batch, int threads,
                             const void* a, const void* b, const void* c, const void* d,
                             void* result, void* dweights) try {
  return involution::execute_fused(*params, batch, threads, a, b, c, d, result, dweights) ? 0 : -1;
} catch (const std::bad_alloc&) {
  return -1;
}

int involution_execute_fused_scaled(const InvolutionParams* params, std::int64_t batch, int threads,
                                    const void* x, const void* hidden, const void* weight,
                                    const void* bias, const void* scale, const void* offset,
                                    int relu, void* y) try {
  const involution::Scaling scaling = {scale, offset, relu != 0};
  return involution::execute_fused(*params, batch, threads, x, hidden, weight, bias, y, nullptr,
                                   &scaling)
             ? 0
             : -1;
} catch (const std::bad_alloc&) {
  return -1;
}

void involution_set_openmp(void* gomp_parallel) {
  involution::set_parallel_region(reinterpret_cast<involution::ParallelRegion>(gomp_parallel));
}

void involution_set_parallel_for(InvolutionParallelFor loop, void* context) {
  involution::set_thread_loop(loop, context);
}

const char* involution_target(int index) {
  const auto& found = involution::targets();
  return index >= 0 && index < static_cast<int>(found.size()) ? found[index]->target : nullptr;
}

void involution_set_target(int index) {
  if (involution_target(index) != nullptr) involution::set_target(index);
}

double involution_fma_peak_loop(std::int64_t iterations) {
  const involution::KernelTable& target = involution::current_target();
  // Volatile, so that the compiler keeps the loop.
  [[maybe_unused]] volatile const float sink = target.fma_peak_loop(iterations);
  return 2.0 * involution::kFmaChains * (target.vector_bytes / 4) * static_cast<double>(iterations);
}
