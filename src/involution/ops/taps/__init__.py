"""Shift-and-multiply implementation: portable, with gradients written in the same form.

A module of each framework has ``call(pass_, window, sizes, a, b)``: the passes of ``autodiff``,
compiled if the framework has a compiler, and with derivatives.
"""

from involution.ops import tensor_utils
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD, tracing_reason
from involution.ops.frameworks import FRAMEWORKS, framework_of
from involution.ops.taps.passes import compute
from involution.ops.tensor_utils import spatial_shape

__all__ = ["apply", "call", "compute", "input_grad", "kernel_grad", "unsupported_reason"]


def unsupported_reason(problem) -> str | None:
    if problem.framework not in FRAMEWORKS:
        supported = ", ".join(FRAMEWORKS)
        return f"its gradients need one of the backends {supported}, not {problem.framework}"
    return tracing_reason(problem.framework) or tensor_utils.unsupported_reason(problem)


def apply(x, kernel, problem):
    window = problem.window
    return call(FORWARD, window, spatial_shape(x, window), x, kernel)


def input_grad(kernel, dy, x_sizes, problem):
    return call(INPUT_GRAD, problem.window, x_sizes, kernel, dy)


def kernel_grad(x, dy, problem):
    window = problem.window
    return call(KERNEL_GRAD, window, spatial_shape(x, window), x, dy)


def call(pass_, window, x_sizes, a, b):
    """One pass of ``autodiff``, with its derivatives."""
    return _binding(framework_of(a)).call(pass_, window, x_sizes, a, b)


def _binding(framework):
    if framework == "tensorflow":
        from involution.ops.taps import tensorflow

        return tensorflow
    if framework == "jax":
        from involution.ops.taps import jax

        return jax
    from involution.ops.taps import torch

    return torch
