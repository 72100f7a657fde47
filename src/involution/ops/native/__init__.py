"""The compiled kernels for CPUs, by each framework's own way of calling foreign code.

The core (``involution/native``) has the three members of the family in ``gradients.py``. A binding
is a module with ``refusal(problem)``, ``call(member, geometry, sizes, a, b)``, and ``call_fused``
for the family in ``fused_gradients.py``.
"""

import keras

from involution.ops.autodiff import KERNEL, OUTPUT, traced
from involution.ops.native import library
from involution.ops.tensor_utils import spatial_shape

BINDINGS = ("tensorflow", "jax", "torch")


def unsupported_reason(problem) -> str | None:
    _, reason = library.core()
    if reason is not None:
        return reason
    backend = keras.config.backend()
    if backend not in BINDINGS:
        return f"it has no binding for the backend {backend}"
    if reason := traced():
        return reason
    g = problem.window
    pads = [] if isinstance(g.padding, str) else [p for pair in g.padding for p in pair]
    if max(*g.last_offset, *g.strides, *pads) > library.LARGEST:
        return f"a window's reach, a stride or a padding is above {library.LARGEST}"
    return _binding(backend).unsupported_reason(problem)


def deprioritize_reason(problem) -> str | None:
    """Why the next implementation is faster, or None where this one is."""
    if keras.config.backend() != "jax":
        return None
    return _binding("jax").deprioritize_reason(problem)


def apply(x, kernel, problem):
    return _call(OUTPUT, x, kernel, problem.window)


def products(x, y, problem):
    return _call(KERNEL, x, y, problem.window)


def call_fused(member, g, x_sizes, *arguments):
    """A member of the family in ``fused_gradients.py``."""
    return _binding(keras.config.backend()).call_fused(member, g, x_sizes, *arguments)


def _call(member, a, b, g):
    return _binding(keras.config.backend()).call(member, g, spatial_shape(a, g), a, b)


def _binding(backend):
    if backend == "tensorflow":
        from involution.ops.native import tensorflow

        return tensorflow
    if backend == "jax":
        from involution.ops.native import jax

        return jax
    from involution.ops.native import torch

    return torch
