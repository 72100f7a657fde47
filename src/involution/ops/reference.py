"""Reference implementation: the formula tap by tap, slow and easy to verify."""

from involution.ops import tensor_utils
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import (
    insert_zeros,
    merge_groups,
    merge_kernel,
    merge_output,
    pad_and_split,
    pad_spatial,
    pads,
    spatial_shape,
    split_kernel,
    split_output,
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
        split_kernel(to_accumulation_dtype(kernel), window),
    )
    y, count = 0.0, window.window_counts(x_sizes)
    for tap, offset in enumerate(window.tap_offsets):
        values = strided_slice(padded, offset, window.strides, count, window)
        y = y + tap_kernel(weights, tap, window) * values
    return namespace(x).cast(merge_output(y, window), x.dtype)


def input_grad(kernel, dy, x_sizes, problem):
    """dx[b, q, c] = sum over tap and p, where q is the tap of the window of p, of
    kernel[b, p, tap, group of c] * dy[b, p, c]."""
    ops, window = namespace(kernel), problem.window
    weights, grouped_dy = (
        split_kernel(to_accumulation_dtype(kernel), window),
        split_output(to_accumulation_dtype(dy), window),
    )
    padded = 0.0
    for tap, offset in enumerate(window.tap_offsets):
        terms = tap_kernel(weights, tap, window) * grouped_dy
        if window.phases > 1:
            terms = ops.sum(terms, window.channel_axis, keepdims=True)
        rest = [(o, last - o) for o, last in zip(offset, window.last_offset, strict=True)]
        padded = padded + pad_spatial(insert_zeros(terms, window), rest, window)
    before = [before for before, _ in pads(x_sizes, window)]
    dx = strided_slice(padded, before, (1,) * window.rank, x_sizes, window)
    return ops.cast(merge_groups(dx, window), dy.dtype)


def kernel_grad(x, dy, problem):
    """dkernel[b, p, tap, group] = sum over channels c: dy[b, p, c] * x[b, tap of window p, c]."""
    ops, window = namespace(x), problem.window
    x_sizes = spatial_shape(x, window)
    padded, grouped_dy = (
        pad_and_split(to_accumulation_dtype(x), x_sizes, window),
        split_output(to_accumulation_dtype(dy), window),
    )
    taps = [
        ops.sum(
            grouped_dy
            * strided_slice(padded, offset, window.strides, window.window_counts(x_sizes), window),
            axis=window.group_channel_axis,
        )
        for offset in window.tap_offsets
    ]
    kernel = merge_kernel(ops.stack(taps, axis=window.tap_axis), window)
    return ops.cast(kernel, x.dtype)
