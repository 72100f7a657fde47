// Parallel loops over tasks.
#pragma once

#include <cstdint>

namespace involution {

// Calls fn(context, task) for every task in [0, tasks) on at most `threads` threads, including the
// caller's, and returns when all are done. Concurrent callers wait: two loops in sequence, each on
// all threads, finish sooner than both at once.
void parallel_for(std::int64_t tasks, int threads, void (*fn)(void*, std::int64_t), void* context);

// Runs fn(context) on each of `threads` threads, including the caller's: the signature of OpenMP's
// GOMP_parallel.
using ParallelRegion = void (*)(void (*fn)(void*), void* context, unsigned threads, unsigned flags);

// Runs all subsequent loops in this parallel region; null: on the pool. The threads of a framework
// spin for a while after their work, and would compete with a second set of threads.
void set_parallel_region(ParallelRegion parallel_region);

// Runs the loops that this thread starts by `loop(context, tasks, fn, fn's context)`; null: as above.
using ParallelLoop = void (*)(void* loop_context, std::int64_t tasks,
                              void (*fn)(void*, std::int64_t), void* context);
void set_thread_loop(ParallelLoop loop, void* loop_context);

}  // namespace involution
