// The C ABI of the native core: an involution, or one of its gradients, on tensors in memory.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define INVOLUTION_EXPORT __declspec(dllexport)
#else
#define INVOLUTION_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// The parameters of a call, all of 64 bits: bindings carry them as a list of integers in this
// order. Mirrored by `Params` in ops/native/params.py. Spatial fields have three dimensions;
// missing leading ones have size 1, stride 1, dilation rate 1 and no padding.
struct InvolutionParams {
  std::int64_t pass;            // 0 forward, 1 input gradient, 2 kernel gradient
  std::int64_t dtype;           // 0 float64, 1 float32, 2 bfloat16, 3 float16
  std::int64_t channels_first;  // 0 or 1
  std::int64_t interleaved;     // 0 or 1: the group layout
  std::int64_t channels;
  std::int64_t groups;
  std::int64_t input_size[3];
  std::int64_t output_size[3];
  std::int64_t kernel_size[3];
  std::int64_t strides[3];
  std::int64_t dilation_rate[3];
  std::int64_t pad_before[3];
  std::int64_t hidden_channels;  // of a kernel generator; 0 where the kernel tensor is an argument
  std::int64_t upsampling[3];    // outputs of each window; above 1 only where strides are 1
};

enum { INVOLUTION_PARAMS_SIZE = sizeof(struct InvolutionParams) / sizeof(std::int64_t) };

// Computes one pass. a, b and the result are as in ops/autodiff/__init__.py: (x, kernel) -> y;
// (kernel, dy) -> dx; (x, dy) -> dkernel. All are contiguous. Returns 0, or -1 if out of memory.
INVOLUTION_EXPORT int involution_execute(const struct InvolutionParams* params, std::int64_t batch,
                                         int threads, const void* a, const void* b, void* result);

// The same with kernels that are generated where they are used and never stored: the kernel at a
// position is bias + hidden * weight. The arguments of the passes are
//
//    0  (x, hidden, weight, bias) -> y
//    1  (hidden, weight, bias, dy) -> dx
//    2  (x, hidden, weight, dy) -> dhidden, dweights
//
// with hidden (batch, *output, hidden channels), or with the channels first, weight (hidden
// channels, taps * groups) and bias (taps * groups). dweights is (batch, hidden channels + 1, taps * groups): for each sample, the
// gradient of the weight, then that of the bias; float64 for float64, else float32. Only pass 2
// writes dweights.
INVOLUTION_EXPORT int involution_execute_fused(const struct InvolutionParams* params,
                                               std::int64_t batch, int threads, const void* a,
                                               const void* b, const void* c, const void* d,
                                               void* result, void* dweights);

// Pass 0 of the above, then for each channel result * scale + offset, and with `relu`, no value below
// 0: scale and offset have params->channels elements.
INVOLUTION_EXPORT int involution_execute_fused_scaled(const struct InvolutionParams* params,
                                                      std::int64_t batch, int threads,
                                                      const void* x, const void* hidden,
                                                      const void* weight, const void* bias,
                                                      const void* scale, const void* offset,
                                                      int relu, void* y);

// Runs on the threads of an OpenMP library, given its GOMP_parallel, or given null, on the core's
// own thread pool. A forked child uses the pool.
INVOLUTION_EXPORT void involution_set_openmp(void* gomp_parallel);

// Runs `task(argument, n)` for every n in [0, tasks) and returns when all are done.
typedef void (*InvolutionParallelFor)(void* context, std::int64_t tasks,
                                      void (*task)(void*, std::int64_t), void* argument);

// Runs the calls of this thread by a framework's parallel loop, given with its context; null: as
// above.
INVOLUTION_EXPORT void involution_set_parallel_for(InvolutionParallelFor loop, void* context);

// The name of a target (instruction set), the most basic first; null beyond the last one that this
// machine supports.
INVOLUTION_EXPORT const char* involution_target(int index);

// Selects the target of all subsequent calls; by default, the last one.
INVOLUTION_EXPORT void involution_set_target(int index);

// Runs float32 FMAs in registers on the current target and returns the number of floating-point
// operations: a measure of peak FLOP/s.
INVOLUTION_EXPORT double involution_fma_peak_loop(std::int64_t iterations);
}
