"""CUDA kernels on PyTorch, compiled by Triton at their first call.

The fused forward pass generates the involution kernels in registers. The fused gradients store the
involution kernels of one chunk of the batch at a time: cuBLAS computes the matrix products, and the
stored kernels stay in L2.
"""

import importlib.util
import os

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD, tracing_reason
from involution.ops.tensor_utils import spatial_shape

# Compute capabilities: the lowest that Triton supports, and the lowest with bfloat16.
MIN_CAPABILITY, MIN_BF16_CAPABILITY = (7, 5), (8, 0)


def is_interpreter() -> bool:
    """Whether Triton interprets its kernels, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(problem) -> str | None:
    if problem.framework != "torch":
        return "it requires PyTorch tensors"
    # The cheapest check first: it runs in every call.
    if problem.device != "cuda" and not is_interpreter():
        return f"it requires CUDA tensors; the device is {problem.device or 'unknown'}"
    if reason := tracing_reason(problem.framework):
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if is_interpreter():
        return None
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (MIN_BF16_CAPABILITY if problem.dtype == "bfloat16" else MIN_CAPABILITY):
            return f"compute capability {'.'.join(map(str, capability))} of the device is too low"
    return None


def fused_unsupported_reason(problem) -> str | None:
    if problem.dtype == "float64":
        return "its matrix products do not support float64"
    return unsupported_reason(problem)


def apply(x, kernel, problem):
    return _operations().call(FORWARD, problem.window, spatial_shape(x, problem.window), x, kernel)


def input_grad(kernel, dy, x_sizes, problem):
    return _operations().call(INPUT_GRAD, problem.window, x_sizes, kernel, dy)


def kernel_grad(x, dy, problem):
    return _operations().call(KERNEL_GRAD, problem.window, spatial_shape(x, problem.window), x, dy)


def call_fused(pass_, window, x_sizes, *arguments):
    """A fused pass of ``autodiff.fused``."""
    return _operations().call_fused(pass_, window, x_sizes, *arguments)


def _operations():
    from involution.ops.triton import launch

    return launch.operations
