"""Compiled CPU kernels, called through each framework's interface for custom ops.

The core (``csrc``) computes the three passes of ``autodiff`` and their fused forms. A binding is
a module with ``unsupported_reason(problem)``, ``call(pass_, window, sizes, a, b)`` for the passes
and ``call_fused(pass_, window, sizes, *arguments)`` for the fused ones.
"""

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD, tracing_reason
from involution.ops.frameworks import FRAMEWORKS, framework_of
from involution.ops.native import library
from involution.ops.tensor_utils import spatial_shape


def unsupported_reason(problem) -> str | None:
    _, reason = library.core()
    if reason is not None:
        return reason
    if problem.framework not in FRAMEWORKS:
        return f"it has no binding for the backend {problem.framework}"
    if reason := tracing_reason(problem.framework):
        return reason
    window = problem.window
    pads = [] if isinstance(window.padding, str) else [p for pair in window.padding for p in pair]
    if max(*window.last_offset, *window.strides, *window.upsampling, *pads) > library.MAX_STEP:
        return f"a window's extent, stride, padding or upsampling exceeds {library.MAX_STEP}"
    return _binding(problem.framework).unsupported_reason(problem)


def deprioritize_reason(problem) -> str | None:
    """Why the next implementation is faster, or None."""
    if problem.framework != "jax":
        return None
    return _binding("jax").deprioritize_reason(problem)


def apply(x, kernel, problem):
    return _call(FORWARD, x, kernel, problem.window)


def input_grad(kernel, dy, x_sizes, problem):
    return _binding(framework_of(kernel)).call(INPUT_GRAD, problem.window, x_sizes, kernel, dy)


def kernel_grad(x, dy, problem):
    return _call(KERNEL_GRAD, x, dy, problem.window)


def call_fused(pass_, window, x_sizes, *arguments):
    """A fused pass of ``autodiff.fused``."""
    return _binding(framework_of(arguments[0])).call_fused(pass_, window, x_sizes, *arguments)


def _call(pass_, a, b, window):
    return _binding(framework_of(a)).call(pass_, window, spatial_shape(a, window), a, b)


def _binding(framework):
    if framework == "tensorflow":
        from involution.ops.native import tensorflow

        return tensorflow
    if framework == "jax":
        from involution.ops.native import jax

        return jax
    from involution.ops.native import torch

    return torch
