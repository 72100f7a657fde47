"""Use of kernels: replacements and variances against NumPy."""

import keras
import numpy as np
import pytest

import involution
from involution import Involution1D, Involution2D, Involution2DTranspose, models
from involution.kernel_generators.static import Static
from involution.layers.recording import replace_kernels
from involution.utils.errors import InputError
from involution.visualize import capture, figures, kernel_use
from involution.visualize.ablation import REPLACEMENTS

pytestmark = pytest.mark.any_backend

IMAGES = np.random.default_rng(0).standard_normal((6, 3, 2, 2)).astype("float32")
IMAGES[..., 1] = 1


@keras.saving.register_keras_serializable(package="tests")
class FirstChannel(keras.layers.Layer):
    """Kernels of one tap that are the features' first channel, in the layer's data format."""

    data_format = None

    def call(self, features):
        return features[:, :1] if self.data_format == "channels_first" else features[..., :1]


def signal_mean(data_format="channels_last"):
    """A model whose logits are the mean of the kernels over the first two places, and its
    negative."""
    channels_first = data_format == "channels_first"
    inputs = keras.Input((2, 3, 2) if channels_first else (3, 2, 2))
    layer = Involution2D(1, kernel_generator=FirstChannel(), data_format=data_format, name="i")
    x = layer(inputs)
    x = x[:, 1, 0] if channels_first else x[:, 0, :, 1]
    x = keras.ops.mean(x, axis=1, keepdims=True)
    return keras.Model(inputs, keras.layers.Concatenate()([x, -x]), name="signal")


def expected(images, batches):
    """The signal of each image with its kernels replaced, by replacement."""
    kernels = images[..., 0].astype("float64")
    shuffled = np.empty_like(kernels)
    for indices in batches:
        shuffled[indices] = kernels[np.roll(indices, 1)]
    replaced = {
        "places": np.broadcast_to(kernels.mean(axis=(1, 2), keepdims=True), kernels.shape),
        "images": np.broadcast_to(kernels.mean(axis=0), kernels.shape),
        "static": np.full(kernels.shape, kernels.mean()),
        "shuffled": shuffled,
    }
    return {kind: values[:, 0].mean(axis=1) for kind, values in replaced.items()}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_replacements_are_those_that_they_say(data_format, batch_size):
    images = IMAGES if data_format == "channels_last" else np.moveaxis(IMAGES, -1, 1)
    order = np.random.default_rng(0).permutation(6)
    batches = np.array_split(order, max(1, 6 // batch_size))
    seen = []

    def metric(outputs, labels):
        np.testing.assert_array_equal(labels, order)
        seen.append(outputs[:, 0])
        return outputs[0, 0]

    use = kernel_use(
        signal_mean(data_format), images, np.arange(6), metric=metric, batch_size=batch_size
    )
    np.testing.assert_allclose(seen[0], IMAGES[order, 0, :, 0].mean(axis=1), rtol=1e-5)
    for kind, got in zip(REPLACEMENTS, seen[1:], strict=True):
        want = expected(IMAGES, batches)[kind][order]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=kind)
        assert use.layers["i"].scores[kind] == use.together[kind] == pytest.approx(got[0])


def test_variances():
    use = kernel_use(signal_mean(), IMAGES).layers["i"]
    kernels = IMAGES[..., 0].astype("float64")
    assert use.over_places == pytest.approx(kernels.var(axis=(1, 2)).mean(), rel=1e-5)
    assert use.over_images == pytest.approx(kernels.var(axis=0).mean(), rel=1e-5)
    # A kernel of one tap has none.
    assert (use.over_taps, use.place_ratio) == (0, np.inf)

    layer = Involution1D(3, groups=2, kernel_generator=Static())
    use = kernel_use(layer, IMAGES[:, :, 0])
    kernel = keras.ops.convert_to_numpy(layer.kernel_generator.kernel)
    (static,) = use.layers.values()
    assert static.over_taps == pytest.approx(kernel.var(axis=0).mean(), rel=1e-5)
    assert max(static.over_places, static.over_images) < 1e-12
    assert {*use.together.values(), *static.scores.values()} == {1.0}


def test_layers_are_replaced_one_by_one():
    model = models.load("rednet_tiny-cifar10")
    images = np.random.default_rng(1).random((9, 32, 32, 3), "float32")
    use = kernel_use(model, images, batch_size=4)
    assert len(use.layers) == 5
    assert use.score == 1
    assert all(set(layer.scores) == set(REPLACEMENTS) for layer in use.layers.values())
    lines = use.table()
    assert len(lines) == 7
    assert max(map(len, lines)) <= 80
    assert f"{use.together['static']:.3f}" in lines[-1]
    labels = model.predict(images, verbose=0).argmax(axis=-1)
    labels[:3] = (labels[:3] + 1) % 10
    assert kernel_use(model, images, labels).score == pytest.approx(6 / 9)
    assert len(figures.use_chart(use).axes) == 2


def test_calls_of_a_shared_layer_are_separate():
    layer = Involution2D(1, kernel_generator=FirstChannel(), name="i")
    inputs = keras.Input((3, 2, 2))
    model = keras.Model(inputs, keras.layers.Flatten()(layer(layer(inputs))))
    assert list(kernel_use(model, IMAGES).layers) == ["i", "i#2"]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_transposed_involutions_are_included(data_format):
    shape = (4, 3, 5) if data_format == "channels_first" else (3, 5, 4)
    inputs = keras.Input(shape)
    layer = Involution2DTranspose(
        4, strides=2, group_channels=2, data_format=data_format, name="up"
    )
    x = layer(Involution2D(3, group_channels=4, data_format=data_format, name="i")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    images = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    use = kernel_use(model, images)
    assert list(use.layers) == ["i", "up"]
    assert use.layers["up"].over_places > 0

    record = capture(model, images)["up"]
    assert record.kernels.shape == (4, 3, 5, 16, 2)
    assert record.outputs.shape == (4, 6, 10, 4)
    # The windows lie on the output: each spreads one position of the input.
    assert record.sizes == (6, 10)
    assert record.attention_received.shape == (4, 6, 10, 2)
    assert record.attention_received.sum() == pytest.approx(inside(record).sum(), rel=1e-4)
    assert record.nearest_position((0.0, 1.0)) == (0, 4)
    (top, bottom), _ = record.window_at((0.5, 0.5))
    assert bottom - top == pytest.approx(4 / 6)

    with replace_kernels(lambda layer, kernel: keras.ops.zeros_like(kernel)):
        assert not keras.ops.convert_to_numpy(layer(np.ones((1, *shape), "float32"))).any()


def inside(record):
    """The weights of the taps that lie inside the output."""
    ones = np.ones((1, *record.sizes, 1), "float32")
    arguments = {"strides": record.window.strides, "padding": record.window.padding}
    kernel = np.ones((1, *record.kernels.shape[1:3], 16, 1), "float32")
    products = involution.ops.window_products(
        ones, np.ones((1, *record.kernels.shape[1:3], 1), "float32"), 4, **arguments
    )
    assert products.shape == kernel.shape
    return record.kernels * keras.ops.convert_to_numpy(products)


def test_labels_match_the_images_and_the_outputs():
    """The labels of Keras's data sets have the shape (N, 1)."""
    model = signal_mean()
    labels = np.zeros(6, "uint8")
    flat = kernel_use(model, IMAGES, labels)
    assert kernel_use(model, IMAGES, labels[:, None]) == flat
    for invalid, message in (
        (labels[:5], "as many as the images. Received: 5 labels and 6 images"),
        (
            np.eye(2)[labels],
            r"shape \(6,\) for.*float64 of the shape \(6, 2\)",
        ),
        (labels + 0.5, "Received: float64"),
    ):
        with pytest.raises(InputError, match=message):
            kernel_use(model, IMAGES, invalid)


def two_outputs():
    model = signal_mean()
    return keras.Model(model.inputs[0], [model.output, model.output])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (signal_mean, {"images": IMAGES[:1]}, "two images are required. Received: 1"),
        (signal_mean, {"batch_size": 1}, "`batch_size` must be at least 2. Received: 1"),
        (signal_mean, {"metric": max}, "`metric` requires `labels`. Received: labels=None"),
        (lambda: keras.Sequential([keras.layers.Dense(1)], name="d"), {}, "Received: d, without"),
        (two_outputs, {}, "must have one output. Received: list"),
    ],
)
def test_wrong_arguments_raise(model, arguments, message):
    with pytest.raises(InputError, match=message):
        kernel_use(model(), **{"images": IMAGES, **arguments})
