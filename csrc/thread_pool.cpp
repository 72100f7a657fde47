#include "thread_pool.h"

#ifndef _WIN32
#include <pthread.h>
#endif

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace involution {
namespace {

// Spins before a waiting thread sleeps: about 20 microseconds, more than the gap between two
// operations of a training step.
constexpr int kSpinIterations = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(std::int64_t tasks, int threads, void (*fn)(void*, std::int64_t), void* context) {
    ensure_workers(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fn_ = fn;
      context_ = context;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      open_slots_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run_tasks();
    {
      // Workers that have not joined yet are not waited for.
      std::lock_guard<std::mutex> lock(mutex_);
      open_slots_ = 0;
    }
    for (int spin = 0; spin < kSpinIterations && active_.load(std::memory_order_acquire) > 0;
         ++spin)
      pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void ensure_workers(int workers) {
    try {
      while (workers_ < workers) {
        std::thread([this, seen = generation_.load()] { worker_loop(seen); }).detach();
        ++workers_;
      }
    } catch (const std::system_error&) {
      // The system allows no more threads: the existing ones run all tasks.
    }
  }

  // Detached, and never returns: it sleeps when the process exits.
  void worker_loop(std::uint64_t seen) {
    for (;;) {
      for (int spin = 0;
           spin < kSpinIterations && generation_.load(std::memory_order_acquire) == seen; ++spin)
        pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (open_slots_ == 0) continue;
        --open_slots_;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      run_tasks();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
      }
    }
  }

  void run_tasks() {
    for (;;) {
      const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      fn_(context_, task);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> active_{0};
  int workers_ = 0;
  int open_slots_ = 0;  // for workers in the current loop
  std::int64_t tasks_ = 0;
  void (*fn_)(void*, std::int64_t) = nullptr;
  void* context_ = nullptr;
};

std::mutex pool_mutex;
Pool* pool = nullptr;
std::atomic<ParallelRegion> parallel_region{nullptr};
thread_local ParallelLoop thread_loop = nullptr;
thread_local void* thread_loop_context = nullptr;

// The context of a loop in a parallel region.
struct ParallelJob {
  std::atomic<std::int64_t> next{0};
  std::int64_t tasks;
  void (*fn)(void*, std::int64_t);
  void* context;

  static void run_tasks(void* self) {
    ParallelJob& job = *static_cast<ParallelJob*>(self);
    for (;;) {
      const std::int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= job.tasks) return;
      job.fn(job.context, task);
    }
  }
};

#ifndef _WIN32  // no fork
// A child process inherits the memory but not the threads of its parent, and creates its own pool.
// The lock is held across the fork, so that no other thread owns it in the child.
void fork_prepare() { pool_mutex.lock(); }
void fork_parent() { pool_mutex.unlock(); }
void fork_child() {
  pool = nullptr;
  parallel_region.store(nullptr);
  pool_mutex.unlock();
}
[[maybe_unused]] const int fork_handlers = pthread_atfork(fork_prepare, fork_parent, fork_child);
#endif

}  // namespace

void parallel_for(std::int64_t tasks, int threads, void (*fn)(void*, std::int64_t), void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) fn(context, task);
    return;
  }
  if (thread_loop != nullptr) return thread_loop(thread_loop_context, tasks, fn, context);
  if (const ParallelRegion run = parallel_region.load()) {
    ParallelJob job{{0}, tasks, fn, context};
    return run(ParallelJob::run_tasks, &job, static_cast<unsigned>(threads), 0);
  }
  std::lock_guard<std::mutex> lock(pool_mutex);
  // Never deleted: its threads are detached.
  if (pool == nullptr) pool = new Pool;
  pool->run(tasks, threads, fn, context);
}

void set_parallel_region(ParallelRegion run) { parallel_region.store(run); }

void set_thread_loop(ParallelLoop loop, void* loop_context) {
  thread_loop = loop;
  thread_loop_context = loop_context;
}

}  // namespace involution
