"""Convolutional twins: the same network, but for what stands in the involutions' place."""

import keras
import numpy as np
import pytest

import involution
from involution import models
from tests.support.backends import numpy


@pytest.mark.parametrize(
    ("rank", "kind"),
    [
        (1, "convolution"),
        (2, "convolution"),
        (3, "convolution"),
        (1, "depthwise"),
        (2, "depthwise"),
    ],
)
def test_a_twin_differs_in_its_involutions_alone(rank, kind):
    layer = getattr(involution, f"Involution{rank}D")(3, 2, padding="symmetric", name="inv")
    inputs = keras.Input((*(9, 8, 7)[:rank], 16))
    model = keras.Model(inputs, keras.layers.Dense(4, name="out")(layer(inputs)))
    twin = models.twin(model, kind)
    assert [layer.name for layer in twin.layers[1:]] == ["inv", "out"]
    stands_in = twin.get_layer("inv")
    expected = f"{'Depthwise' if kind == 'depthwise' else ''}Conv{rank}D"
    assert type(stands_in).__name__ == expected
    channels = (16, 1) if kind == "depthwise" else (16, 16)
    assert [tuple(w.shape) for w in stands_in.weights] == [(3,) * rank + channels]
    x = np.random.default_rng(0).random((2, *inputs.shape[1:]), "float32")
    assert twin(x).shape == model(x).shape
    assert np.isfinite(numpy(twin(x))).all()


def test_a_twin_has_as_many_filters_and_reaches_into_models():
    inner = keras.Sequential(
        [keras.Input((8, 8, 16)), involution.Involution2D(3, filters=32, name="inv")], name="inner"
    )
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, keras.layers.Dense(4)(inner(inputs)))
    twin = models.twin(model)
    (inv,) = twin.get_layer("inner").layers
    assert isinstance(inv, keras.layers.Conv2D)
    assert tuple(inv.kernel.shape) == (3, 3, 16, 32)
    assert twin.output_shape == model.output_shape
    with pytest.raises(ValueError, match=r"no other channels\. Received: inv, filters=32"):
        models.twin(model, "depthwise")


def test_a_static_involution_of_each_channel_is_its_depthwise_twin():
    layer = involution.Involution2D(3, groups=6, kernel_generator="static", name="inv")
    model = keras.Sequential([keras.Input((7, 8, 6)), layer])
    twin = models.twin(model, "depthwise")
    (kernel,) = model.get_weights()
    twin.set_weights([kernel[..., None]])
    x = np.random.default_rng(0).random((2, 7, 8, 6), "float32")
    np.testing.assert_allclose(numpy(twin(x)), numpy(model(x)), atol=1e-5)


def test_the_model_stays_as_it_was():
    model = models.rednet_tiny((8, 8, 3))
    before = model.get_weights()
    twin = models.twin(model)
    assert not any(isinstance(layer, involution.Involution2D) for layer in twin.layers)
    assert any(isinstance(layer, involution.Involution2D) for layer in model.layers)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "kind", "received"),
    [
        ({"kernel_size": 3, "return_kernel": True}, "convolution", "inv, return_kernel=True"),
        ({"kernel_size": 7, "padding": 2}, "convolution", "padding="),
        ({"kernel_size": 4}, "convolution", r"kernel_size=\(4, 4\)"),
        ({"kernel_size": 3}, "magic", "kind='magic'"),
    ],
)
def test_what_has_no_twin_is_refused(arguments, kind, received):
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, involution.Involution2D(**arguments, name="inv")(inputs))
    with pytest.raises(ValueError, match="Received: .*" + received):
        models.twin(model, kind)


def test_a_twin_keeps_what_a_convolution_has_too():
    layer = involution.Involution2D(3, name="inv", trainable=False, activity_regularizer="l2")
    twin = models.twin(keras.Sequential([keras.Input((6, 5, 8)), layer]))
    assert not twin.trainable_weights
    twin(np.ones((1, 6, 5, 8), "float32"))
    assert len(twin.losses) == 1


class Residual(involution.Involution2D):
    def call(self, inputs):
        return inputs + super().call(inputs)


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (Residual(3, name="inv"), "inv, a Residual with its own"),
        (keras.layers.TimeDistributed(involution.Involution2D(3, name="inv")), "inv, within"),
    ],
)
def test_an_involution_that_would_be_lost_or_stay_is_refused(layer, received):
    shape = (2, 6, 5, 8) if isinstance(layer, keras.layers.TimeDistributed) else (6, 5, 8)
    with pytest.raises(ValueError, match="Received: " + received):
        models.twin(keras.Sequential([keras.Input(shape), layer]))


def test_keras_has_no_depthwise_convolution_in_three_dimensions():
    model = keras.Sequential([keras.Input((4, 4, 4, 16)), involution.Involution3D(3, name="inv")])
    with pytest.raises(
        ValueError, match=r"dimensions alone, and to no other channels\. Received: inv"
    ):
        models.twin(model, "depthwise")
