"""Fused implementation: generates kernels tile by tile where they are applied, and stores none."""

import math

from involution.ops import native, triton
from involution.ops.autodiff import FORWARD
from involution.ops.frameworks import is_exporting
from involution.ops.tensor_utils import spatial_shape
from involution.ops.validation import CAUSAL, CHANNELS_LAST


def unsupported_reason(problem) -> str | None:
    if problem.hidden_channels is None:
        return "it generates the kernels itself, but this call has stored kernels"
    if problem.window.data_format != CHANNELS_LAST:
        return "it requires channels_last"
    if triton.fused_unsupported_reason(problem) is None:
        return None
    return native.unsupported_reason(problem)


# Measured on TensorFlow, PyTorch, and JAX, where XLA compiles the unfused form to one loop.
MIN_CHANNELS = 4


def deprioritize_reason(problem) -> str | None:
    """Why storing the kernels is faster, or None."""
    window = problem.window
    if problem.x_shape[window.channel_axis] < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} channels leave vector lanes empty"
    if window.padding == CAUSAL:
        return None  # whatever the length: steps of a sequence give the bits of the whole
    sizes = window.output_sizes(window.spatial(problem.x_shape))
    if None not in sizes and not is_exporting() and math.prod(sizes) < problem.hidden_channels:
        return "with fewer positions than hidden channels the weight's gradient dominates"
    return None


def apply_generated(x, hidden, weight, bias, problem):
    """The output with the kernels ``hidden @ weight + bias``."""
    window = problem.window
    module = triton if triton.fused_unsupported_reason(problem) is None else native
    y, _ = module.call_fused(FORWARD, window, spatial_shape(x, window), x, hidden, weight, bias)
    return y
