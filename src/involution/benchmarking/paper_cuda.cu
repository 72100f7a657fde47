// Involution of images as the paper's code for CUDA makes it: one thread for each number of the
// result, which gathers; channels first, the kernels (batch, taps, groups, height, width).
//
// Defined where this is compiled: T, the type, and the sizes BATCH, CHANNELS, GROUPS, HEIGHT, WIDTH,
// OUT_HEIGHT, OUT_WIDTH, SIZE of the window, STRIDES, DILATION, PAD_TOP and PAD_LEFT.

#define MEMBERS (CHANNELS / GROUPS)
#define EACH(index, count)                                                             \
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < (count);             \
       index += blockDim.x * gridDim.x)

__device__ inline int x_at(int n, int c, int h, int w) {
  return ((n * CHANNELS + c) * HEIGHT + h) * WIDTH + w;
}
__device__ inline int y_at(int n, int c, int h, int w) {
  return ((n * CHANNELS + c) * OUT_HEIGHT + h) * OUT_WIDTH + w;
}
__device__ inline int kernel_at(int n, int tap, int g, int h, int w) {
  return (((n * SIZE * SIZE + tap) * GROUPS + g) * OUT_HEIGHT + h) * OUT_WIDTH + w;
}

// A number's place in a tensor (batch, planes, rows, columns).
struct Place {
  int n, plane, h, w;
};
__device__ inline Place place_of(int index, int planes, int rows, int columns) {
  return {index / columns / rows / planes, index / columns / rows % planes,
          index / columns % rows, index % columns};
}

extern "C" __global__ void output(const T* x, const T* kernel, T* y) {
  EACH(index, BATCH * CHANNELS * OUT_HEIGHT * OUT_WIDTH) {
    const auto [n, c, h, w] = place_of(index, CHANNELS, OUT_HEIGHT, OUT_WIDTH);
    T sum = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        const int from_h = h * STRIDES - PAD_TOP + i * DILATION;
        const int from_w = w * STRIDES - PAD_LEFT + j * DILATION;
        if (from_h >= 0 && from_h < HEIGHT && from_w >= 0 && from_w < WIDTH)
          sum += kernel[kernel_at(n, i * SIZE + j, c / MEMBERS, h, w)] *
                 x[x_at(n, c, from_h, from_w)];
      }
    y[index] = sum;
  }
}

extern "C" __global__ void input(const T* kernel, const T* dy, T* dx) {
  EACH(index, BATCH * CHANNELS * HEIGHT * WIDTH) {
    const auto [n, c, h, w] = place_of(index, CHANNELS, HEIGHT, WIDTH);
    T sum = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        const int reach_h = h + PAD_TOP - i * DILATION, reach_w = w + PAD_LEFT - j * DILATION;
        if (reach_h < 0 || reach_h % STRIDES || reach_w < 0 || reach_w % STRIDES) continue;
        const int by_h = reach_h / STRIDES, by_w = reach_w / STRIDES;
        if (by_h < OUT_HEIGHT && by_w < OUT_WIDTH)
          sum += kernel[kernel_at(n, i * SIZE + j, c / MEMBERS, by_h, by_w)] *
                 dy[y_at(n, c, by_h, by_w)];
      }
    dx[index] = sum;
  }
}

extern "C" __global__ void kernel_gradient(const T* x, const T* dy, T* dkernel) {
  EACH(index, BATCH * SIZE * SIZE * GROUPS * OUT_HEIGHT * OUT_WIDTH) {
    const auto [n, plane, h, w] = place_of(index, SIZE * SIZE * GROUPS, OUT_HEIGHT, OUT_WIDTH);
    const int tap = plane / GROUPS, g = plane % GROUPS;
    const int from_h = h * STRIDES - PAD_TOP + tap / SIZE * DILATION;
    const int from_w = w * STRIDES - PAD_LEFT + tap % SIZE * DILATION;
    T sum = 0;
    if (from_h >= 0 && from_h < HEIGHT && from_w >= 0 && from_w < WIDTH)
      for (int c = g * MEMBERS; c < (g + 1) * MEMBERS; ++c)
        sum += x[x_at(n, c, from_h, from_w)] * dy[y_at(n, c, h, w)];
    dkernel[index] = sum;
  }
}
