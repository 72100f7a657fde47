"""Convolutional counterparts of involutional networks."""

import keras
import numpy as np
import pytest

import involution
from involution import models
from tests.support.backends import numpy

pytestmark = pytest.mark.any_backend


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
def test_counterpart_differs_in_its_involutions_only(rank, kind):
    layer = getattr(involution, f"Involution{rank}D")(3, strides=2, padding="symmetric", name="inv")
    inputs = keras.Input((*(9, 8, 7)[:rank], 16))
    model = keras.Model(inputs, keras.layers.Dense(4, name="out")(layer(inputs)))
    counterpart = models.conv_counterpart(model, kind)
    assert [layer.name for layer in counterpart.layers[1:]] == ["inv", "out"]
    replacement = counterpart.get_layer("inv")
    expected = f"{'Depthwise' if kind == 'depthwise' else ''}Conv{rank}D"
    assert type(replacement).__name__ == expected
    channels = (16, 1) if kind == "depthwise" else (16, 16)
    assert [tuple(w.shape) for w in replacement.weights] == [(3,) * rank + channels]
    x = np.random.default_rng(0).random((2, *inputs.shape[1:]), "float32")
    assert counterpart(x).shape == model(x).shape
    assert np.isfinite(numpy(counterpart(x))).all()


def test_counterpart_of_nested_models_keeps_filters():
    inner = keras.Sequential(
        [keras.Input((8, 8, 16)), involution.Involution2D(3, filters=32, name="inv")], name="inner"
    )
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, keras.layers.Dense(4)(inner(inputs)))
    counterpart = models.conv_counterpart(model)
    (inv,) = counterpart.get_layer("inner").layers
    assert isinstance(inv, keras.layers.Conv2D)
    assert tuple(inv.kernel.shape) == (3, 3, 16, 32)
    assert counterpart.output_shape == model.output_shape
    with pytest.raises(ValueError, match=r"no `filters`\. Received: inv, filters=32"):
        models.conv_counterpart(model, "depthwise")


def test_static_involution_per_channel_equals_its_depthwise_counterpart():
    layer = involution.Involution2D(3, groups=6, kernel_generator="static", name="inv")
    model = keras.Sequential([keras.Input((7, 8, 6)), layer])
    counterpart = models.conv_counterpart(model, "depthwise")
    (kernel,) = model.get_weights()
    counterpart.set_weights([kernel[..., None]])
    x = np.random.default_rng(0).random((2, 7, 8, 6), "float32")
    np.testing.assert_allclose(numpy(counterpart(x)), numpy(model(x)), atol=1e-5)


def test_model_is_unchanged():
    model = models.rednet_tiny((8, 8, 3))
    before = model.get_weights()
    counterpart = models.conv_counterpart(model)
    assert not any(isinstance(layer, involution.Involution2D) for layer in counterpart.layers)
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
def test_involutions_without_counterpart_are_rejected(arguments, kind, received):
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, involution.Involution2D(**arguments, name="inv")(inputs))
    with pytest.raises(ValueError, match="Received: .*" + received):
        models.conv_counterpart(model, kind)


def test_counterpart_keeps_trainable_and_regularizer():
    layer = involution.Involution2D(3, name="inv", trainable=False, activity_regularizer="l2")
    counterpart = models.conv_counterpart(keras.Sequential([keras.Input((6, 5, 8)), layer]))
    assert not counterpart.trainable_weights
    counterpart(np.ones((1, 6, 5, 8), "float32"))
    assert len(counterpart.losses) == 1


class Residual(involution.Involution2D):
    def call(self, inputs):
        return inputs + super().call(inputs)


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (Residual(3, name="inv"), "inv, a Residual that overrides it"),
        (keras.layers.TimeDistributed(involution.Involution2D(3, name="inv")), "inv, inside"),
    ],
)
def test_overridden_or_wrapped_involutions_are_rejected(layer, received):
    shape = (2, 6, 5, 8) if isinstance(layer, keras.layers.TimeDistributed) else (6, 5, 8)
    with pytest.raises(ValueError, match="Received: " + received):
        models.conv_counterpart(keras.Sequential([keras.Input(shape), layer]))


def test_no_depthwise_counterpart_in_three_dimensions():
    model = keras.Sequential([keras.Input((4, 4, 4, 16)), involution.Involution3D(3, name="inv")])
    with pytest.raises(
        ValueError, match=r"one or two dimensions, and no `filters`\. Received: inv"
    ):
        models.conv_counterpart(model, "depthwise")


def test_deprecated_name():
    with pytest.warns(DeprecationWarning, match=r"involution\.models\.twin is now"):
        assert models.twin is models.conv_counterpart
