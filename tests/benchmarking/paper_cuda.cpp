// Compiles the CUDA source as C++ and runs its threads sequentially, for tests without a device.
struct Index {
  int x;
};
static Index blockIdx, blockDim, threadIdx, gridDim;
#define __global__
#define __device__

#include PAPER_CUDA

extern "C" void launch(void (*function)(const T*, const T*, T*), int blocks, int threads,
                       const T* a, const T* b, T* result) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) function(a, b, result);
}
