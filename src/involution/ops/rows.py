"""Row-unrolled implementation, for exporters: one sum for each row of taps.

Exporters and runtimes pay for each operation, and for 7x7 windows this has a sixth of those of
``reference``. It is selected by name only: under XLA the order of its sums depends on the batch
size.
"""

from keras import ops

from involution.ops import tensor_utils
from involution.ops.tensor_utils import (
    merge_groups,
    pad_and_split,
    spatial_axis,
    spatial_shape,
    split_groups,
    strided_slice,
    to_accumulation_dtype,
)
from involution.ops.validation import CHANNELS_LAST


def unsupported_reason(problem) -> str | None:
    if problem.window.rank == 3:
        return "XLA crashes when it compiles three-dimensional rows"
    return tensor_utils.unsupported_reason(problem)


def apply(x, kernel, problem):
    """Y[b, p, c] = sum over taps of kernel[b, p, tap, group of c] * X[b, window of p at tap, c]."""
    window = problem.window
    weights, width = to_accumulation_dtype(kernel), window.kernel_size[-1]
    y = 0.0
    for row, seen in enumerate(_rows(x, window)):
        taps = slice(row * width, (row + 1) * width)
        here = weights[(slice(None),) * window.tap_axis + (taps,)]
        # The tap axis comes last of the spatial ones; with channels first it precedes the groups.
        here = (
            here if window.data_format == CHANNELS_LAST else ops.moveaxis(here, window.tap_axis, -1)
        )
        y = y + ops.sum(ops.expand_dims(here, _member_axis(window)) * seen, axis=_tap_axis(window))
    return ops.cast(merge_groups(y, window), x.dtype)


def kernel_grad(x, dy, problem):
    """P[b, p, tap, group] = sum over channels of Y[b, p, c] * X[b, window of p at tap, c]."""
    window = problem.window
    own = ops.expand_dims(split_groups(to_accumulation_dtype(dy), window), _tap_axis(window))
    rows = [ops.sum(own * seen, axis=_member_axis(window)) for seen in _rows(x, window)]
    if window.data_format != CHANNELS_LAST:
        rows = [ops.moveaxis(row, -1, window.tap_axis) for row in rows]
    return ops.cast(ops.concatenate(rows, axis=window.tap_axis), x.dtype)


def _rows(x, window):
    """For each row of taps (those that differ in the last dimension only), the input values at
    every position: shaped as by ``split_groups``, with the row's taps as one more spatial axis."""
    x_sizes = spatial_shape(x, window)
    count = window.output_sizes(x_sizes)
    padded = pad_and_split(to_accumulation_dtype(x), x_sizes, window)
    last = _tap_axis(window) - 1
    width = window.kernel_size[-1]
    columns = ops.stack(
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


def _member_axis(window) -> int:
    """The axis of the channels of a group, when the taps have an axis after the spatial ones."""
    return window.group_channel_axis + (1 if window.data_format == CHANNELS_LAST else 0)
