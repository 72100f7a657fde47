// From the parameters of a call to the plan that the kernels execute.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "kernels/kernels.h"
#include "params.h"

namespace involution {

inline index_t round_up(index_t n, index_t unit) { return (n + unit - 1) / unit * unit; }
inline index_t num_elements(const index_t* size) { return size[0] * size[1] * size[2]; }
inline index_t item_size(DataType type) {
  return type == DataType::float64 ? 8 : type == DataType::float32 ? 4 : 2;
}

// The weights of a kernel generator, in the accumulation type, with rows padded to whole vectors.
struct GeneratorWeights {
  Tensor hidden;
  index_t hidden_channels;
  index_t columns;                 // elements of a kernel, in the layout of the plan's kernels
  index_t padded_columns;          // rounded up to whole vectors
  index_t padded_hidden_channels;  // rounded up to whole vectors
  index_t group_splits;            // number of tasks that the groups are split into
  index_t split_stride;            // bytes from one split's weight and bias to the next one's
  bool bf16_pairs;         // hidden and weight pack two bfloat16 hidden channels into an element
  const char* weight;      // (hidden_channels, padded_columns)
  const char* bias;        // (padded_columns)
  const char* transposed;  // (columns, padded_hidden_channels): the weight, for the gradients
};

// A plan, the memory that it points to, and fields that the kernels do not use.
struct CallPlan {
  Plan plan;
  std::array<std::vector<TapRange>, 3> tap_ranges;
  index_t acc_bytes;  // of an element of the accumulation type
  index_t taps;
  index_t upsampling[3];
  index_t phases;  // product of `upsampling`: the outputs of each window
  const GeneratorWeights* generator = nullptr;  // null: the kernel tensor is an argument
};

// The tensors of a call, or their gradients.
struct Operands {
  const void *x, *kernel, *y;
};

// A contiguous tensor with one axis of `channels` channels; `split_channels` splits the axis.
Tensor make_tensor(const void* data, const index_t* size, index_t channels, bool channels_first);

// A tensor at the outputs of a call, channels as above. With upsampling, its positions are windows,
// and the outputs of a window are its phases.
Tensor make_output_tensor(const InvolutionParams& params, const void* data, index_t channels,
                          bool channels_first);

// Splits the channel axis into outer_count x inner_count.
void split_channels(Tensor& t, index_t outer_count, index_t inner_count, bool inner_is_fast);

// Elements from phase 0 to a phase of a tensor at outputs; the tensor of one phase.
index_t phase_offset(const CallPlan& p, const Tensor& t, index_t phase);
Tensor select_phase(const CallPlan& p, Tensor t, index_t phase);

// Bytes of memory that the kernels need in each task.
index_t scratch_bytes(const CallPlan& p);

// Spatial sizes of the result.
const index_t* result_size(const InvolutionParams& params);

CallPlan make_plan(const InvolutionParams& params, index_t batch, const KernelTable& target,
                   const Operands& operands, bool generates_kernels);

}  // namespace involution
