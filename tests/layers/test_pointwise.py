"""1x1 convolutions as matrix products, against Keras's convolutions."""

import keras
import numpy as np
import pytest

from involution.kernel_generators.pointwise import POINTWISE_CONVS
from tests.support.backends import numpy
from tests.support.keras_io_formula import relative_error

SHAPES = {1: (2, 9, 5), 2: (2, 9, 6, 5), 3: (2, 5, 4, 3, 5)}


@pytest.mark.long
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("rank", POINTWISE_CONVS)
def test_pointwise_convolutions_match_keras(rank, strides):
    arguments = {"kernel_size": 1, "strides": strides, "activation": "tanh"}
    layer = POINTWISE_CONVS[rank](7, data_format="channels_last", **arguments)
    reference = getattr(keras.layers, f"Conv{rank}D")(7, data_format="channels_last", **arguments)
    x = np.random.default_rng(0).standard_normal(SHAPES[rank]).astype("float32")
    layer.build(x.shape)
    reference.build(x.shape)
    layer.bias.assign(np.arange(7) / 7)
    reference.set_weights(layer.get_weights())
    y = layer(x)
    assert tuple(y.shape) == tuple(layer.compute_output_shape(x.shape))
    assert relative_error(numpy(y), np.float64(numpy(reference(x)))) < 1e-6


@pytest.mark.long
def test_pointwise_convolutions_are_saved_and_loaded(tmp_path):
    model = keras.Sequential([keras.Input((None, None, 3)), POINTWISE_CONVS[2](4, 1, 2)])
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).random((1, 5, 4, 3), "float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is POINTWISE_CONVS[2]
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"kernel_size": 3}, r"kernel_size=\(3, 3\), groups=1, data_format='channels_last'"),
        ({"kernel_size": (1, 2)}, r"kernel_size=\(1, 2\)"),
        ({"kernel_size": 1, "groups": 2}, "groups=2"),
        ({"kernel_size": 1, "data_format": "channels_first"}, "data_format='channels_first'"),
    ],
)
def test_other_convolutions_are_rejected(arguments, received):
    with pytest.raises(ValueError, match="must have `kernel_size` 1.* Received: .*" + received):
        POINTWISE_CONVS[2](4, **arguments)
