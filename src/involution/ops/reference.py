"""The formula, one tap after another, in ``keras.ops``: slow, and short enough to check by eye."""

from keras import ops

from involution.ops import tensor_utils
from involution.ops.tensor_utils import (
    merge_groups,
    padded_view,
    sizes,
    split_groups,
    tap_kernel,
    wide,
    window,
)


def refusal(problem) -> str | None:
    """Runs everywhere, if its memory holds the padding."""
    return tensor_utils.refusal(problem)


def apply(x, kernel, problem):
    """Y[b, p, c] = sum over taps of kernel[b, p, tap, group of c] * X[b, window of p at tap, c]."""
    g = problem.geometry
    x_sizes = sizes(x, g)
    padded, weights = padded_view(wide(x), x_sizes, g), wide(kernel)
    y = 0.0
    for tap, offset in enumerate(g.tap_offsets):
        here = window(padded, offset, g.strides, g.output_sizes(x_sizes), g)
        y = y + tap_kernel(weights, tap, g) * here
    return ops.cast(merge_groups(y, g), x.dtype)


def products(x, y, problem):
    """P[b, p, tap, group] = sum over channels of Y[b, p, c] * X[b, window of p at tap, c]."""
    g = problem.geometry
    x_sizes = sizes(x, g)
    padded, seen = padded_view(wide(x), x_sizes, g), split_groups(wide(y), g)
    taps = [
        ops.sum(
            seen * window(padded, offset, g.strides, g.output_sizes(x_sizes), g),
            axis=g.member_axis,
        )
        for offset in g.tap_offsets
    ]
    return ops.cast(ops.stack(taps, axis=g.tap_axis), x.dtype)
