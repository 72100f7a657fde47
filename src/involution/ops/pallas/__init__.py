"""GPU kernels on JAX, compiled through Pallas and Triton at their first call.

Selected by name only: no device has measured yet whether they are faster than ``taps``.
"""

import math

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.pallas.interpreter import is_interpreter
from involution.ops.tensor_utils import spatial_shape

# Offsets are 32-bit integers, JAX's default.
MAX_ELEMENTS = 2**31 - 1


def unsupported_reason(problem) -> str | None:
    if problem.framework != "jax":
        return "it requires JAX arrays"
    import jax

    # What `jax.default_device` and `keras.device` set: a device, or the name of a platform. JAX
    # defines the attribute when it is imported, which the type checker does not see.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform != "gpu" and not is_interpreter():
        return f"it requires a GPU, and JAX's default device is a {platform}"
    shapes = (problem.x_shape, problem.output_shape, problem.kernel_shape)
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return "it requires known sizes"
    largest = max(map(math.prod, shapes))
    if largest > MAX_ELEMENTS:
        return f"a tensor has {largest} elements, more than 2**31 - 1"
    return None


def apply(x, kernel, problem):
    return _call(FORWARD, problem.window, spatial_shape(x, problem.window), x, kernel)


def input_grad(kernel, dy, x_sizes, problem):
    return _call(INPUT_GRAD, problem.window, x_sizes, kernel, dy)


def kernel_grad(x, dy, problem):
    return _call(KERNEL_GRAD, problem.window, spatial_shape(x, problem.window), x, dy)


def _call(pass_, window, x_sizes, a, b):
    from involution.ops.pallas import kernels

    return kernels.call(pass_, window, tuple(x_sizes), a, b)
