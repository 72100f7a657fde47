// The core's entries: an involution, or one of its gradients, on tensors in memory.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define INVOLUTION_EXPORT __declspec(dllexport)
#else
#define INVOLUTION_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// `numbers` says what a call is; spatial dimensions are three, missing ones, the first, of size 1:
//
//    0  member         0 output, 1 input gradient, 2 kernel gradient
//    1  type           0 float64, 1 float32, 2 bfloat16, 3 float16
//    2  channels_first  0 or 1
//    3  interleaved     0 or 1
//    4  channels, 5 groups
//    6  spatial sizes of the input, 9 of the output, 12 of a window, 15 strides, 18 dilation rates,
//   21  zeros before the first position
//
// a, b and the result are as in ops/gradients.py: (x, kernel) -> y; (kernel, dy) -> dx;
// (x, dy) -> dkernel. All are contiguous. Returns 0, or -1 where memory ran out.
enum { INVOLUTION_NUMBERS = 24 };
INVOLUTION_EXPORT int involution_run(const std::int64_t* numbers, std::int64_t batch, int threads,
                                     const void* a, const void* b, void* result);

// The same with kernels that are generated where they are used, and nowhere stored: the kernel at a
// position is bias + hidden * weight. `numbers` has one more, the number of hidden channels, and
// channels are last. In the order of their arguments,
//
//    0  (x, hidden, weight, bias) -> y
//    1  (hidden, weight, bias, dy) -> dx
//    2  (x, hidden, weight, dy) -> dhidden, dweights
//
// with hidden (batch, *output, hidden channels), weight (hidden channels, taps * groups) and bias
// (taps * groups). dweights are (batch, hidden channels + 1, taps * groups), each sample's own, the
// bias's gradient last; they are float64 for float64, else float32. `second` is used by 2 alone.
enum { INVOLUTION_FUSED_NUMBERS = INVOLUTION_NUMBERS + 1 };
INVOLUTION_EXPORT int involution_run_fused(const std::int64_t* numbers, std::int64_t batch,
                                           int threads, const void* a, const void* b,
                                           const void* c, const void* d, void* result,
                                           void* second);

// Uses the threads of an OpenMP library, given its GOMP_parallel, instead of the core's own pool; or
// the pool again, given null. A forked child uses the pool.
INVOLUTION_EXPORT void involution_use_team(void* gomp_parallel);

// Levels of instructions, the plainest first: a level's name, or null past the last that this
// machine can run.
INVOLUTION_EXPORT const char* involution_level(int level);

// Does multiply-adds of float32 in registers at the present level, and returns how many, a
// multiplication and an addition being two: what a processor can do when it waits for no memory.
INVOLUTION_EXPORT double involution_multiply_add(std::int64_t times);

// Makes all calls from now on run at this level; unless told, the highest.
INVOLUTION_EXPORT void involution_use_level(int level);
}
