"""The compiled kernels for CPUs, by each framework's own way of calling foreign code.

The core (``involution/native``) has the three members of the family in ``gradients.py``. A binding
is a module with ``refusal(problem)``, ``call(member, geometry, sizes, a, b)``, and ``call_fused``
for the family in ``fused_gradients.py``.
"""

import keras

from involution.ops import native_library
from involution.ops.gradients import KERNEL, OUTPUT, traced
from involution.ops.views import sizes

BINDINGS = ("tensorflow", "jax", "torch")


def refusal(problem) -> str | None:
    _, reason = native_library.core()
    if reason is not None:
        return reason
    backend = keras.config.backend()
    if backend not in BINDINGS:
        return f"it has no binding for the backend {backend}"
    if reason := traced():
        return reason
    g = problem.geometry
    pads = [] if isinstance(g.padding, str) else [p for pair in g.padding for p in pair]
    if max(*g.last_offset, *g.strides, *pads) > native_library.LARGEST:
        return f"a window's reach, a stride or a padding is above {native_library.LARGEST}"
    return _binding(backend).refusal(problem)


def reluctance(problem) -> str | None:
    """Why the next implementation is faster, or None where this one is."""
    if keras.config.backend() != "jax":
        return None
    return _binding("jax").reluctance(problem)


def apply(x, kernel, problem):
    return _call(OUTPUT, x, kernel, problem.geometry)


def products(x, y, problem):
    return _call(KERNEL, x, y, problem.geometry)


def call_fused(member, g, x_sizes, *arguments):
    """A member of the family in ``fused_gradients.py``."""
    return _binding(keras.config.backend()).call_fused(member, g, x_sizes, *arguments)


def _call(member, a, b, g):
    return _binding(keras.config.backend()).call(member, g, sizes(a, g), a, b)


def _binding(backend):
    if backend == "tensorflow":
        from involution.ops import native_tensorflow

        return native_tensorflow
    if backend == "jax":
        from involution.ops import native_jax

        return native_jax
    from involution.ops import native_torch

    return native_torch
