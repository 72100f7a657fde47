// Interface between the planner, which is compiled once, and the kernels, which are compiled for
// each target (instruction set). Plain data only: see the linker rule in kernels.cpp.
//
// All ranks are 3 here: a missing spatial dimension, always a leading one, has size 1.
#pragma once

#include <cstdint>

namespace involution {

using index_t = std::int64_t;

// Static: see the linker rule in kernels.cpp.
static inline index_t ceil_div(index_t n, index_t by) { return (n + by - 1) / by; }

enum class DataType : int { float64, float32, bfloat16, float16 };

// A tensor in memory. Strides count elements. The channels of x and y, and the taps and groups of a
// kernel tensor, form two axes, of which vectors run along the inner one.
struct Tensor {
  void* data;
  index_t batch_stride;
  index_t position_stride[3];
  index_t outer_stride, inner_stride;
  index_t outer_count, inner_count;
  index_t inner_padded;  // inner_count, rounded up to whole vectors where lanes run along it
  bool zero_copy;        // the layout lets the kernels access it without packing
};

// The taps that overlap the other tensor, seen from one position of the result: `count` taps from
// `tap`, the first at position `source` of the other tensor. Both advance by fixed steps.
struct TapRange {
  index_t count, tap, source;
};

// Rows of the output whose kernel gradients are computed together, with lanes along positions.
constexpr index_t kGradientRows = 3;

// A row of the input, and the rows of the output that read it: `count` from `first`, which reads it
// with row `tap_row` of the window.
struct SourceRow {
  index_t offset;
  index_t first, count, tap_row;
};

// What the lanes of a vector index.
enum class VectorAxis { channels, groups, positions };

struct Dimension {
  const TapRange* tap_ranges;  // one for each position of the result
  index_t result_size;
  index_t source_size;         // of the other tensor
  index_t taps;                // of the window
  index_t tap_step, source_step;
};

enum class Pass : int { forward, input_grad, kernel_grad };  // as in ops/autodiff/__init__.py

// forward, input_grad:  result[p] = sum over taps of weights[tap] * values[source]; the weights are
//                       indexed by p in `forward` and by the source in `input_grad`. There, with
//                       upsampling, a source has `phases` values and weights: all are summed.
// kernel_grad:          result[p, tap] = sum over the channels of a group of
//                       values[source] * weights[p], where the weights are the output's gradient.
struct Plan {
  Pass pass;
  DataType type;
  VectorAxis vector_axis;
  bool unit_steps[3];  // stride and dilation rate are 1
  index_t source_offset;  // with stride 1: source of a row's first tap minus the position
  int lanes;
  index_t batch;
  index_t phases;  // summed over: the outputs of each window in `input_grad`, else 1
  Dimension dimension[3];
  Tensor values, weights, result;
};

// A tensor as the kernels access it: a sample, or a region of one, in the accumulation type.
// Contiguous along channels, or with lanes along positions, along the positions of a row.
struct TensorView {
  void* data;
  index_t position_stride[3];
  index_t origin[3];  // the position that `data` points to
  index_t outer_stride, inner_stride;
  const index_t* phase_offsets;  // of the values and weights of each phase
};

// Half-open ranges of positions.
struct Region {
  index_t low[3], high[3];
};

// c[row, column] = bias[column] + sum over k of a[row, k] * b[k, column], in the accumulation type.
// `columns` is a multiple of the vector width; columns are contiguous in b and c.
struct GemmArgs {
  index_t rows, columns, k;
  const void* a;
  index_t a_row_stride, a_k_stride;
  const void* b;
  index_t b_k_stride;
  void* c;
  index_t c_row_stride;
  const void* bias;  // null: zeros
  bool accumulate;   // add to c; `bias` is ignored
};

// Hide the latency of every FMA unit, and fit into 16 registers.
constexpr int kFmaChains = 12;

// The kernels compiled for one target.
struct KernelTable {
  const char* target;
  int vector_bytes;
  // Copies a region of a sample into a view and converts it; positions at or beyond `size` of the
  // last dimension, and below 0, become zero. `unpack` is the reverse.
  void (*pack)(const Tensor&, DataType, index_t sample, const Region&, index_t size,
               const TensorView&);
  void (*unpack)(const Tensor&, DataType, index_t sample, const Region&, const TensorView&);
  // Computes the result in a region. `scratch`: as scratch_bytes in plan.h, aligned
  // for vectors.
  void (*compute)(const Plan&, const Region&, const TensorView& values, const TensorView& weights,
                  const TensorView& result, char* scratch);
  // For `channels` contiguous elements at each position of a region: value * scale + offset, and with
  // `relu`, 0 for values below 0. In the accumulation type.
  void (*scale)(DataType, const Region&, const TensorView&, index_t channels, const void* scale,
                const void* offset, bool relu);
  void (*gemm)(DataType, const GemmArgs&);
  // The same for a and b in bfloat16, two consecutive k packed into one 32-bit element; the bias is
  // required. Null where the target has no such instructions. A processor may lack them although it
  // runs the target. Subnormal inputs count as zero.
  void (*gemm_bf16)(const GemmArgs&);
  // Runs kFmaChains independent float32 FMA chains in registers, to measure peak FLOP/s.
  float (*fma_peak_loop)(index_t iterations);
};

extern const KernelTable plain_kernels;
#ifdef INVOLUTION_X86
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

}  // namespace involution
