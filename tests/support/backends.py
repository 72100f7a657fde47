"""Backend-independent helpers: conversions to and from NumPy, gradients, vmap, compilation."""

import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

import involution
from involution.ops.native import library
from tests.support.oracle import error_bound

BACKEND = keras.config.backend()

# `make test` runs these tests on the last backend only, which is thus compared with both others.
each_other_backend = pytest.mark.parametrize(
    "other", [name for name in ("tensorflow", "jax", "torch") if name != BACKEND]
)


def mostly_slow_on_jax(cases, step):
    """Parameters of a test. On JAX only every ``step``-th is not marked slow: XLA compiles each for
    about a second."""
    return [
        pytest.param(case, marks=pytest.mark.slow if BACKEND == "jax" and i % step else ())
        for i, case in enumerate(cases)
    ]


def slow_except(*backends):
    """Marks a test as slow on all other backends: `make test` runs it on these only."""
    return pytest.mark.slow if BACKEND not in backends else lambda test: test


def native_missing_reason():
    """The build error, if the package was installed without ``native``; otherwise None.

    None for a library that was built and does not load, so that its tests fail.
    """
    _, reason = library.core()
    if reason is None:
        _, reason = library.binding(BACKEND)
        build_error = library.why_missing(BACKEND)
    else:
        build_error = library.why_missing()
    return reason if reason and build_error and build_error in reason else None


ALL_IMPLEMENTATIONS = ("triton", "native", "taps", "reference")
# Implementations that run without a CUDA device; test_triton.py tests `triton`.
IMPLEMENTATIONS = ALL_IMPLEMENTATIONS[1 if native_missing_reason() is None else 2 :]
requires_native = pytest.mark.skipif(
    "native" not in IMPLEMENTATIONS, reason=str(native_missing_reason())
)


def numpy(tensor):
    with warnings.catch_warnings():
        # Keras's copy of a PyTorch tensor causes a deprecation warning in NumPy 2.4.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(keras.ops.convert_to_numpy(tensor))


def tensors(arrays, dtype):
    return [keras.ops.convert_to_tensor(a, dtype) for a in arrays]


def to_float64(tensor):
    """A float64 NumPy array. The cast is exact; NumPy itself has no bfloat16."""
    return numpy(keras.ops.cast(tensor, "float64"))


def operation(call, implementation):
    """The operator as a function of x and kernel, with the arguments of an ``oracle.Call``."""

    def apply(x, kernel):
        return involution.ops.involution(x, kernel, **call.arguments, implementation=implementation)

    return apply


def assert_equals_oracle(call, y, x, kernel):
    """Asserts that the error of ``y`` is within ``oracle.error_bound``.

    Returns the largest ratio of the error to its bound.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    assert tuple(y.shape) == call.output_shape
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    expected, magnitude = call.involution(to_float64(x), to_float64(kernel))
    error = np.abs(to_float64(y) - expected)
    bound = error_bound(expected, magnitude, call.taps, dtype)
    assert (error <= bound).all()
    return np.divide(error, bound, where=bound > 0, out=error).max(initial=0)


def gradients(function, arguments, cotangent):
    """Gradients of sum(function(*arguments) * cotangent) for every argument, as NumPy arrays."""
    if BACKEND == "jax":
        import jax

        _, pullback = jax.vjp(function, *map(jax.numpy.asarray, arguments))
        return [np.asarray(g) for g in pullback(jax.numpy.asarray(cotangent))]
    if BACKEND == "torch":
        import torch

        tensors = [torch.tensor(a, requires_grad=True) for a in arguments]
        return [
            g.numpy()
            for g in torch.autograd.grad(function(*tensors), tensors, torch.tensor(cotangent))
        ]
    import tensorflow as tf

    tensors = [tf.constant(a) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    return [g.numpy() for g in tape.gradient(y, tensors, tf.constant(cotangent))]


def grad(function):
    """The gradient of a scalar function of tensors, as a differentiable function."""
    if BACKEND == "jax":
        import jax

        return lambda *tensors: jax.grad(function, range(len(tensors)))(*tensors)
    if BACKEND == "torch":
        import torch

        def gradient(*tensors):
            tensors = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(function(*tensors), tensors, create_graph=True)

        return gradient
    import tensorflow as tf

    def gradient(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
        return tape.gradient(y, tensors)

    return gradient


def vmap(function, axes):
    """``function`` mapped over the given axis of each argument, or none if the axis is None."""
    if BACKEND == "jax":
        import jax

        return jax.vmap(function, axes)
    if BACKEND == "torch":
        import torch

        return torch.func.vmap(function, axes)
    import tensorflow as tf

    def over_first(*tensors):
        # TensorFlow's vectorized_map maps over first axes only.
        first = [
            tf.experimental.numpy.moveaxis(t, axis, 0)
            for t, axis in zip(tensors, axes, strict=True)
            if axis is not None
        ]

        def one(parts):
            parts = iter(parts)
            pairs = zip(tensors, axes, strict=True)
            return function(*(t if axis is None else next(parts) for t, axis in pairs))

        return tf.vectorized_map(one, first)

    return over_first


def jvp(function, arguments, tangents):
    """The Jacobian-vector product of ``function``, by forward-mode differentiation."""
    if BACKEND == "jax":
        import jax

        return jax.jvp(function, arguments, tangents)[1]
    if BACKEND == "torch":
        import torch

        return torch.func.jvp(function, arguments, tangents)[1]
    import tensorflow as tf

    with tf.autodiff.ForwardAccumulator(arguments, tangents) as accumulator:
        y = function(*arguments)
    return accumulator.jvp(y)


def in_graph(function, shapes=None):
    """``function`` compiled by ``jax.jit`` or ``tf.function``; unchanged on PyTorch.

    ``shapes``: shapes of float64 arguments, with None for dynamic sizes, which only TensorFlow
    supports; JAX ignores them.
    """
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, shapes and [tf.TensorSpec(s, "float64") for s in shapes])
    return function


def fresh_process(code, backend=BACKEND):
    """Standard output of ``code``, which runs in a new process with this process's ``sys.path``."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_ENABLE_X64": "1",  # as in conftest.py
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
