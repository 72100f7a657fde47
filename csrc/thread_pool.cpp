#include "pool.h"

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

// How often a waiting thread looks again before it sleeps: some 20 microseconds, more than the gaps
// between two pieces of a training step's work, less than anyone notices.
constexpr int LOOKS = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(std::int64_t pieces, int threads, void (*work)(void*, std::int64_t), void* context) {
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      pieces_ = pieces;
      next_.store(0, std::memory_order_relaxed);
      places_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_pieces();
    {
      // Who has not come by now is not waited for.
      std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;
    }
    for (int look = 0; look < LOOKS && helping_.load(std::memory_order_acquire) > 0; ++look) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return helping_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void grow(int helpers) {
    try {
      while (helpers_ < helpers) {
        std::thread([this, seen = generation_.load()] { help(seen); }).detach();
        ++helpers_;
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are do the work.
    }
  }

  // Never ends: when the process does, it sleeps, and nothing waits for it.
  void help(std::uint64_t seen) {
    for (;;) {
      for (int look = 0; look < LOOKS && generation_.load(std::memory_order_acquire) == seen; ++look)
        pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (places_ == 0) continue;
        --places_;
        helping_.fetch_add(1, std::memory_order_relaxed);
      }
      take_pieces();
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (helping_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
      }
    }
  }

  void take_pieces() {
    for (;;) {
      const std::int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces_) return;
      work_(context_, piece);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> helping_{0};
  int helpers_ = 0;
  int places_ = 0;  // for helpers in the present job
  std::int64_t pieces_ = 0;
  void (*work_)(void*, std::int64_t) = nullptr;
  void* context_ = nullptr;
};

std::mutex in_use;
Pool* pool = nullptr;
std::atomic<Team> team{nullptr};

// A job as each thread of a team is given it.
struct Shared {
  std::atomic<std::int64_t> next{0};
  std::int64_t pieces;
  void (*work)(void*, std::int64_t);
  void* context;

  static void take_pieces(void* self) {
    Shared& job = *static_cast<Shared*>(self);
    for (;;) {
      const std::int64_t piece = job.next.fetch_add(1, std::memory_order_relaxed);
      if (piece >= job.pieces) return;
      job.work(job.context, piece);
    }
  }
};

#ifndef _WIN32  // where processes are not forked
// A child process has the memory but not the threads of its parent: it makes a pool of its own. The
// lock is held across the fork, so that the child does not find it in another thread's hands.
void before_fork() { in_use.lock(); }
void in_parent() { in_use.unlock(); }
void in_child() {
  pool = nullptr;
  team.store(nullptr);
  in_use.unlock();
}
[[maybe_unused]] const int watching = pthread_atfork(before_fork, in_parent, in_child);
#endif

}  // namespace

void share(std::int64_t pieces, int threads, void (*work)(void*, std::int64_t), void* context) {
  if (pieces < threads) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    for (std::int64_t piece = 0; piece < pieces; ++piece) work(context, piece);
    return;
  }
  if (const Team run = team.load()) {
    Shared job{{0}, pieces, work, context};
    return run(Shared::take_pieces, &job, static_cast<unsigned>(threads), 0);
  }
  std::lock_guard<std::mutex> mine(in_use);
  // It lasts as long as the process.
  if (pool == nullptr) pool = new Pool;
  pool->run(pieces, threads, work, context);
}

void use_team(Team run) { team.store(run); }

}  // namespace involution
