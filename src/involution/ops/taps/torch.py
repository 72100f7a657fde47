"""The passes in PyTorch."""

from involution.ops.autodiff.torch import compiled_transform, differentiable, nested_forward_mode
from involution.ops.taps.passes import compute

_differentiable = differentiable(compute)


def call(pass_, window, x_sizes, a, b):
    if nested_forward_mode() or compiled_transform():
        return compute(pass_, window, x_sizes, a, b)
    return _differentiable(pass_, window, x_sizes, a, b)
