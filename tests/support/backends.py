"""What the tests ask of whichever framework runs: arrays in and out, and gradients."""

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

# Each against the next: every pair meets once where all three are tested.
_AROUND = ("tensorflow", "jax", "torch", "tensorflow", "jax")
_NEXT, _LAST = _AROUND[_AROUND.index(BACKEND) + 1 :][:2]
each_other_backend = pytest.mark.parametrize(
    "other", [_NEXT, pytest.param(_LAST, marks=pytest.mark.slow)]
)


def thin(cases, step):
    """Parameters of a test. On JAX all but every ``step``-th are slow: XLA compiles each for about
    a second."""
    return [
        pytest.param(case, marks=pytest.mark.slow if BACKEND == "jax" and i % step else ())
        for i, case in enumerate(cases)
    ]


def slow_except(*backends):
    """Marks a test as slow on other backends: `make test` runs it on these only."""
    return pytest.mark.slow if BACKEND not in backends else lambda test: test


def missing():
    """Why the package was installed without ``native``; None where it was built.

    A library that is there and does not work is built: its tests fail.
    """
    _, reason = library.core()
    if reason is None:
        _, reason = library.binding(BACKEND)
        told = library.why_missing(BACKEND)
    else:
        told = library.why_missing()
    return reason if reason and told and told in reason else None


KNOWN = ("triton", "native", "taps", "reference")
# Without a CUDA device; test_triton.py has the tests of `triton`.
IMPLEMENTATIONS = KNOWN[1:] if missing() is None else KNOWN[2:]


def numpy(tensor):
    with warnings.catch_warnings():
        # Keras copies PyTorch's tensors in a manner that NumPy 2.4 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(keras.ops.convert_to_numpy(tensor))


def tensors(arrays, dtype):
    return [keras.ops.convert_to_tensor(a, dtype) for a in arrays]


def exact(tensor):
    """As NumPy's float64, whatever the type."""
    return numpy(keras.ops.cast(tensor, "float64"))


def operation(call, implementation):
    """The operator with the arguments of an ``oracle.Call``."""

    def apply(x, kernel):
        return involution.ops.involution(x, kernel, **call.arguments, implementation=implementation)

    return apply


def assert_equals_oracle(call, y, x, kernel):
    """To half an ulp and what a sum in float32, or in float64 for float64, may lose.

    Returns the largest error as a part of what it may be.
    """
    dtype = keras.backend.standardize_dtype(x.dtype)
    assert tuple(y.shape) == call.output_shape
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    expected, magnitude = call.involution(exact(x), exact(kernel))
    error, bound = np.abs(exact(y) - expected), error_bound(expected, magnitude, call.taps, dtype)
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
    """The gradient of a scalar function of tensors, as a function that has a gradient in turn."""
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


def mapped(function, axes):
    """``function`` over an axis more of each argument whose axis is not None."""
    if BACKEND == "jax":
        import jax

        return jax.vmap(function, axes)
    if BACKEND == "torch":
        import torch

        return torch.func.vmap(function, axes)
    import tensorflow as tf

    def over_first(*tensors):
        # TensorFlow maps over first axes alone.
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


def forward_mode(function, arguments, tangents):
    """The derivative of ``function`` along ``tangents``, computed together with its value."""
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
    """``function`` as a compiled program where the framework has one: a second way to run it.

    ``shapes`` with None for the sizes that the program, in float64, shall not know; TensorFlow
    alone has such programs.
    """
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, shapes and [tf.TensorSpec(s, "float64") for s in shapes])
    return function


def fresh_process(code, backend=BACKEND):
    """Standard output of ``code``, run by itself with the modules that the tests see."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_ENABLE_X64": "1",  # As conftest.py has it.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
