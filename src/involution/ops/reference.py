"""Reference implementation: the formula tap by tap, slow and easy to verify."""

from involution.ops import tensor_utils
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import (
    merge_groups,
    pad_and_split,
    spatial_shape,
    split_groups,
    strided_slice,
    tap_kernel,
    to_accumulation_dtype,
)


def unsupported_reason(problem) -> str | None:
    """Runs on every backend and device."""
    return tensor_utils.unsupported_reason(problem)


def apply(x, kernel, problem):
    """Y[b, p, c] = sum over taps of kernel[b, p, tap, group of c] * X[b, window of p at tap, c]."""
    window = problem.window
    x_sizes = spatial_shape(x, window)
    padded, weights = (
        pad_and_split(to_accumulation_dtype(x), x_sizes, window),
        to_accumulation_dtype(kernel),
    )
    y = 0.0
    for tap, offset in enumerate(window.tap_offsets):
        values = strided_slice(padded, offset, window.strides, window.output_sizes(x_sizes), window)
        y = y + tap_kernel(weights, tap, window) * values
    return namespace(x).cast(merge_groups(y, window), x.dtype)


def kernel_grad(x, dy, problem):
    """dkernel[b, p, tap, group] = sum over channels c: dy[b, p, c] * x[b, tap of window p, c]."""
    ops, window = namespace(x), problem.window
    x_sizes = spatial_shape(x, window)
    padded, grouped_dy = (
        pad_and_split(to_accumulation_dtype(x), x_sizes, window),
        split_groups(to_accumulation_dtype(dy), window),
    )
    taps = [
        ops.sum(
            grouped_dy
            * strided_slice(padded, offset, window.strides, window.output_sizes(x_sizes), window),
            axis=window.group_channel_axis,
        )
        for offset in window.tap_offsets
    ]
    return ops.cast(ops.stack(taps, axis=window.tap_axis), x.dtype)
