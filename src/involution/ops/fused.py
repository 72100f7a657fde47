"""Kernels generated where they are used: the compiled core, or a CUDA device's program, makes a few
places' kernels from their hidden channels, applies them while it has them, and forgets them.
"""

import math

from involution.ops import native, triton
from involution.ops.autodiff import OUTPUT
from involution.ops.geometry import CHANNELS_LAST
from involution.ops.tensor_utils import sizes


def refusal(problem) -> str | None:
    if problem.hidden is None:
        return "it generates the kernels, and these are given"
    if problem.geometry.data_format != CHANNELS_LAST:
        return "its channels are last"
    if triton.fused_refusal(problem) is None:
        return None
    return native.refusal(problem)


# As measured on TensorFlow and PyTorch, and on JAX where XLA makes one loop of two steps.
FEWEST_CHANNELS = 4


def reluctance(problem) -> str | None:
    """Why storing the kernels is faster, or None where this is."""
    g = problem.geometry
    if problem.x_shape[g.channel_axis] < FEWEST_CHANNELS:
        return f"of fewer than {FEWEST_CHANNELS} channels a vector of the processor holds too few"
    places = g.output_sizes(g.spatial(problem.x_shape))
    if None not in places and math.prod(places) < problem.hidden:
        return "of fewer places than hidden channels the weight's gradient takes most of the time"
    return None


def apply(x, generator, problem):
    """``generator`` is (hidden, weight, bias)."""
    g = problem.geometry
    maker = triton if triton.fused_refusal(problem) is None else native
    y, _ = maker.call_fused(OUTPUT, g, sizes(x, g), x, *generator)
    return y
