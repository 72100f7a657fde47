// Threads that share the pieces of one job.
#pragma once

#include <cstdint>

namespace involution {

// Calls work(context, piece) for every piece from 0 to pieces - 1, in at most `threads` threads, the
// caller's among them, and returns when all are done. Callers who come meanwhile wait: two jobs one
// after the other, with all threads each, are done sooner than both at once.
void share(std::int64_t pieces, int threads, void (*work)(void*, std::int64_t), void* context);

// Runs work(context) in each of `threads` threads, the caller's among them: OpenMP's own entry for
// it, GOMP_parallel.
using Team = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);

// From now on these threads are used, null meaning the pool's. Threads of a framework that go on
// looking for work after they have done theirs would stand in the way of any others.
void use_team(Team team);

}  // namespace involution
