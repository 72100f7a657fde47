#include "plan.h"

#include <algorithm>

namespace involution {
namespace {

index_t gcd(index_t a, index_t b) { return b == 0 ? a : gcd(b, a % b); }
// Rounds toward negative infinity.
index_t floor_div(index_t n, index_t by) { return n / by - (n % by < 0); }

// Number of windows in a dimension.
index_t window_count(const InvolutionParams& params, int i) {
  return params.output_size[i] / params.upsampling[i];
}

// The taps of window p that overlap the input.
TapRange taps_of_window(const InvolutionParams& params, int i, index_t p) {
  const index_t first = p * params.strides[i] - params.pad_before[i], d = params.dilation_rate[i];
  const index_t low = std::max<index_t>(0, floor_div(-first + d - 1, d));
  const index_t high =
      std::min(params.kernel_size[i] - 1, floor_div(params.input_size[i] - 1 - first, d));
  if (low > high) return {0, 0, 0};
  return {high - low + 1, low, first + low * d};
}

// The taps by which windows read input position q.
TapRange taps_of_input(const InvolutionParams& params, int i, index_t q, index_t tap_step) {
  const index_t padded_position = q + params.pad_before[i], s = params.strides[i],
                d = params.dilation_rate[i];
  const index_t high = std::min(params.kernel_size[i] - 1, padded_position / d);
  index_t low =
      std::max<index_t>(
          0, floor_div(padded_position - (window_count(params, i) - 1) * s + d - 1, d));
  // One of tap_step consecutive taps is a whole number of strides away.
  for (index_t step = 0; step < tap_step && low <= high && (padded_position - low * d) % s != 0;
       ++step)
    ++low;
  if (low > high || (padded_position - low * d) % s != 0) return {0, 0, 0};
  return {(high - low) / tap_step + 1, low, (padded_position - low * d) / s};
}

// Chooses an axis that fills vectors, if possible a contiguous one.
VectorAxis choose_vector_axis(const InvolutionParams& params, bool generates_kernels) {
  const index_t channels_per_group = params.channels / params.groups, groups = params.groups;
  // Rows are packed with zero padding, which must not outgrow the row.
  const bool rows_fit =
      params.strides[2] == 1 && std::min(params.input_size[2], window_count(params, 2)) >= 4 &&
      (params.kernel_size[2] - 1) * params.dilation_rate[2] <= params.input_size[2] + 64;
  const VectorAxis channels_or_groups = channels_per_group < 4 && groups > channels_per_group
                                            ? VectorAxis::groups
                                            : VectorAxis::channels;
  // Each position's generated kernel is one row of a matrix.
  if (generates_kernels) return channels_or_groups;
  if (params.channels_first && rows_fit) return VectorAxis::positions;
  if (params.channels_first) return channels_or_groups;
  if (params.interleaved && groups % 4 == 0) return VectorAxis::groups;
  if ((!params.interleaved || groups == 1) && channels_per_group % 4 == 0)
    return VectorAxis::channels;
  if (std::max(channels_per_group, groups) < 4 && rows_fit) return VectorAxis::positions;
  return channels_or_groups;
}

index_t choose_vector_width(index_t count, index_t max_lanes, DataType type) {
  index_t lanes = max_lanes;
  if (type == DataType::float64) return lanes;
  while (lanes > 4 && count % lanes != 0 && (count % (lanes / 2) == 0 || count <= lanes / 2))
    lanes /= 2;
  return lanes;
}

}  // namespace

Tensor make_tensor(const void* data, const index_t* size, index_t channels, bool channels_first) {
  Tensor t = {};
  t.data = const_cast<void*>(data);
  t.batch_stride = num_elements(size) * channels;
  const index_t unit = channels_first ? 1 : channels;
  t.position_stride[2] = unit;
  t.position_stride[1] = unit * size[2];
  t.position_stride[0] = unit * size[2] * size[1];
  t.inner_stride = channels_first ? num_elements(size) : 1;
  return t;
}

Tensor make_output_tensor(const InvolutionParams& params, const void* data, index_t channels,
                          bool channels_first) {
  Tensor t = make_tensor(data, params.output_size, channels, channels_first);
  for (int i = 0; i < 3; ++i) t.position_stride[i] *= params.upsampling[i];
  return t;
}

void split_channels(Tensor& t, index_t outer_count, index_t inner_count, bool inner_is_fast) {
  const index_t step = t.inner_stride;
  t.outer_count = outer_count;
  t.inner_count = t.inner_padded = inner_count;
  t.outer_stride = inner_is_fast ? step * inner_count : step;
  t.inner_stride = inner_is_fast ? step : step * outer_count;
}

index_t phase_offset(const CallPlan& p, const Tensor& t, index_t phase) {
  index_t offset = 0;
  for (int i = 2; i >= 0; --i) {
    const index_t u = p.upsampling[i];
    offset += phase % u * (t.position_stride[i] / u);
    phase /= u;
  }
  return offset;
}

Tensor select_phase(const CallPlan& p, Tensor t, index_t phase) {
  const index_t bytes = t.zero_copy ? p.acc_bytes : item_size(p.plan.type);
  t.data = static_cast<char*>(t.data) + phase_offset(p, t, phase) * bytes;
  return t;
}

const index_t* result_size(const InvolutionParams& params) {
  const bool is_input_grad = static_cast<Pass>(params.pass) == Pass::input_grad;
  return is_input_grad ? params.input_size : params.output_size;
}

index_t scratch_bytes(const CallPlan& p) {
  const Plan& plan = p.plan;
  if (plan.pass != Pass::kernel_grad) return 0;
  if (plan.vector_axis != VectorAxis::positions)
    return p.taps * static_cast<index_t>(sizeof(index_t));
  const index_t rows = plan.dimension[0].taps * (plan.dimension[1].taps + kGradientRows - 1);
  return rows * static_cast<index_t>(sizeof(SourceRow));
}

CallPlan make_plan(const InvolutionParams& params, index_t batch, const KernelTable& target,
                   const Operands& operands, bool generates_kernels) {
  CallPlan p;
  Plan& plan = p.plan;
  plan.pass = static_cast<Pass>(params.pass);
  plan.type = static_cast<DataType>(params.dtype);
  plan.batch = batch;
  p.acc_bytes = plan.type == DataType::float64 ? 8 : 4;
  p.taps = num_elements(params.kernel_size);
  std::copy(params.upsampling, params.upsampling + 3, p.upsampling);
  p.phases = num_elements(params.upsampling);

  const bool channels_first = params.channels_first != 0,
             is_input_grad = plan.pass == Pass::input_grad;
  const index_t channels_per_group = params.channels / params.groups;
  plan.vector_axis = choose_vector_axis(params, generates_kernels);
  for (int i = 0; i < 3; ++i)
    plan.unit_steps[i] = params.strides[i] == 1 && params.dilation_rate[i] == 1;
  // If sources run backward, a row starts at its last tap.
  plan.source_offset = is_input_grad ? params.pad_before[2] : -params.pad_before[2];

  Tensor x = make_tensor(nullptr, params.input_size, params.channels, channels_first);
  Tensor y = make_output_tensor(params, nullptr, params.channels, channels_first);
  Tensor kernel = make_output_tensor(params, nullptr, p.taps * params.groups, channels_first);
  plan.phases = is_input_grad ? p.phases : 1;
  const bool groups_inner = plan.vector_axis == VectorAxis::groups;
  const index_t outer_count = groups_inner ? channels_per_group : params.groups;
  const index_t inner_count = groups_inner ? params.groups : channels_per_group;
  const bool inner_is_fast = groups_inner == (params.interleaved != 0);
  split_channels(x, outer_count, inner_count, inner_is_fast);
  split_channels(y, outer_count, inner_count, inner_is_fast);
  split_channels(kernel, p.taps, params.groups, true);

  const int max_lanes = target.vector_bytes / static_cast<int>(p.acc_bytes);
  const bool positions_inner = plan.vector_axis == VectorAxis::positions;
  plan.lanes = positions_inner ? max_lanes
                               : static_cast<int>(
                                     choose_vector_width(inner_count, max_lanes, plan.type));
  if (!positions_inner) x.inner_padded = y.inner_padded = round_up(inner_count, plan.lanes);
  if (groups_inner) kernel.inner_padded = x.inner_padded;
  const bool same_type = plan.type == DataType::float64 || plan.type == DataType::float32;
  // Rows shorter than a vector of positions need space for one.
  const index_t row = is_input_grad ? params.input_size[2] : window_count(params, 2);
  for (Tensor* t : {&x, &y, &kernel})
    // An empty tensor's pointer may be null; that of a packed copy is not.
    t->zero_copy = same_type && t->batch_stride > 0 &&
                   (positions_inner
                        ? t->position_stride[2] == 1 && row >= plan.lanes
                        : t->inner_stride == 1 && t->inner_padded == t->inner_count &&
                              (t->outer_stride == t->inner_padded || t->outer_count == 1));
  if (positions_inner) {
    // Tensors that are read outside the result's position need zero padding.
    if (is_input_grad)
      y.zero_copy = kernel.zero_copy = false;
    else
      x.zero_copy = false;
  }

  const auto with_data = [](Tensor t, const void* data) {
    t.data = const_cast<void*>(data);
    return t;
  };
  switch (plan.pass) {
    case Pass::forward:
      plan.values = with_data(x, operands.x), plan.weights = with_data(kernel, operands.kernel),
      plan.result = with_data(y, operands.y);
      break;
    case Pass::input_grad:
      plan.values = with_data(y, operands.y), plan.weights = with_data(kernel, operands.kernel),
      plan.result = with_data(x, operands.x);
      break;
    case Pass::kernel_grad:
      plan.values = with_data(x, operands.x), plan.weights = with_data(y, operands.y),
      plan.result = with_data(kernel, operands.kernel);
      break;
  }

  for (int i = 0; i < 3; ++i) {
    const index_t divisor = gcd(params.strides[i], params.dilation_rate[i]);
    Dimension& d = plan.dimension[i];
    d.taps = params.kernel_size[i];
    d.result_size = is_input_grad ? params.input_size[i] : window_count(params, i);
    d.tap_step = is_input_grad ? params.strides[i] / divisor : 1;
    d.source_step = is_input_grad ? -(params.dilation_rate[i] / divisor) : params.dilation_rate[i];
    d.source_size = is_input_grad ? window_count(params, i) : params.input_size[i];
    p.tap_ranges[i].resize(d.result_size);
    for (index_t n = 0; n < d.result_size; ++n)
      p.tap_ranges[i][n] =
          is_input_grad ? taps_of_input(params, i, n, d.tap_step) : taps_of_window(params, i, n);
    d.tap_ranges = p.tap_ranges[i].data();
    // Steps that leave the tensor are never taken. They are clamped because their product with a
    // stride could overflow. Steps into the zero padding of packed rows are taken:
    // choose_vector_axis bounds them.
    if (i == 2 && plan.vector_axis == VectorAxis::positions) continue;
    d.tap_step = std::min(d.tap_step, d.taps);
    const index_t limit = std::max<index_t>(d.source_size, 1);  // a step is never 0
    d.source_step = std::clamp(d.source_step, -limit, limit);
  }
  return p;
}

}  // namespace involution
