"""LargeContext: kernels normalized over taps and places, against NumPy and finite differences."""

import keras
import numpy as np
import pytest

from involution import Involution1D, Involution2D
from involution.kernel_generators import LargeContext
from tests.support.backends import grad, numpy, tensors, to_float64
from tests.support.keras_io_formula import randomize, relative_error

SIZES = {1: (9,), 2: (7, 5)}

float64 = pytest.mark.parametrize("policy", ["float64"], indirect=True)


def built(rank, stride, dtype="float64", **options):
    generator = LargeContext(
        kernel_size=(3, 2)[:rank], groups=2, strides=stride, dtype=dtype, **options
    )
    x = np.random.default_rng(0).normal(size=(3, *SIZES[rank], 8)).astype("float32")
    generator(x)
    randomize(generator)
    return generator, x


def normalized(generator, kernels):
    grouped = kernels.reshape(len(kernels), -1, generator.groups)
    mean, variance = grouped.mean(axis=1), grouped.var(axis=1)
    taps = generator.kernel_channels // generator.groups
    mean, variance = (
        np.tile(v, taps).reshape(len(kernels), *(1,) * (kernels.ndim - 2), -1)
        for v in (mean, variance)
    )
    return (kernels - mean) / np.sqrt(variance + 1e-5) * numpy(generator.gamma) + numpy(
        generator.beta
    )


@float64
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", SIZES)
def test_kernels_are_the_normalized_ones_of_the_last_convolution(policy, rank, stride):
    generator, x = built(rank, stride)
    kernels = to_float64(generator.expand(generator.hidden(keras.ops.cast(x, "float64"))))
    assert np.abs(kernels).std() > 1e-3
    assert relative_error(to_float64(generator(x)), normalized(generator, kernels)) < 1e-12


def test_regularizers_and_initializers_reach_every_convolution():
    generator = LargeContext(
        3,
        kernel_size=3,
        groups=2,
        use_normalization=False,
        bias_initializer="ones",
        bias_regularizer="l2",
        kernel_regularizer="l2",
    )
    generator(np.ones((1, 4, 5, 8), "float32"))
    convolutions = [getattr(generator, n) for n in ("reduce", "context", "mix", "expand")]
    assert len(generator.losses) == 2 * len(convolutions)
    assert all((numpy(layer.bias) == 1).all() for layer in convolutions)


@float64
def test_a_replaced_last_convolution_is_called(policy):
    generator, x = built(2, 1)
    before = to_float64(generator(x))
    generator.expand.activity_regularizer = keras.regularizers.L2(0.1)
    assert relative_error(to_float64(generator(x)), before) < 1e-12
    assert len(generator.losses) == 1
    generator.expand.activity_regularizer = None
    generator.expand.activation = keras.ops.tanh
    kernels = to_float64(generator.expand(generator.hidden(keras.ops.cast(x, "float64"))))
    assert relative_error(to_float64(generator(x)), normalized(generator, kernels)) < 1e-12


def test_half_precision_statistics_do_not_overflow():
    generator, x = built(2, 1, "float16")
    x = keras.ops.cast(x, "float16")
    largest = np.abs(to_float64(generator.expand(generator.hidden(x)))).max()
    for weight in (generator.expand.kernel, generator.expand.bias):
        weight.assign(weight * (1000 / largest))
    kernels = to_float64(generator.expand(generator.hidden(x)))
    assert np.square(kernels).max() > 65504
    error = relative_error(to_float64(generator(x)), normalized(generator, kernels))
    assert error < 0.02


@float64
@pytest.mark.parametrize("make", [Involution1D, Involution2D])
def test_second_derivatives_equal_finite_differences(policy, make):
    rank = {Involution1D: 1, Involution2D: 2}[make]
    layer = make(
        3, strides=2, groups=2, kernel_generator=LargeContext(dtype="float64"), dtype="float64"
    )
    rng = np.random.default_rng(3)
    x, direction = rng.normal(size=(2, 2, *SIZES[rank], 8))
    layer(x)
    randomize(layer)

    first = grad(lambda t: keras.ops.sum(layer(t, training=False) ** 3))
    (x_tensor, direction_tensor) = tensors([x, direction], "float64")
    (second,) = grad(lambda t: keras.ops.sum(first(t)[0] * direction_tensor))(x_tensor)
    step = 1e-5
    ahead, behind = (
        to_float64(first(tensors([x + sign * step * direction], "float64")[0])[0])
        for sign in (1, -1)
    )
    assert relative_error(to_float64(second), (ahead - behind) / (2 * step)) < 1e-6
