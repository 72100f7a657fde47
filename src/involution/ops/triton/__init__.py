"""Kernels for CUDA devices, on PyTorch, compiled by Triton when they are first called.

Where kernels are generated, the output's program makes them in registers. The gradients take two
steps on a few samples at a time: the products of matrices are the device's own library's, and what
lies between stays in its cache.
"""

import importlib.util
import os

import keras

from involution.ops.autodiff import KERNEL, OUTPUT, traced
from involution.ops.tensor_utils import spatial_shape

# The earliest generation of devices that Triton compiles for, and the first with bfloat16.
OLDEST, FIRST_BFLOAT16 = (7, 5), (8, 0)


def interpreting() -> bool:
    """Whether Triton was told to interpret its programs, on any device: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(problem) -> str | None:
    if keras.config.backend() != "torch":
        return "it is for PyTorch"
    if reason := traced():
        return reason
    # First what costs least: every call asks.
    if problem.device != "cuda" and not interpreting():
        return f"it runs on CUDA devices, and the tensors are on {problem.device or 'none yet'}"
    if importlib.util.find_spec("triton") is None:
        return "there is no module triton"
    if interpreting():
        return None
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is None:
        generation = torch.cuda.get_device_capability()
        if generation < (FIRST_BFLOAT16 if problem.dtype == "bfloat16" else OLDEST):
            return f"the device is of generation {'.'.join(map(str, generation))}: too old"
    return None


def fused_unsupported_reason(problem) -> str | None:
    if problem.dtype == "float64":
        return "its products of matrices are not in float64"
    return unsupported_reason(problem)


def apply(x, kernel, problem):
    return _operations().call(OUTPUT, problem.window, spatial_shape(x, problem.window), x, kernel)


def products(x, y, problem):
    return _operations().call(KERNEL, problem.window, spatial_shape(x, problem.window), x, y)


def call_fused(member, g, x_sizes, *arguments):
    """A member of the family in ``fused_gradients.py``."""
    return _operations().call_fused(member, g, x_sizes, *arguments)


def _operations():
    from involution.ops.triton import launch

    return launch.operations
