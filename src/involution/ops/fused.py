"""Kernels generated where they are used: the compiled core, or a CUDA device's program, makes a few
places' kernels from their hidden channels, applies them while it has them, and forgets them.
"""

import math

from involution.ops import native, triton
from involution.ops.autodiff import OUTPUT
from involution.ops.tensor_utils import spatial_shape
from involution.ops.validation import CHANNELS_LAST


def unsupported_reason(problem) -> str | None:
    if problem.hidden is None:
        return "it generates the kernels, and these are given"
    if problem.window.data_format != CHANNELS_LAST:
        return "its channels are last"
    if triton.fused_unsupported_reason(problem) is None:
        return None
    return native.unsupported_reason(problem)


# As measured on TensorFlow and PyTorch, and on JAX where XLA makes one loop of two steps.
FEWEST_CHANNELS = 4


def deprioritize_reason(problem) -> str | None:
    """Why storing the kernels is faster, or None where this is."""
    g = problem.window
    if problem.x_shape[g.channel_axis] < FEWEST_CHANNELS:
        return f"of fewer than {FEWEST_CHANNELS} channels a vector of the processor holds too few"
    places = g.output_sizes(g.spatial(problem.x_shape))
    if None not in places and math.prod(places) < problem.hidden:
        return "of fewer places than hidden channels the weight's gradient takes most of the time"
    return None


def apply(x, generator, problem):
    """``generator`` is (hidden, weight, bias)."""
    g = problem.window
    maker = triton if triton.fused_unsupported_reason(problem) is None else native
    y, _ = maker.call_fused(OUTPUT, g, spatial_shape(x, g), x, *generator)
    return y
