// Involution of images as in the paper's CUDA code: one thread per element of the result. Tensors
// are channels first; the kernel tensor is (batch, taps, groups, height, width).
//
// Macros defined on compilation: T, the data type, and the sizes BATCH, CHANNELS, GROUPS, HEIGHT,
// WIDTH, OUT_HEIGHT, OUT_WIDTH, SIZE (of the window), STRIDES, DILATION, PAD_TOP and PAD_LEFT.

#define CHANNELS_PER_GROUP (CHANNELS / GROUPS)
#define GRID_STRIDE_LOOP(index, count)                                                 \
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < (count);             \
       index += blockDim.x * gridDim.x)

__device__ inline int x_index(int n, int c, int h, int w) {
  return ((n * CHANNELS + c) * HEIGHT + h) * WIDTH + w;
}
__device__ inline int y_index(int n, int c, int h, int w) {
  return ((n * CHANNELS + c) * OUT_HEIGHT + h) * OUT_WIDTH + w;
}
__device__ inline int kernel_index(int n, int tap, int g, int h, int w) {
  return (((n * SIZE * SIZE + tap) * GROUPS + g) * OUT_HEIGHT + h) * OUT_WIDTH + w;
}

// Coordinates of an element in a tensor (batch, planes, rows, columns).
struct Coordinates {
  int n, plane, h, w;
};
__device__ inline Coordinates unravel(int index, int planes, int rows, int columns) {
  return {index / columns / rows / planes, index / columns / rows % planes,
          index / columns % rows, index % columns};
}

extern "C" __global__ void output(const T* x, const T* kernel, T* y) {
  GRID_STRIDE_LOOP(index, BATCH * CHANNELS * OUT_HEIGHT * OUT_WIDTH) {
    const auto [n, c, h, w] = unravel(index, CHANNELS, OUT_HEIGHT, OUT_WIDTH);
    T sum = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        const int in_h = h * STRIDES - PAD_TOP + i * DILATION;
        const int in_w = w * STRIDES - PAD_LEFT + j * DILATION;
        if (in_h >= 0 && in_h < HEIGHT && in_w >= 0 && in_w < WIDTH)
          sum += kernel[kernel_index(n, i * SIZE + j, c / CHANNELS_PER_GROUP, h, w)] *
                 x[x_index(n, c, in_h, in_w)];
      }
    y[index] = sum;
  }
}

extern "C" __global__ void input(const T* kernel, const T* dy, T* dx) {
  GRID_STRIDE_LOOP(index, BATCH * CHANNELS * HEIGHT * WIDTH) {
    const auto [n, c, h, w] = unravel(index, CHANNELS, HEIGHT, WIDTH);
    T sum = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        const int distance_h = h + PAD_TOP - i * DILATION;
        const int distance_w = w + PAD_LEFT - j * DILATION;
        if (distance_h < 0 || distance_h % STRIDES || distance_w < 0 || distance_w % STRIDES)
          continue;
        const int out_h = distance_h / STRIDES, out_w = distance_w / STRIDES;
        if (out_h < OUT_HEIGHT && out_w < OUT_WIDTH)
          sum += kernel[kernel_index(n, i * SIZE + j, c / CHANNELS_PER_GROUP, out_h, out_w)] *
                 dy[y_index(n, c, out_h, out_w)];
      }
    dx[index] = sum;
  }
}

extern "C" __global__ void kernel_gradient(const T* x, const T* dy, T* dkernel) {
  GRID_STRIDE_LOOP(index, BATCH * SIZE * SIZE * GROUPS * OUT_HEIGHT * OUT_WIDTH) {
    const auto [n, plane, h, w] = unravel(index, SIZE * SIZE * GROUPS, OUT_HEIGHT, OUT_WIDTH);
    const int tap = plane / GROUPS, g = plane % GROUPS;
    const int in_h = h * STRIDES - PAD_TOP + tap / SIZE * DILATION;
    const int in_w = w * STRIDES - PAD_LEFT + tap % SIZE * DILATION;
    T sum = 0;
    if (in_h >= 0 && in_h < HEIGHT && in_w >= 0 && in_w < WIDTH)
      for (int c = g * CHANNELS_PER_GROUP; c < (g + 1) * CHANNELS_PER_GROUP; ++c)
        sum += x[x_index(n, c, in_h, in_w)] * dy[y_index(n, c, h, w)];
    dkernel[index] = sum;
  }
}
