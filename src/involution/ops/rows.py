"""Row-unrolled implementation, for exporters: one sum for each row of taps.

Each operation of an exported graph has a cost; for 7x7 windows this implementation has a sixth of
the operations of ``reference``. It is selected by name only, because under XLA the order of its
sums depends on the batch size.
"""

from involution.ops import tensor_utils
from involution.ops.frameworks import namespace
from involution.ops.reference import input_grad
from involution.ops.tensor_utils import (
    merge_kernel,
    merge_output,
    pad_and_split,
    spatial_axis,
    spatial_shape,
    split_kernel,
    split_output,
    strided_slice,
    to_accumulation_dtype,
)
from involution.ops.validation import CHANNELS_LAST

__all__ = ["apply", "input_grad", "kernel_grad", "unsupported_reason"]


def unsupported_reason(problem) -> str | None:
    if problem.window.rank == 3:
        return "XLA crashes when it compiles three-dimensional rows"
    return tensor_utils.unsupported_reason(problem)


def apply(x, kernel, problem):
    """Y[b, p, c] = sum over taps of kernel[b, p, tap, group of c] * X[b, window of p at tap, c]."""
    ops, window = namespace(x), problem.window
    weights, width = split_kernel(to_accumulation_dtype(kernel), window), window.kernel_size[-1]
    y = 0.0
    for row, values in enumerate(_rows(x, window)):
        taps = slice(row * width, (row + 1) * width)
        row_weights = weights[(slice(None),) * window.tap_axis + (taps,)]
        # ``values`` has the tap axis after the spatial axes, a channels-first kernel before them.
        if window.data_format != CHANNELS_LAST:
            row_weights = ops.moveaxis(row_weights, window.tap_axis, -1)
        row_weights = ops.expand_dims(row_weights, _group_channel_axis(window))
        y = y + ops.sum(row_weights * values, axis=_tap_axis(window))
    return ops.cast(merge_output(y, window), x.dtype)


def kernel_grad(x, dy, problem):
    """dkernel[b, p, tap, group] = sum over channels c: dy[b, p, c] * x[b, tap of window p, c]."""
    ops, window = namespace(x), problem.window
    grouped_dy = ops.expand_dims(split_output(to_accumulation_dtype(dy), window), _tap_axis(window))
    axis = _group_channel_axis(window)
    rows = [ops.sum(grouped_dy * values, axis=axis) for values in _rows(x, window)]
    if window.data_format != CHANNELS_LAST:
        rows = [ops.moveaxis(row, -1, window.tap_axis) for row in rows]
    kernel = merge_kernel(ops.concatenate(rows, axis=window.tap_axis), window)
    return ops.cast(kernel, x.dtype)


def _rows(x, window):
    """For each row of taps (taps that differ in the last dimension only), the input values at every
    output position: a grouped tensor with the row's taps as an additional, last spatial axis."""
    x_sizes = spatial_shape(x, window)
    count = window.window_counts(x_sizes)
    padded = pad_and_split(to_accumulation_dtype(x), x_sizes, window)
    last = _tap_axis(window) - 1
    width = window.kernel_size[-1]
    columns = namespace(x).stack(
        [
            strided_slice(padded, offset[-1:], window.strides[-1:], count[-1:], window, last)
            for offset in window.tap_offsets[:width]
        ],
        axis=last + 1,
    )
    for offset in window.tap_offsets[::width]:
        yield strided_slice(columns, offset[:-1], window.strides[:-1], count[:-1], window)


def _tap_axis(window) -> int:
    return spatial_axis(window) + window.rank


def _group_channel_axis(window) -> int:
    """The axis of the channels of a group in a tensor of ``_rows``."""
    return window.group_channel_axis + (1 if window.data_format == CHANNELS_LAST else 0)
