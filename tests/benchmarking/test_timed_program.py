"""The program that repeats a call executes every repetition, on each backend."""

import functools

import keras
import numpy as np
import pytest

from involution.benchmarking.timed_program import repeat
from tests.support.backends import BACKEND, numpy


def pure(function, x):
    """``function`` of NumPy arrays as a pure operation, which compilers may deduplicate."""
    if BACKEND == "jax":
        import jax

        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.numpy_function(function, [x], x.dtype, stateful=False)
    return keras.ops.convert_to_tensor(function(numpy(x)))


@pytest.mark.parametrize(
    ("use", "argument_count", "want"),
    [
        (lambda count, x: pure(count, x), 1, 2.0),
        # An operation on `other` alone is not hoisted out of the loop.
        (lambda count, x, other: x + pure(count, other), 2, 3.0),
    ],
    ids=["one-argument", "two-arguments"],
)
def test_repeat_executes_every_call(use, argument_count, want):
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x) * 2

    x = keras.ops.ones((3,), "float32")
    run = repeat(functools.partial(use, count), [x] * argument_count, calls=5)
    (y,) = run()
    np.testing.assert_allclose(numpy(y), want)
    calls.clear()
    run()
    assert len(calls) == 5


def test_repeat_returns_the_output_and_all_gradients():
    a, b, c = (keras.ops.convert_to_tensor([n], "float32") for n in (2.0, 3.0, 10.0))
    results = repeat(lambda a, b: a * b, [a, b], cotangent=c, calls=3)()
    assert [float(numpy(r)[0]) for r in results] == pytest.approx([6.0, 30.0, 20.0])
