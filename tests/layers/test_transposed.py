"""Involution1DTranspose, 2D and 3D."""

import keras
import numpy as np
import pytest
from keras import ops

import involution
from involution.kernel_generators import Static
from tests.support.backends import BACKEND, numpy
from tests.support.keras_io_formula import randomize


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("strides", [1, 2, (3, 2)])
def test_applies_a_generated_kernel_for_each_position(strides):
    layer = involution.Involution2DTranspose(3, strides=strides, groups=2, return_kernel=True)
    x = random(2, 5, 4, 8)
    y, kernel = layer(x)
    assert kernel.shape == (2, 5, 4, 9, 2)
    expected = involution.ops.transposed_involution(x, kernel, 3, strides, groups=2)
    np.testing.assert_array_equal(numpy(y), numpy(expected))
    # The generator is that of an involution without strides.
    other = involution.Involution2D(3, groups=2, return_kernel=True)
    other.build(x.shape)
    other.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(kernel), numpy(other(x)[1]))
    assert layer.compute_output_shape(x.shape) == (tuple(y.shape), tuple(kernel.shape))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras pads otherwise on PyTorch")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_static_kernels_are_a_depthwise_transposed_convolution(padding):
    layer = involution.Involution2DTranspose(
        4, strides=2, padding=padding, groups=3, kernel_generator=Static()
    )
    x = random(2, 5, 6, 3)
    y = numpy(layer(x))
    weight = numpy(layer.kernel_generator.kernel)
    for c in range(3):
        expected = ops.conv_transpose(x[..., c : c + 1], weight[..., c, None, None], 2, padding)
        np.testing.assert_allclose(y[..., c : c + 1], numpy(expected), 1e-5, 1e-5)


def test_dimensions_formats_and_sizes():
    assert involution.Involution1DTranspose(5, strides=3)(random(1, 4, 8)).shape == (1, 12, 8)
    assert involution.Involution3DTranspose(3, strides=2, padding="valid")(
        random(1, 2, 3, 4, 8)
    ).shape == (1, 5, 7, 9, 8)
    first = involution.Involution2DTranspose(3, strides=2, data_format="channels_first")
    assert first(random(1, 8, 3, 4)).shape == (1, 8, 6, 8)
    padded = involution.Involution2DTranspose(3, strides=2, padding="valid", output_padding=1)
    assert padded(random(1, 3, 4, 8)).shape == (1, 8, 10, 8)


def test_model_saves_and_loads(tmp_path):
    layer = involution.Involution2DTranspose(
        3, strides=2, padding="valid", output_padding=1, groups=2, kernel_softmax=True, name="up"
    )
    model = keras.Sequential([keras.Input((None, None, 8)), layer])
    assert model.output_shape == (None, None, None, 8)
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = random(2, 3, 5, 8)
    np.testing.assert_array_equal(numpy(model(x)), numpy(loaded(x)))
    config = layer.get_config()
    assert config["strides"] == (2, 2)
    assert config["padding"] == "valid"
    assert config["output_padding"] == 1
    assert involution.Involution2DTranspose.from_config(config).get_config() == config


def test_trains():
    model = keras.Sequential([keras.Input((4, 8)), involution.Involution1DTranspose(3, strides=2)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(random(4, 4, 8), random(4, 8, 8), verbose=0)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filters": 8}, TypeError, "no argument `filters`: the output has the input's channels"),
        ({"stride": 2}, TypeError, "no argument `stride`: use `strides`"),
        ({"kernel_softmax": "in_bounds"}, ValueError, "`kernel_softmax` must be True or False"),
        ({"strides": 2, "output_padding": 9}, ValueError, "`output_padding` must give fewer"),
        ({"padding": 9}, ValueError, "Every output size must be at least 1"),
    ],
)
def test_invalid_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        involution.Involution2DTranspose(3, **arguments)(random(1, 4, 4, 8))
